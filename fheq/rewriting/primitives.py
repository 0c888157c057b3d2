"""Reductions and lone quantizers written with simple operators (rules of `fheq.rewriting.decompose`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, combinations

import numpy as np

from fheq.errors import UnsupportedError
from fheq.graph import Graph, Node, describe
from fheq.ops.reductions import axes_of
from fheq.ops.table import Kind, lookup
from fheq.rewriting.edit import CODES, VERSION, Draft

LARGEST_PRODUCT = 64
LARGEST_DETERMINANT = 5


def reduced(draft: Draft, node: Node, op: str, x: str, axes: Sequence[int], keep: bool = True, out: str = "") -> str:
    """A reduction (ReduceSum, ReduceMean, ReduceMax) over known axes."""
    if not axes:
        return draft.apply(node, "Identity", x, out=out)
    name = draft.constant(f"{node.outputs[0]}/axes", sorted(axes), np.dtype(np.int64))
    return draft.apply(node, op, x, name, out=out, keepdims=int(keep), noop_with_empty_axes=0)


def scalar(draft: Draft, node: Node, label: str, value: float, like: str) -> str:
    return draft.constant(f"{node.outputs[0]}/{label}", value, draft.types[like].dtype)


def known_axes(draft: Draft, node: Node) -> tuple[int, ...] | None:
    """The axes of a Reduce node; None when they are not known."""
    return axes_of(node, len(draft.types[node.inputs[0]].shape), draft.constants)


def square(draft: Draft, node: Node, x: str) -> str:
    return draft.apply(node, "Mul", x, x)


def log_sum_exp(
    draft: Draft, node: Node, x: str, axes: Sequence[int], keep: bool = True, out: str = "", kept: str = ""
) -> str:
    """m + log(sum(exp(x - m))) for the maximum m: without it the powers of one row are all tiny where another's are not.

    Args:
        keep: whether the reduced axes stay.
        kept: a tensor that multiplies the powers; "" for 1.
    """
    top = reduced(draft, node, "ReduceMax", x, axes)
    powers = draft.apply(node, "Exp", draft.apply(node, "Sub", x, top))
    powers = draft.apply(node, "Mul", powers, kept) if kept else powers
    rest = draft.apply(node, "Log", reduced(draft, node, "ReduceSum", powers, axes, keep))
    if not keep:
        shape = draft.constant(f"{node.outputs[0]}/shape", draft.types[rest].shape, np.dtype(np.int64))
        top = draft.apply(node, "Reshape", top, shape, allowzero=1)
    return draft.apply(node, "Add", rest, top, out=out)


def _reduction(draft: Draft, node: Node) -> bool:
    """ReduceL1, L2, LogSum, LogSumExp, SumSquare: an elementwise op, ReduceSum, an elementwise op."""
    axes = known_axes(draft, node)
    if axes is None:
        return False
    x, out, keep = node.inputs[0], node.outputs[0], bool(node.attrs["keepdims"])
    if node.op == "ReduceLogSumExp":
        log_sum_exp(draft, node, x, axes, keep, out)
        return True
    if node.op == "ReduceL1":
        before = draft.apply(node, "Abs", x)
    elif node.op == "ReduceLogSum":
        before = x
    else:
        before = square(draft, node, x)
    after = {"ReduceL2": "Sqrt", "ReduceLogSum": "Log"}.get(node.op, "")
    total = reduced(draft, node, "ReduceSum", before, axes, keep, out="" if after else out)
    if after:
        draft.apply(node, after, total, out=out)
    return True


def _part(draft: Draft, node: Node, x: str, axis: int, index: int) -> str:
    """One place of an axis, which stays with size 1."""
    bounds = [
        draft.constant(f"{node.outputs[0]}/{n}", [v], np.dtype(np.int64))
        for n, v in (("from", index), ("to", index + 1), ("axis", axis))
    ]
    return draft.apply(node, "Slice", x, *bounds)


def _product(draft: Draft, node: Node) -> bool:
    """ReduceProd: slices multiplied one by one."""
    axes, shape = known_axes(draft, node), draft.types[node.inputs[0]].shape
    if axes is None or any(not 1 <= shape[a] <= LARGEST_PRODUCT for a in axes):
        return False
    value = node.inputs[0]
    for axis in axes:
        parts = [_part(draft, node, value, axis, index) for index in range(shape[axis])]
        value = parts[0]
        for part in parts[1:]:
            value = draft.apply(node, "Mul", value, part)
    target = draft.constant(f"{node.outputs[0]}/shape", draft.types[node.outputs[0]].shape, np.dtype(np.int64))
    draft.apply(node, "Reshape", value, target, out=node.outputs[0], allowzero=0)
    return True


def _cumulative_product(draft: Draft, node: Node) -> bool:
    """CumProd: slices multiplied one by one."""
    x, shape = node.inputs[0], draft.types[node.inputs[0]].shape
    axis = int(draft.constants[node.inputs[1]].reshape(())) % len(shape)
    if not 1 <= shape[axis] <= LARGEST_PRODUCT:
        return False
    order = range(shape[axis])[:: -1 if node.attrs["reverse"] else 1]
    parts = [_part(draft, node, x, axis, index) for index in order]
    if node.attrs["exclusive"]:
        one = np.ones([1 if i == axis else d for i, d in enumerate(shape)])
        parts = [draft.constant(f"{node.outputs[0]}/one", one, draft.types[x].dtype), *parts[:-1]]
    products = list(accumulate(parts, lambda a, b: draft.apply(node, "Mul", a, b)))
    products = products[:: -1 if node.attrs["reverse"] else 1]
    draft.apply(node, "Concat", *products, out=node.outputs[0], axis=axis)
    return True


def _determinant(draft: Draft, node: Node) -> bool:
    """Det of small matrices by Laplace's expansion: n 2^(n-1) products, each minor of the first rows being made once."""
    x, shape = node.inputs[0], draft.types[node.inputs[0]].shape
    rank, size = len(shape), shape[-1]
    if not 1 <= size <= LARGEST_DETERMINANT:
        raise UnsupportedError(
            f"{describe(node)}: the determinant of an encrypted matrix of {size} rows takes {size} * 2^{size - 1} products; "
            f"use one of up to {LARGEST_DETERMINANT} rows, or compute it after decryption"
        )
    minors: dict[tuple[int, ...], str] = {(): ""}
    for row in range(size):
        line = _part(draft, node, x, rank - 2, row)
        entries = [_part(draft, node, line, rank - 1, column) for column in range(size)]
        larger: dict[tuple[int, ...], str] = {}
        for columns in combinations(range(size), row + 1):
            for place, column in enumerate(columns):
                rest = minors[tuple(c for c in columns if c != column)]
                term = draft.apply(node, "Mul", entries[column], rest) if rest else entries[column]
                op = "Add" if (row + place) % 2 == 0 else "Sub"
                if columns in larger:
                    larger[columns] = draft.apply(node, op, larger[columns], term)
                else:
                    larger[columns] = term if op == "Add" else draft.apply(node, "Neg", term)
        minors = larger
    draft.reshape(node, minors[tuple(range(size))], draft.types[node.outputs[0]].shape, out=node.outputs[0])
    return True


def _imputer(draft: Draft, node: Node) -> bool:
    """Imputer: the identity for NaN, where the client puts the values in (`fheq.client.imputation`); else a choice."""
    x, out, kind = node.inputs[0], node.outputs[0], draft.types[node.inputs[0]].dtype
    values, replaced = imputed(node)
    if np.isnan(replaced) and _is_moved_input(draft.graph, x):
        draft.apply(node, "Identity", x, out=out)
        return True
    missing = (
        draft.apply(node, "IsNaN", x)
        if np.isnan(replaced)
        else draft.apply(node, "Equal", x, draft.constant(f"{out}/replaced", replaced, kind))
    )
    chosen = draft.constant(f"{out}/imputed", values, kind)
    # Not as a product, which the rule for Where makes of it: a missing value times 0 is missing still.
    draft.nodes.append(replace(node, op="Where", inputs=(missing, chosen, x), attrs={}, domain="", version=VERSION))
    return True


def _is_moved_input(graph: Graph, name: str) -> bool:
    """Whether a tensor holds nothing but elements of inputs and known ones."""
    if name in {port.name for port in graph.inputs} or name in graph.constants:
        return True
    node = graph.producers().get(name)
    if node is None or lookup(node).kind is not Kind.MOVEMENT:
        return False
    return all(_is_moved_input(graph, source) for source in node.inputs if source)


def imputed(node: Node) -> tuple[np.ndarray, float]:
    """The values of an Imputer, per feature or one for all, and what they stand in for."""
    attrs = node.attrs
    if attrs.get("imputed_value_floats"):
        return np.asarray(attrs["imputed_value_floats"]), attrs.get("replaced_value_float", 0.0)
    return np.asarray(attrs.get("imputed_value_int64s") or (0,)), attrs.get("replaced_value_int64", 0)


def _parameter(draft: Draft, node: Node, position: int) -> np.ndarray | None:
    """A known scale or zero point in a shape that broadcasts; None where it is computed or per block."""
    if position >= len(node.inputs) or not node.inputs[position]:
        return np.zeros(())
    value, rank = draft.constants.get(node.inputs[position]), len(draft.types[node.inputs[0]].shape)
    if value is None or node.attrs.get("block_size", 0):
        return None
    value = value.astype(np.float64)
    if value.size == 1:
        return value.reshape(())
    return value.reshape((-1,) + (1,) * (rank - node.attrs.get("axis", 1) % rank - 1))


def _quantize_linear(draft: Draft, node: Node) -> bool:
    """A QuantizeLinear that no DequantizeLinear follows."""
    scale, zero_point = (_parameter(draft, node, i) for i in (1, 2))
    dtype = draft.types[node.outputs[0]].dtype
    if scale is None or zero_point is None or dtype not in CODES:
        return False
    x, real, limits = node.inputs[0], draft.types[node.inputs[0]].dtype, np.iinfo(dtype)
    names = {
        label: draft.constant(f"{node.outputs[0]}/{label}", value, real)
        for label, value in (("scale", scale), ("zero", zero_point), ("low", limits.min), ("high", limits.max))
    }
    steps = draft.apply(node, "Round", draft.apply(node, "Div", x, names["scale"]))
    q = draft.apply(node, "Clip", draft.apply(node, "Add", steps, names["zero"]), names["low"], names["high"])
    draft.apply(node, "Cast", q, out=node.outputs[0], to=CODES[dtype])
    return True


def _dequantize_linear(draft: Draft, node: Node) -> bool:
    """A DequantizeLinear of computed integers that no QuantizeLinear gives."""
    scale, zero_point = (_parameter(draft, node, i) for i in (1, 2))
    if scale is None or zero_point is None:
        return False
    real = draft.types[node.outputs[0]].dtype
    factor, zero = (
        draft.constant(f"{node.outputs[0]}/{label}", value, real)
        for label, value in (("scale", scale), ("zero", zero_point))
    )
    value = draft.apply(node, "Cast", node.inputs[0], to=CODES[real])
    draft.apply(node, "Mul", draft.apply(node, "Sub", value, zero), factor, out=node.outputs[0])
    return True


RULES = {
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"), _reduction),
    "CumProd": _cumulative_product,
    "Det": _determinant,
    "DequantizeLinear": _dequantize_linear,
    "Imputer": _imputer,
    "QuantizeLinear": _quantize_linear,
    "ReduceProd": _product,
}
