"""Arguments of operators as a model states them: they may be malformed, so they are checked before use."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from fheq.errors import UnsupportedError
from fheq.graph import Node, describe

MAX_ELEMENTS = 2**28
"""Largest tensor that an operator may make from sizes written in a model."""

# ONNX TensorProto.DataType. Absent: strings, complex numbers, floats of 8 bits or less and integers of 2 bits.
DTYPES: dict[int, Any] = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    4: np.uint16,
    5: np.int16,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
    12: np.uint32,
    13: np.uint64,
    16: jnp.bfloat16,
    21: jnp.uint4,
    22: jnp.int4,
}


def dtype_of(node: Node, code: int) -> np.dtype:
    """The numpy dtype of a TensorProto.DataType."""
    if code not in DTYPES:
        raise UnsupportedError(
            f"{describe(node)}: element type {code} is not supported; use float32, or 4 to 64 bit integers"
        )
    return np.dtype(DTYPES[code])


def checked(node: Node, dtype: Any) -> np.dtype:
    """The type of a result that follows that of an input, if it is supported."""
    if np.dtype(dtype) not in {np.dtype(known) for known in DTYPES.values()}:
        raise UnsupportedError(
            f"{describe(node)}: element type {dtype} is not supported; use float32, or 4 to 64 bit integers"
        )
    return np.dtype(dtype)


def integers(values: Any) -> tuple[int, ...]:
    """A tuple of Python integers from a list attribute or a known tensor."""
    if not np.all(np.isfinite(values)):
        raise ValueError(f"{values} is not finite")
    return tuple(int(value) for value in np.ravel(values))


def axis_of(axis: int, ndim: int) -> int:
    """A non-negative axis."""
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis {axis} does not exist in a tensor of {ndim} axes")
    return axis % ndim


def bounded(shape: Iterable[int]) -> tuple[int, ...]:
    """The shape, if it is one and its tensor is not absurdly large."""
    shape = tuple(int(size) for size in shape)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape {shape} has a negative size")
    if math.prod(shape) > MAX_ELEMENTS:
        raise ValueError(f"shape {shape} has more than {MAX_ELEMENTS} elements")
    return shape


def wrapped_indices(indices: Any, size: int) -> np.ndarray:
    """Indices into an axis of this size, negative ones counting from its end."""
    indices = np.asarray(indices, np.int64)
    if np.any(indices < -size) or np.any(indices >= size):
        raise IndexError(f"an index is outside an axis of {size} elements")
    return np.where(indices < 0, indices + size, indices)
