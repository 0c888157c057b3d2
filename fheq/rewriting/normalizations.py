"""Softmax, norms and normalizations in simple operators (rules of `fheq.rewriting.decompose`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fheq.graph import Node, is_float
from fheq.ops.normalizations import lrn_pads
from fheq.ops.windows import covered, window_of
from fheq.rewriting.edit import Draft
from fheq.rewriting.masks import bounded, masked
from fheq.rewriting.primitives import log_sum_exp, reduced, scalar, square

INT64 = np.dtype(np.int64)


def _softmax(draft: Draft, node: Node) -> bool:
    """Softmax as exp(x - t) and LogSoftmax as x - t, where t = log(sum(exp(x))); before opset 13 over `axis` and all that
    follow.

    Without a product of encrypted tensors: exp(x) / sum(exp(x)) takes two tables more for each element.
    """
    x, out, rank = node.inputs[0], node.outputs[0], len(draft.types[node.inputs[0]].shape)
    axis = node.attrs["axis"] % rank if rank else 0
    axes = (axis,) if node.version >= 13 else tuple(range(axis, rank))
    if node.op == "LogSoftmax":
        draft.apply(node, "Sub", x, log_sum_exp(draft, node, x, axes), out=out)
        return True
    mask = masked(draft, node, axes)
    if mask is None:
        x = bounded(draft, node, x)
        draft.apply(node, "Exp", draft.apply(node, "Sub", x, log_sum_exp(draft, node, x, axes)), out=out)
    else:
        total = log_sum_exp(draft, node, mask.x, axes, kept=mask.kept)
        power = draft.apply(node, "Exp", draft.apply(node, "Sub", mask.x, total))
        draft.apply(node, "Mul", power, mask.kept, out=out)
    return True


def _standardized(
    draft: Draft, node: Node, x: str, axes: Sequence[int], mean_out: str = "", inverse_out: str = ""
) -> tuple[str, str]:
    """The deviations from the mean over axes, and the inverse of their root mean square."""
    mean = reduced(draft, node, "ReduceMean", x, axes, out=mean_out)
    centred = draft.apply(node, "Sub", x, mean)
    variance = reduced(draft, node, "ReduceMean", square(draft, node, centred), axes)
    epsilon = scalar(draft, node, "epsilon", node.attrs["epsilon"], variance)
    root = draft.apply(node, "Sqrt", draft.apply(node, "Add", variance, epsilon))
    return centred, draft.apply(node, "Reciprocal", root, out=inverse_out)


def _scaled(draft: Draft, node: Node, parts: tuple[str, str], scale: str, bias: str) -> None:
    value = draft.apply(node, "Mul", draft.apply(node, "Mul", *parts), scale, out="" if bias else node.outputs[0])
    if bias:
        draft.apply(node, "Add", value, bias, out=node.outputs[0])


def _layer_normalization(draft: Draft, node: Node) -> bool:
    rank = len(draft.types[node.inputs[0]].shape)
    axes = tuple(range(node.attrs["axis"] % rank, rank))
    parts = _standardized(draft, node, node.inputs[0], axes, *(*node.outputs[1:], "", "")[:2])
    _scaled(draft, node, parts, node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else "")
    return True


def _instance_normalization(draft: Draft, node: Node) -> bool:
    rank = len(draft.types[node.inputs[0]].shape)
    column = draft.constant(f"{node.outputs[0]}/column", [-1, *[1] * (rank - 2)], INT64)
    scale, bias = (draft.apply(node, "Reshape", name, column, allowzero=0) for name in node.inputs[1:3])
    _scaled(draft, node, _standardized(draft, node, node.inputs[0], range(2, rank)), scale, bias)
    return True


def _powers(draft: Draft, node: Node, x: str) -> str:
    """|x| ** p"""
    p = node.attrs["p"]
    if p == 2:
        return square(draft, node, x)
    size = draft.apply(node, "Abs", x)
    return size if p == 1 else draft.apply(node, "Pow", size, scalar(draft, node, "p", p, x))


def _rooted(draft: Draft, node: Node, total: str, out: str = "") -> str:
    """The p-th root."""
    p = node.attrs["p"]
    if p == 1:
        return draft.apply(node, "Identity", total, out=out) if out else total
    if p == 2:
        return draft.apply(node, "Sqrt", total, out=out)
    return draft.apply(node, "Pow", total, scalar(draft, node, "share", 1 / p, total), out=out)


def _lp_normalization(draft: Draft, node: Node) -> bool:
    """x / norm, and 0 where the norm is 0."""
    x = node.inputs[0]
    axis = node.attrs["axis"] % len(draft.types[x].shape)
    norm = _rooted(draft, node, reduced(draft, node, "ReduceSum", _powers(draft, node, x), [axis]))
    none = draft.apply(node, "Equal", norm, scalar(draft, node, "zero", 0, norm))
    one = scalar(draft, node, "one", 1, norm)
    inverse = draft.apply(node, "Reciprocal", draft.apply(node, "Where", none, one, norm))
    draft.apply(node, "Mul", x, inverse, out=node.outputs[0])
    return True


def _normalizer(draft: Draft, node: Node) -> bool:
    """ai.onnx.ml Normalizer: the input over its norm along the last axis."""
    x, axes = node.inputs[0], (len(draft.types[node.inputs[0]].shape) - 1,)
    if not is_float(draft.types[x].dtype):
        x = draft.apply(node, "Cast", x, to=1)
    if node.attrs["norm"] == "L2":
        norm = draft.apply(node, "Sqrt", reduced(draft, node, "ReduceSum", square(draft, node, x), axes))
    else:
        reduction = {"L1": "ReduceSum", "MAX": "ReduceMax"}[node.attrs["norm"]]
        norm = reduced(draft, node, reduction, draft.apply(node, "Abs", x), axes)
    norm = draft.apply(node, "Max", norm, scalar(draft, node, "least", 1e-30, norm))
    draft.apply(node, "Mul", x, draft.apply(node, "Reciprocal", norm), out=node.outputs[0])
    return True


def _global_lp_pool(draft: Draft, node: Node) -> bool:
    x = node.inputs[0]
    axes = range(2, len(draft.types[x].shape))
    _rooted(draft, node, reduced(draft, node, "ReduceSum", _powers(draft, node, x), axes), out=node.outputs[0])
    return True


def _lp_pool(draft: Draft, node: Node) -> bool:
    """An average pool of powers, times the number of places that it averages."""
    x, shape = node.inputs[0], draft.types[node.inputs[0]].shape
    window = window_of(node, shape[2:], node.attrs["kernel_shape"])
    pool = {
        name: node.attrs[name] for name in ("auto_pad", "ceil_mode", "dilations", "pads", "strides") if name in node.attrs
    }
    average = draft.apply(
        node, "AveragePool", _powers(draft, node, x), kernel_shape=window.kernel, count_include_pad=1, **pool
    )
    count = draft.constant(f"{node.outputs[0]}/count", covered(window, shape[2:], True), draft.types[x].dtype)
    _rooted(draft, node, draft.apply(node, "Mul", average, count), out=node.outputs[0])
    return True


def _lrn(draft: Draft, node: Node) -> bool:
    """x * (bias + alpha * average of the squares of neighbouring channels) ** -beta."""
    x, shape = node.inputs[0], draft.types[node.inputs[0]].shape
    flat, back = (
        draft.constant(f"{node.outputs[0]}/shape", v, INT64)
        for v in ((shape[0], 1, shape[1], int(np.prod(shape[2:]))), shape)
    )
    squares = draft.apply(node, "Reshape", square(draft, node, x), flat, allowzero=0)
    before, after = lrn_pads(node)
    average = draft.apply(
        node,
        "AveragePool",
        squares,
        kernel_shape=(node.attrs["size"], 1),
        pads=(before, 0, after, 0),
        count_include_pad=1,
    )
    average = draft.apply(node, "Reshape", average, back, allowzero=0)
    alpha, bias, power = (
        scalar(draft, node, label, value, x)
        for label, value in (("alpha", node.attrs["alpha"]), ("bias", node.attrs["bias"]), ("power", -node.attrs["beta"]))
    )
    size = draft.apply(node, "Add", draft.apply(node, "Mul", average, alpha), bias)
    draft.apply(node, "Mul", x, draft.apply(node, "Pow", size, power), out=node.outputs[0])
    return True


RULES = {
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    "GlobalLpPool": _global_lp_pool,
    "InstanceNormalization": _instance_normalization,
    "LRN": _lrn,
    "LayerNormalization": _layer_normalization,
    "LpNormalization": _lp_normalization,
    "LpPool": _lp_pool,
    "Normalizer": _normalizer,
}
