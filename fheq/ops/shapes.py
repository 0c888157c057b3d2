"""Operators whose result depends on shapes and known tensors alone: they give numpy arrays."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from fheq.errors import UnsupportedError
from fheq.graph import Node, describe
from fheq.ops.arguments import axis_of, bounded, checked, dtype_of, integers
from fheq.ops.table import Kind, Op, register

Array = Any

# Attributes of Constant that hold its value, with the type of the result.
_VALUES: dict[str, Any] = {
    "value": None,
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def _constant(node: Node) -> np.ndarray:
    """ONNX Constant."""
    for name, dtype in _VALUES.items():
        if name in node.attrs:
            return np.asarray(node.attrs[name], dtype)
    raise UnsupportedError(f"{describe(node)}: Constant with {sorted(node.attrs)}; use a dense tensor of numbers")


def _constant_of_shape(node: Node, shape: np.ndarray) -> np.ndarray:
    """ONNX ConstantOfShape."""
    value = np.asarray(node.attrs.get("value", np.zeros(1, np.float32)))
    return np.full(bounded(integers(shape)), value.reshape(()), value.dtype)


def _shape(node: Node, x: Array) -> np.ndarray:
    """ONNX Shape."""
    return np.asarray(x.shape[node.attrs.get("start", 0) : node.attrs.get("end")], np.int64)


def _range(node: Node, start: np.ndarray, limit: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """ONNX Range."""
    dtype = np.asarray(start).dtype
    low, high, step = (np.asarray(value).item() for value in (start, limit, delta))
    steps = (high - low) / step
    if not math.isfinite(steps):
        raise ValueError(f"a range from {low} to {high} by {step} has no length")
    (count,) = bounded([max(math.ceil(steps), 0)])
    return np.asarray(low + np.arange(count) * step).astype(dtype)


def _eye_like(node: Node, x: Array) -> np.ndarray:
    """ONNX EyeLike."""
    dtype = dtype_of(node, node.attrs["dtype"]) if "dtype" in node.attrs else checked(node, x.dtype)
    rows, columns = x.shape
    return np.eye(rows, columns, node.attrs["k"]).astype(dtype)


def _one_hot(node: Node, indices: Array, depth: np.ndarray, values: Array) -> Array:
    """ONNX OneHot: indices outside [-depth, depth) have no hot element."""
    (count,) = integers(depth)
    axis = axis_of(node.attrs["axis"], jnp.ndim(indices) + 1)
    bounded([*jnp.shape(indices), count])
    indices = jnp.expand_dims(indices, axis)
    indices = jnp.where(indices < 0, indices + count, indices)
    hot = indices == jnp.arange(count).reshape((-1,) + (1,) * (jnp.ndim(indices) - axis - 1))
    return jnp.where(hot, values[1], values[0])


register(
    Op("Constant", 7, Kind.CONSTANT, _constant),
    Op("ConstantOfShape", 9, Kind.CONSTANT, _constant_of_shape, static=(0,)),
    Op("EyeLike", 9, Kind.CONSTANT, _eye_like),
    Op("NonZero", 9, Kind.CONSTANT, lambda node, x: np.stack(np.nonzero(np.atleast_1d(x))), static=(0,)),
    Op("OneHot", 9, Kind.COMPOSITE, _one_hot, static=(1,)),
    Op("Range", 11, Kind.CONSTANT, _range, static=(0, 1, 2)),
    Op("Shape", 7, Kind.CONSTANT, _shape),
    Op("Size", 7, Kind.CONSTANT, lambda node, x: np.asarray(math.prod(x.shape), np.int64)),
)
