"""Reductions over axes, cumulative ones, and the places of extremes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.graph import Node, is_float
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


def axes_of(node: Node, rank: int, known: Mapping[str, np.ndarray]) -> tuple[int, ...] | None:
    """The axes that a Reduce node or a global pool of a tensor of some rank goes over; None where they are computed."""
    if node.op.startswith("Global"):
        return tuple(range(2, rank))
    axes = node.attrs.get("axes")
    if len(node.inputs) > 1 and node.inputs[1]:
        if node.inputs[1] not in known:
            return None
        axes = known[node.inputs[1]]
    return _axes_from(axes, rank, bool(node.attrs.get("noop_with_empty_axes", 0)))


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
        if is_float(x.dtype):
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


def _cumprod(node: Node, x: Array, axis: np.ndarray) -> Array:
    """ONNX CumProd."""
    (given,) = integers(axis)
    along = axis_of(given, x.ndim)
    x = jnp.flip(x, along) if node.attrs["reverse"] else x
    if node.attrs["exclusive"]:
        shifts = [(1, -1, 0) if i == along else (0, 0, 0) for i in range(x.ndim)]
        x = jax.lax.pad(x, jnp.ones((), x.dtype), shifts)
    y = jnp.cumprod(x, axis=along, dtype=x.dtype)
    return jnp.flip(y, along) if node.attrs["reverse"] else y


def top_k(node: Node, x: Array, k: int) -> tuple[Array, Array]:
    """ONNX TopK: values and indices, of equal values the first one first."""
    axis = axis_of(node.attrs["axis"], x.ndim)
    if not 0 <= k <= x.shape[axis]:
        raise ValueError(f"k is {k}, but the axis has {x.shape[axis]} elements")
    order = jnp.argsort(x, axis=axis, stable=True, descending=bool(node.attrs.get("largest", 1)))
    chosen = jax.lax.slice_in_dim(order, 0, k, axis=axis)
    return jnp.take_along_axis(x, chosen, axis=axis), chosen.astype(np.int64)


register(Op("Det", 11, Kind.COMPOSITE, lambda node, x: jnp.linalg.det(x)))
register(
    *(Op(name, 7, kind, _by_attribute(reduce)) for name, _, kind, reduce in _REDUCTIONS),
    *(Op(name, since, kind, _by_input(reduce), static=(1,)) for name, since, kind, reduce in _REDUCTIONS),
    Op("ArgMax", 7, Kind.CLIENT, _index_of_extreme(jnp.argmax)),
    Op("ArgMin", 7, Kind.CLIENT, _index_of_extreme(jnp.argmin)),
    Op("CumProd", 26, Kind.COMPOSITE, _cumprod, static=(1,)),
    Op("CumSum", 11, Kind.LINEAR, _cumsum, static=(1,)),
    Op("TopK", 7, Kind.CLIENT, lambda node, x: top_k(node, x, node.attrs["k"])),
    Op("TopK", 10, Kind.CLIENT, lambda node, x, k: top_k(node, x, *integers(k)), static=(1,)),
)
