"""Taking elements by a constant index: by slices, transposes and broadcasts where these do, for gathers are slow.

Most indices are of movement operators. XLA fuses slices and broadcasts into the loops that read them; of a gather it writes
and reads every element, which took nine tenths of the time of an attention. Where elements are missing (pads, whose views
would be padded) convolutions read gathers faster.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Array = Any


def take(values: Array, index: np.ndarray, fill: np.ndarray | None = None) -> Array:
    """`values[index]` of a vector, and `fill` where the index is negative (anything where it is not given).

    Args:
        values: `(n,)`.
        index: of any shape, constant.
        fill: of the same shape, constant.
    """
    hole = index < 0
    if hole.any():
        taken = values[np.maximum(index, 0)]
        return taken if fill is None else jnp.where(hole, fill.astype(values.dtype), taken)
    view = strided(index, len(values))
    return values[index] if view is None else view.of(values)


class View(NamedTuple):
    """A view of a vector: it is cut to `length`, reshaped to `sizes`, sliced from `starts` to `ends`, transposed by `order`,
    reshaped to `kept` and broadcast to `shape`."""

    length: int
    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    order: tuple[int, ...]
    kept: tuple[int, ...]
    shape: tuple[int, ...]

    def of(self, values: Array) -> Array:
        """The view of a vector."""
        parts = values[: self.length].reshape(self.sizes)
        parts = parts[tuple(slice(low, high) for low, high in zip(self.starts, self.ends))]
        return jnp.broadcast_to(parts.transpose(self.order).reshape(self.kept), self.shape)


def strided(index: np.ndarray, count: int) -> View | None:
    """The view of a vector of `count` elements that an index without holes takes; None where it is none.

    An index is one where it goes in equal strides along each axis, and these are digits' places in a mixed base.
    """
    if not index.size:
        return None
    strides = _strides(index)
    if strides is None or np.any(strides < 0):
        return None
    axes = [int(axis) for axis in np.argsort(-strides, kind="stable") if strides[axis] > 0]
    places = [int(strides[axis]) for axis in axes]
    extents = [index.shape[axis] for axis in axes]
    if not places or places[-1] > 1:
        places, extents = [*places, 1], [*extents, 1]
    if any(a % b for a, b in pairwise(places)):
        return None
    first = int(index.flat[0])
    outer = count // places[0]
    sizes = [outer, *(a // b for a, b in pairwise(places))]
    starts = [first // place % size for place, size in zip(places, sizes)]
    ends = [start + extent for start, extent in zip(starts, extents)]
    if first // places[0] >= outer or any(end > size for end, size in zip(ends, sizes)):
        return None
    order = [*np.argsort(axes, kind="stable").tolist(), *range(len(axes), len(places))]
    kept = tuple(size if stride > 0 else 1 for size, stride in zip(index.shape, strides))
    return View(outer * places[0], tuple(sizes), tuple(starts), tuple(ends), tuple(order), kept, index.shape)


def _strides(index: np.ndarray) -> np.ndarray | None:
    """The difference between neighbours along each axis, 0 along axes of one; None where it varies."""
    found = []
    for axis, size in enumerate(index.shape):
        steps = np.diff(index, axis=axis)
        if steps.size and np.any(steps != steps.flat[0]):
            return None
        found.append(int(steps.flat[0]) if size > 1 else 0)
    return np.asarray(found, np.int64)
