"""Composite and two-operand operators on computed tensors as simple ones.

What is left is linear, univariate, movement, or one of Add, Sub, Mul, Max, Min and MatMul of two computed tensors.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np

from fheq.graph import Graph, Node, is_float
from fheq.ops.mappings import mapping_of
from fheq.origins import is_function_of_one
from fheq.rewriting import (
    distances,
    division,
    einsum,
    gather,
    matrices,
    normalizations,
    primitives,
    recurrent,
    scatter,
    selection,
)
from fheq.rewriting.edit import Draft

DOMAINS = ("", "ai.onnx.ml", "com.microsoft")
COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")


def decompose(graph: Graph) -> Graph:
    """The graph in simple operators; the same values up to rounding."""
    draft = Draft(graph, hook=_rewritten)
    for node in graph.nodes:
        draft.write(node)
    return draft.finish()


def _rewritten(draft: Draft, node: Node) -> bool:
    rule = RULES.get(node.op) if node.domain in DOMAINS else None
    return rule is not None and bool(node.outputs) and rule(draft, node)


def _is_float(draft: Draft, name: str) -> bool:
    return draft.types[name].dtype.kind not in "biu"


def _power(draft: Draft, node: Node) -> bool:
    """a ** b of two computed tensors, for a above 0: exp(b * log(a))."""
    a, b = node.inputs
    if not draft.depends(a, b):
        return False
    kind = draft.types[node.outputs[0]].dtype
    if not _is_float(draft, a):
        return False
    log = draft.apply(node, "Log", a)
    draft.apply(node, "Exp", draft.apply(node, "Mul", draft.cast(node, b, kind), log), out=node.outputs[0])
    return True


def _comparison(draft: Draft, node: Node) -> bool:
    """a < b as (a - b) < 0."""
    if not draft.depends(*node.inputs):
        return False
    kind = draft.types[node.inputs[0]].dtype
    if kind.kind in "bu":
        kind = np.dtype(np.int32 if kind.itemsize <= 2 else np.int64)
    a, b = (draft.cast(node, name, kind) for name in node.inputs)
    zero = draft.constant(f"{node.outputs[0]}/zero", 0, kind)
    draft.apply(node, node.op, draft.apply(node, "Sub", a, b), zero, out=node.outputs[0])
    return True


def _equality(draft: Draft, node: Node) -> bool:
    """a == b of two computed tensors; of a computed one with known values, up to half the distance between those.

    A quantized value need not be one of theirs: 3 may be 2.99 in the steps of its tensor, and is meant to equal 3.
    """
    if draft.depends(*node.inputs):
        return _comparison(draft, node)
    known = [i for i, name in enumerate(node.inputs) if name in draft.constants]
    if len(known) != 1 or not _is_float(draft, node.inputs[0]):
        return False
    inputs = list(node.inputs)
    snapped = _snapped(draft, node, inputs[1 - known[0]], draft.constants[inputs[known[0]]])
    if snapped is None:
        return False
    inputs[1 - known[0]] = snapped
    draft.nodes.append(replace(node, inputs=tuple(inputs)))
    return True


def _encoder(draft: Draft, node: Node) -> bool:
    """LabelEncoder of computed floats, with keys that they equal up to half the distance between those."""
    if not draft.depends(*node.inputs) or not _is_float(draft, node.inputs[0]):
        return False
    snapped = _snapped(draft, node, node.inputs[0], mapping_of(node)[0])
    if snapped is None:
        return False
    draft.nodes.append(replace(node, inputs=(snapped,)))
    return True


def _snapped(draft: Draft, node: Node, x: str, values: np.ndarray) -> str | None:
    """The tensor with what is next to one of several known values exchanged for it; None where they are too few."""
    finite = np.unique(values[np.isfinite(values)].astype(np.float64))
    if len(finite) < 2:
        return None
    out = draft.fresh(f"{node.outputs[0]}/Nearest")
    attrs = MappingProxyType({"values": tuple(finite.tolist())})
    draft.write(Node(f"{node.name or out}/Nearest", "Nearest", (x,), (out,), attrs, "fheq", 1))
    return out


def _logic(draft: Draft, node: Node) -> bool:
    """And, Or, Xor of two computed tensors through the sum of both as numbers."""
    if not draft.depends(*node.inputs):
        return False
    op, level = {"And": ("Greater", 1.5), "Or": ("Greater", 0.5), "Xor": ("Equal", 1.0)}[node.op]
    a, b = (draft.cast(node, name, np.dtype(np.float32)) for name in node.inputs)
    limit = draft.constant(f"{node.outputs[0]}/level", level, np.dtype(np.float32))
    draft.apply(node, op, draft.apply(node, "Add", a, b), limit, out=node.outputs[0])
    return True


def _where(draft: Draft, node: Node) -> bool:
    """A choice by a computed condition c: c * a + (1 - c) * b, one product where a or b is zero, b + c * (a - b) where one
    is known otherwise; nothing of these where all are functions of one tensor, as any function of it is one table. A known
    condition takes elements of both, where they are not functions of one tensor."""
    condition, a, b = node.inputs
    known = {name: draft.constants[name] for name in (a, b) if name in draft.constants}
    result, out = draft.types[node.outputs[0]], node.outputs[0]
    if is_function_of_one(draft.graph, [name for name in node.inputs if name not in draft.constants], out):
        return False
    if condition in draft.constants and not known:
        return _selected(draft, node)
    if not draft.depends(condition) or (a in known and b in known) or result.dtype.kind == "b":
        return False
    if any(not np.all(np.isfinite(value.astype(np.float64))) for value in known.values()):
        return False
    zero = next((name for name, value in known.items() if not np.any(value)), None)
    other = b if zero == a else a
    if zero is not None and np.broadcast_shapes(draft.types[condition].shape, draft.types[other].shape) == result.shape:
        chosen = draft.apply(node, "Not", condition) if zero == a else condition
        draft.apply(node, "Mul", draft.cast(node, chosen, result.dtype), other, out=out)
        return True
    if not known and is_float(result.dtype):
        otherwise = draft.cast(node, draft.apply(node, "Not", condition), result.dtype)
        _paired(draft, node, (a, b), (draft.cast(node, condition, result.dtype), otherwise), out)
        return True
    part = draft.apply(node, "Mul", draft.cast(node, condition, result.dtype), draft.apply(node, "Sub", a, b))
    draft.apply(node, "Add", b, part, out=out)
    return True


def _selected(draft: Draft, node: Node) -> bool:
    """The elements of two computed tensors that a known condition takes: a movement."""
    condition, *names = node.inputs
    out, shape = node.outputs[0], draft.types[node.outputs[0]].shape
    sizes = [int(np.prod(draft.types[name].shape)) for name in names]
    a, b = (np.broadcast_to(np.arange(n).reshape(draft.types[name].shape), shape) for n, name in zip(sizes, names))
    places = np.where(draft.constants[condition], a, sizes[0] + b)
    both = draft.apply(node, "Concat", *(draft.reshape(node, name, (1, -1)) for name in names), axis=1)
    draft.reshape(node, draft.pick(node, both, places), shape, out=out)
    return True


def _paired(draft: Draft, node: Node, xs: tuple[str, ...], ys: tuple[str, ...], out: str) -> None:
    """The sum of the products of tensors, pair by pair, as one contraction: its terms are summed before any table."""
    shape = draft.types[node.outputs[0]].shape
    target, last = (
        draft.constant(f"{out}/{label}", v, np.dtype(np.int64)) for label, v in (("shape", shape), ("last", [-1]))
    )
    sides = []
    for names, axis in ((xs, -2), (ys, -1)):
        wide = [name if draft.types[name].shape == shape else draft.apply(node, "Expand", name, target) for name in names]
        side = draft.apply(node, "Concat", *(draft.apply(node, "Unsqueeze", name, last) for name in wide), axis=-1)
        sides.append(draft.apply(node, "Unsqueeze", side, draft.constant(f"{out}/axis", [axis], np.dtype(np.int64))))
    both = draft.constant(f"{out}/axes", [-2, -1], np.dtype(np.int64))
    draft.apply(node, "Squeeze", draft.apply(node, "MatMul", *sides), both, out=out)


def _chain(draft: Draft, node: Node) -> bool:
    """Max, Min and sums of several tensors, two at a time; but a sum of three or more computed ones is one reduction."""
    if len(node.inputs) < 2 or (len(node.inputs) == 2 and node.op in ("Max", "Min")):
        return False
    computed = [name for name in node.inputs if name not in draft.constants]
    if node.op in ("Sum", "Mean") and len(computed) > 2 and _is_float(draft, node.outputs[0]):
        known = [name for name in node.inputs if name in draft.constants]
        total = _stacked_sum(draft, node, computed, out="" if known or node.op == "Mean" else node.outputs[0])
        names = [total, *known]
    else:
        names = list(node.inputs)
    op = {"Sum": "Add", "Mean": "Add"}.get(node.op, node.op)
    total, last = names[0], len(names) - 1
    for index, name in enumerate(names[1:], 1):
        out = node.outputs[0] if index == last and node.op != "Mean" else ""
        total = draft.apply(node, op, total, name, out=out)
    if node.op == "Mean":
        share = draft.constant(f"{node.outputs[0]}/share", 1 / len(node.inputs), draft.types[total].dtype)
        draft.apply(node, "Mul", total, share, out=node.outputs[0])
    return True


def _stacked_sum(draft: Draft, node: Node, names: list[str], out: str) -> str:
    """The sum of tensors, side by side on a new axis: one accumulator, where sums of two need a table in between."""
    shape = np.broadcast_shapes(*(draft.types[name].shape for name in names))
    target = draft.constant(f"{node.outputs[0]}/shape", shape, np.dtype(np.int64))
    first = draft.constant(f"{node.outputs[0]}/first", [0], np.dtype(np.int64))
    wide = [name if draft.types[name].shape == shape else draft.apply(node, "Expand", name, target) for name in names]
    stacked = draft.apply(node, "Concat", *(draft.apply(node, "Unsqueeze", name, first) for name in wide), axis=0)
    return draft.apply(node, "ReduceSum", stacked, first, out=out, keepdims=0, noop_with_empty_axes=0)


def _clip(draft: Draft, node: Node) -> bool:
    """Clip with a computed bound."""
    bounds = [(op, name) for op, name in zip(("Max", "Min"), node.inputs[1:]) if name]
    if all(name in draft.constants for _, name in bounds):
        return False
    value = node.inputs[0]
    for index, (op, name) in enumerate(bounds):
        value = draft.apply(node, op, value, name, out=node.outputs[0] if index == len(bounds) - 1 else "")
    return True


def _prelu(draft: Draft, node: Node) -> bool:
    """PRelu with a computed slope: relu(x) - slope * relu(-x)."""
    if not draft.depends(*node.inputs):
        return False
    x, slope = node.inputs
    below = draft.apply(node, "Relu", draft.apply(node, "Neg", x))
    draft.apply(node, "Sub", draft.apply(node, "Relu", x), draft.apply(node, "Mul", slope, below), out=node.outputs[0])
    return True


RULES = {
    **dict.fromkeys(COMPARISONS, _comparison),
    "Equal": _equality,
    **dict.fromkeys(("CategoryMapper", "LabelEncoder"), _encoder),
    **dict.fromkeys(("And", "Or", "Xor"), _logic),
    **dict.fromkeys(("Sum", "Mean", "Max", "Min"), _chain),
    "Clip": _clip,
    "PRelu": _prelu,
    "Pow": _power,
    "Where": _where,
    **distances.RULES,
    **division.RULES,
    **einsum.RULES,
    **gather.RULES,
    **matrices.RULES,
    **normalizations.RULES,
    **primitives.RULES,
    **recurrent.RULES,
    **scatter.RULES,
    **selection.RULES,
}
