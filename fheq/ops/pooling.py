"""Pooling: windows slide over the spatial axes of (N, C, ...)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.errors import UnsupportedError
from fheq.graph import Node, describe, is_float
from fheq.ops.table import Kind, Op, register
from fheq.ops.windows import Window, covered, window_of

Array = Any


def _reduce(x: Array, window: Window, start: np.ndarray, operation: Any) -> Array:
    """The windows of `x` reduced by `operation`, `start` being its neutral element."""
    ones = (1, 1)
    return jax.lax.reduce_window(
        x,
        start,
        operation,
        window_dimensions=ones + window.kernel,
        window_strides=ones + window.strides,
        padding=((0, 0), (0, 0), *window.padding),
        window_dilation=ones + window.dilations,
    )


def _average_pool(node: Node, x: Array) -> Array:
    """ONNX AveragePool."""
    window = window_of(node, x.shape[2:], node.attrs["kernel_shape"])
    count = covered(window, x.shape[2:], bool(node.attrs.get("count_include_pad", 0)))
    return _reduce(x, window, np.zeros((), x.dtype), jax.lax.add) / np.maximum(count, 1).astype(x.dtype)


def lowest(dtype: np.dtype) -> np.ndarray:
    """The neutral element of the maximum."""
    if dtype == np.bool_:
        return np.zeros((), dtype)
    return np.asarray(-np.inf if is_float(dtype) else jnp.iinfo(dtype).min, dtype)


def _max_pool(node: Node, x: Array) -> Array:
    """ONNX MaxPool, without the indices (the only thing that `storage_order` changes)."""
    if any(node.outputs[1:]):
        raise UnsupportedError(f"{describe(node)}: the Indices output of MaxPool is not supported; remove its readers")
    return _reduce(x, window_of(node, x.shape[2:], node.attrs["kernel_shape"]), lowest(x.dtype), jax.lax.max)


def _spatial(x: Array) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def root(x: Array, p: float) -> Array:
    """The p-th root, of a sum of p-th powers."""
    return x if p == 1 else jnp.sqrt(x) if p == 2 else x ** (1 / p)


def _lp_pool(node: Node, x: Array) -> Array:
    """ONNX LpPool: the p-norm of each window; pads count as 0."""
    p = node.attrs["p"]
    window = window_of(node, x.shape[2:], node.attrs["kernel_shape"])
    powers = jnp.abs(x) ** p
    return root(_reduce(powers, window, np.zeros((), x.dtype), jax.lax.add), p)


def _global_lp_pool(node: Node, x: Array) -> Array:
    """ONNX GlobalLpPool."""
    p = node.attrs["p"]
    return root(jnp.sum(jnp.abs(x) ** p, axis=_spatial(x), keepdims=True), p)


register(
    Op("AveragePool", 7, Kind.LINEAR, _average_pool),
    Op("GlobalAveragePool", 7, Kind.LINEAR, lambda node, x: jnp.mean(x, axis=_spatial(x), keepdims=True)),
    Op("GlobalLpPool", 7, Kind.COMPOSITE, _global_lp_pool),
    Op("GlobalMaxPool", 7, Kind.MAX, lambda node, x: jnp.max(x, axis=_spatial(x), keepdims=True)),
    Op("LpPool", 7, Kind.COMPOSITE, _lp_pool),
    Op("MaxPool", 7, Kind.MAX, _max_pool),
)
