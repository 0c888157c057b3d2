"""Normalizations: softmax and its relatives, and division by a statistic of a group of elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.graph import Node, is_float
from fheq.ops.arguments import axis_of
from fheq.ops.pooling import root
from fheq.ops.table import Evaluate, Kind, Op, register

Array = Any


def _over_axis(function: Callable[..., Array]) -> Evaluate:
    """Softmax, LogSoftmax and Hardmax since opset 13."""
    return lambda node, x: function(x, axis=axis_of(node.attrs["axis"], x.ndim))


def _over_rest(function: Callable[..., Array]) -> Evaluate:
    """Softmax, LogSoftmax and Hardmax before opset 13: over `axis` and all that follow."""

    def evaluate(node: Node, x: Array) -> Array:
        axis = axis_of(node.attrs["axis"], x.ndim)
        return function(x.reshape(*x.shape[:axis], -1), axis=axis).reshape(x.shape)

    return evaluate


def _hardmax(x: Array, axis: int) -> Array:
    """1 at the first maximum along an axis, 0 elsewhere."""
    places = jnp.arange(x.shape[axis]).reshape((-1,) + (1,) * (x.ndim - axis - 1))
    return (places == jnp.argmax(x, axis=axis, keepdims=True)).astype(x.dtype)


def _layer_normalization(node: Node, x: Array, scale: Array, bias: Array | None = None) -> tuple[Array, ...]:
    """ONNX LayerNormalization: the result, the mean and the inverse standard deviation."""
    axes = tuple(range(axis_of(node.attrs["axis"], x.ndim), x.ndim))
    wide = x.astype(jnp.promote_types(x.dtype, np.float32)) if node.attrs["stash_type"] == 1 else x
    mean = jnp.mean(wide, axis=axes, keepdims=True)
    inverse = 1 / jnp.sqrt(jnp.mean((wide - mean) ** 2, axis=axes, keepdims=True) + node.attrs["epsilon"])
    y = ((wide - mean) * inverse).astype(x.dtype) * scale
    return (y if bias is None else y + bias, mean, inverse)[: len(node.outputs)]


def _instance_normalization(node: Node, x: Array, scale: Array, bias: Array) -> Array:
    """ONNX InstanceNormalization: every channel of every sample by itself."""
    axes = tuple(range(2, x.ndim))
    scale, bias = (jnp.reshape(p, (-1,) + (1,) * (x.ndim - 2)) for p in (scale, bias))
    centred = x - jnp.mean(x, axis=axes, keepdims=True)
    inverse = 1 / jnp.sqrt(jnp.mean(centred**2, axis=axes, keepdims=True) + node.attrs["epsilon"])
    return (scale * centred * inverse + bias).astype(x.dtype)


def _lp_normalization(node: Node, x: Array) -> Array:
    """ONNX LpNormalization; where the norm is 0, so is the result."""
    p = node.attrs["p"]
    norm = root(jnp.sum(jnp.abs(x) ** p, axis=axis_of(node.attrs["axis"], x.ndim), keepdims=True), p)
    return jnp.where(norm == 0, 0, x / jnp.where(norm == 0, 1, norm)).astype(x.dtype)


def lrn_pads(node: Node) -> tuple[int, int]:
    """How many channels before and after it each channel is normalized by."""
    before = (node.attrs["size"] - 1) // 2
    return before, node.attrs["size"] - 1 - before


def _lrn(node: Node, x: Array) -> Array:
    """ONNX LRN: divided by a power of the squares of the neighbouring channels."""
    size, other = node.attrs["size"], (0, 0)
    pads = (other, lrn_pads(node), *(other,) * (x.ndim - 2))
    window = (1, size, *(1,) * (x.ndim - 2))
    squares = jax.lax.reduce_window(x * x, np.zeros((), x.dtype), jax.lax.add, window, (1,) * x.ndim, pads)
    return (x / (node.attrs["bias"] + node.attrs["alpha"] / size * squares) ** node.attrs["beta"]).astype(x.dtype)


def _normalizer(node: Node, x: Array) -> Array:
    """ai.onnx.ml Normalizer."""
    norms = {
        "MAX": lambda a: jnp.max(a, axis=-1, keepdims=True),
        "L1": lambda a: jnp.sum(a, axis=-1, keepdims=True),
        "L2": lambda a: jnp.sqrt(jnp.sum(a * a, axis=-1, keepdims=True)),
    }
    x = x if is_float(x.dtype) else x.astype(np.float32)
    return x / jnp.maximum(norms[node.attrs["norm"]](jnp.abs(x)), 1e-30)


_ALONG: tuple[tuple[str, Kind, Callable[..., Array]], ...] = (
    ("Hardmax", Kind.CLIENT, _hardmax),
    ("LogSoftmax", Kind.COMPOSITE, jax.nn.log_softmax),
    ("Softmax", Kind.COMPOSITE, jax.nn.softmax),
)

register(
    *(Op(name, 7, kind, _over_rest(function)) for name, kind, function in _ALONG),
    *(Op(name, 13, kind, _over_axis(function)) for name, kind, function in _ALONG),
    Op("InstanceNormalization", 7, Kind.COMPOSITE, _instance_normalization),
    Op("LRN", 7, Kind.COMPOSITE, _lrn),
    Op("LayerNormalization", 17, Kind.COMPOSITE, _layer_normalization),
    Op("LpNormalization", 7, Kind.COMPOSITE, _lp_normalization),
    Op("Normalizer", 1, Kind.COMPOSITE, _normalizer, domain="ai.onnx.ml"),
)
