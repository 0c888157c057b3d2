"""Where the channels of a tensor go when its elements are moved."""

from __future__ import annotations

import numpy as np


def channel_numbers(shape: tuple[int, ...], axis: int) -> np.ndarray:
    """An array of `shape` in which each element is its index along `axis`."""
    axis = axis % len(shape)
    return np.broadcast_to(np.arange(shape[axis]).reshape((-1,) + (1,) * (len(shape) - axis - 1)), shape)


def channel_axis(numbers: np.ndarray) -> tuple[int, np.ndarray] | None:
    """The one axis along which channel numbers vary, and their order there; None when there is no such axis."""
    for axis in range(numbers.ndim):
        order = numbers_along(numbers, axis)
        if order is not None:
            return axis, order
    return None


def numbers_along(numbers: np.ndarray, axis: int) -> np.ndarray | None:
    """The channel numbers along `axis`, or None where they vary along another axis too."""
    order = numbers[tuple(slice(None) if i == axis else slice(0, 1) for i in range(numbers.ndim))]
    return order.ravel() if np.array_equal(np.broadcast_to(order, numbers.shape), numbers) else None
