"""Reductions over axes, and the normalizations that are made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.graph import Node
from fheq.ops.arguments import axis_of, integers
from fheq.ops.table import Evaluate, Kind, Op, register

Array = Any
Reduce = Callable[[Array, tuple[int, ...], bool], Array]


def _axes_from(axes: Any, ndim: int, empty_means_none: bool) -> tuple[int, ...]:
    """Axes to reduce; absent or empty means all, or none for `noop_with_empty_axes`."""
    axes = () if axes is None else integers(axes)
    if not axes:
        return () if empty_means_none else tuple(range(ndim))
    return tuple(axis_of(axis, ndim) for axis in axes)


def _by_attribute(reduce: Reduce) -> Evaluate:
    """The older form of a reduction: axes are an attribute."""
    return lambda node, x: reduce(x, _axes_from(node.attrs.get("axes"), x.ndim, False), bool(node.attrs["keepdims"]))


def _by_input(reduce: Reduce) -> Evaluate:
    """The newer form of a reduction: axes are an optional input."""

    def evaluate(node: Node, x: Array, axes: np.ndarray | None = None) -> Array:
        chosen = _axes_from(axes, x.ndim, bool(node.attrs["noop_with_empty_axes"]))
        return reduce(x, chosen, bool(node.attrs["keepdims"]))

    return evaluate


def _sum(x: Array, axes: tuple[int, ...], keep: bool) -> Array:
    return jnp.sum(x, axis=axes, keepdims=keep, dtype=x.dtype)


def _extreme(function: Callable[..., Array], sign: int) -> Reduce:
    """Maximum (sign -1) or minimum (sign 1); of nothing, it is the infinity or the extreme integer."""

    def reduce(x: Array, axes: tuple[int, ...], keep: bool) -> Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            neutral: Any = sign * np.inf
        elif x.dtype == np.bool_:
            neutral = sign > 0
        else:
            neutral = jnp.iinfo(x.dtype).max if sign > 0 else jnp.iinfo(x.dtype).min
        return function(x, axis=axes, keepdims=keep, initial=neutral)

    return reduce


_max = _extreme(jnp.max, -1)
_min = _extreme(jnp.min, 1)


def _mean(x: Array, axes: tuple[int, ...], keep: bool) -> Array:
    return jnp.mean(x, axis=axes, keepdims=keep).astype(x.dtype)


def _log_sum_exp(x: Array, axes: tuple[int, ...], keep: bool) -> Array:
    top = jax.lax.stop_gradient(_max(x, axes, True))
    top = jnp.where(jnp.isfinite(top), top, 0)
    y = jnp.log(_sum(jnp.exp(x - top), axes, True)) + top
    return y if keep else jnp.squeeze(y, axis=axes)


# name, first opset with axes as an input, kind, function.
_REDUCTIONS: tuple[tuple[str, int, Kind, Reduce], ...] = (
    ("ReduceL1", 18, Kind.COMPOSITE, lambda x, axes, keep: _sum(jnp.abs(x), axes, keep)),
    ("ReduceL2", 18, Kind.COMPOSITE, lambda x, axes, keep: jnp.sqrt(_sum(x * x, axes, keep)).astype(x.dtype)),
    ("ReduceLogSum", 18, Kind.COMPOSITE, lambda x, axes, keep: jnp.log(_sum(x, axes, keep)).astype(x.dtype)),
    ("ReduceLogSumExp", 18, Kind.COMPOSITE, lambda x, axes, keep: _log_sum_exp(x, axes, keep).astype(x.dtype)),
    ("ReduceMax", 18, Kind.MAX, _max),
    ("ReduceMean", 18, Kind.LINEAR, _mean),
    ("ReduceMin", 18, Kind.MAX, _min),
    ("ReduceProd", 18, Kind.COMPOSITE, lambda x, axes, keep: jnp.prod(x, axis=axes, keepdims=keep, dtype=x.dtype)),
    ("ReduceSum", 13, Kind.LINEAR, _sum),
    ("ReduceSumSquare", 18, Kind.COMPOSITE, lambda x, axes, keep: _sum(x * x, axes, keep)),
)


def _index_of_extreme(find: Callable[..., Array]) -> Evaluate:
    """ONNX ArgMax or ArgMin."""

    def evaluate(node: Node, x: Array) -> Array:
        axis, keep = axis_of(node.attrs["axis"], x.ndim), bool(node.attrs["keepdims"])
        if node.attrs.get("select_last_index", 0):
            return x.shape[axis] - 1 - find(jnp.flip(x, axis), axis=axis, keepdims=keep)
        return find(x, axis=axis, keepdims=keep)

    return evaluate


def _cumsum(node: Node, x: Array, axis: np.ndarray) -> Array:
    """ONNX CumSum."""
    (given,) = integers(axis)
    along = axis_of(given, x.ndim)
    x = jnp.flip(x, along) if node.attrs["reverse"] else x
    if node.attrs["exclusive"]:
        shifts = [(1, -1, 0) if i == along else (0, 0, 0) for i in range(x.ndim)]
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), shifts)
    y = jnp.cumsum(x, axis=along, dtype=x.dtype)
    return jnp.flip(y, along) if node.attrs["reverse"] else y


def _over_axis(function: Callable[..., Array]) -> Evaluate:
    """Softmax and LogSoftmax since opset 13."""
    return lambda node, x: function(x, axis=axis_of(node.attrs["axis"], x.ndim))


def _over_rest(function: Callable[..., Array]) -> Evaluate:
    """Softmax and LogSoftmax before opset 13: over `axis` and all that follow."""
    return lambda node, x: function(x, axis=tuple(range(axis_of(node.attrs["axis"], x.ndim), x.ndim)))


def _layer_normalization(node: Node, x: Array, scale: Array, bias: Array | None = None) -> tuple[Array, ...]:
    """ONNX LayerNormalization: the result, the mean and the inverse standard deviation."""
    axes = tuple(range(axis_of(node.attrs["axis"], x.ndim), x.ndim))
    wide = x.astype(jnp.promote_types(x.dtype, np.float32)) if node.attrs["stash_type"] == 1 else x
    mean = jnp.mean(wide, axis=axes, keepdims=True)
    inverse = 1 / jnp.sqrt(jnp.mean((wide - mean) ** 2, axis=axes, keepdims=True) + node.attrs["epsilon"])
    y = ((wide - mean) * inverse).astype(x.dtype) * scale
    return (y if bias is None else y + bias, mean, inverse)[: len(node.outputs)]


def _normalizer(node: Node, x: Array) -> Array:
    """ai.onnx.ml Normalizer."""
    norms = {
        "MAX": lambda a: jnp.max(a, axis=-1, keepdims=True),
        "L1": lambda a: jnp.sum(a, axis=-1, keepdims=True),
        "L2": lambda a: jnp.sqrt(jnp.sum(a * a, axis=-1, keepdims=True)),
    }
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(np.float32)
    return x / jnp.maximum(norms[node.attrs["norm"]](jnp.abs(x)), 1e-30)


register(
    *(Op(name, 7, kind, _by_attribute(reduce)) for name, _, kind, reduce in _REDUCTIONS),
    *(Op(name, since, kind, _by_input(reduce), static=(1,)) for name, since, kind, reduce in _REDUCTIONS),
    Op("ArgMax", 7, Kind.CLIENT, _index_of_extreme(jnp.argmax)),
    Op("ArgMin", 7, Kind.CLIENT, _index_of_extreme(jnp.argmin)),
    Op("CumSum", 11, Kind.LINEAR, _cumsum, static=(1,)),
    Op("LayerNormalization", 17, Kind.COMPOSITE, _layer_normalization),
    Op("LogSoftmax", 7, Kind.COMPOSITE, _over_rest(jax.nn.log_softmax)),
    Op("LogSoftmax", 13, Kind.COMPOSITE, _over_axis(jax.nn.log_softmax)),
    Op("Softmax", 7, Kind.COMPOSITE, _over_rest(jax.nn.softmax)),
    Op("Softmax", 13, Kind.COMPOSITE, _over_axis(jax.nn.softmax)),
    Op("Normalizer", 1, Kind.COMPOSITE, _normalizer, domain="ai.onnx.ml"),
)
