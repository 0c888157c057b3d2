"""Divisions by computed tensors (rules of `fheq.rewriting.decompose`).

A product of two norms spans the square of what each of them does, and the steps of its quantizer would lose the small ones,
whose reciprocals are the largest. So 1 / (a b) is the product of 1 / a and 1 / b, and 1 / sqrt(a b) likewise.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from fheq.graph import Graph, Node, is_float
from fheq.ops.table import Kind, lookup
from fheq.origins import is_function_of_one
from fheq.rewriting.edit import CODES, Draft
from fheq.rewriting.primitives import scalar

GUARD = 1e-2
"""The largest bound of a factor that is taken for what keeps a denominator from 0, and not for a part of the function."""

_POSITIVE = ("Abs", "Exp", "ReduceL1", "ReduceL2", "ReduceSumSquare", "Relu", "Sigmoid", "Softplus", "Sqrt")
_OF_POSITIVE = ("Add", "Identity", "Max", "Mul", "ReduceMax", "ReduceMean", "ReduceSum")


@dataclass(frozen=True)
class Factored:
    """A denominator as a product: `f(a) f(b)`, where f is the root or nothing, and neither is less than `guard`."""

    factors: tuple[str, str]
    root: bool
    guard: float


def _division(draft: Draft, node: Node) -> bool:
    """a / b as a * (1 / b)."""
    a, b = node.inputs
    if draft.types[b].dtype.kind in "iu":
        return _of_integers(draft, node)
    if not draft.depends(b):
        return False
    out, found = node.outputs[0], _factored(draft.graph, b)
    is_one = a in draft.constants and np.all(draft.constants[a] == 1) and draft.types[out] == draft.types[b]
    if found is None and is_one:
        draft.apply(node, "Reciprocal", b, out=out)
    elif found is None:
        draft.apply(node, "Mul", a, draft.apply(node, "Reciprocal", b), out=out)
    else:
        first, second = _reciprocals(draft, node, found)
        if is_one:
            draft.apply(node, "Mul", first, second, out=out)
        elif draft.types[out].shape == draft.types[b].shape:  # one by one, which keeps the numbers between small
            draft.apply(node, "Mul", draft.apply(node, "Mul", a, first), second, out=out)
        else:
            draft.apply(node, "Mul", a, draft.apply(node, "Mul", first, second), out=out)
    return True


def _of_integers(draft: Draft, node: Node) -> bool:
    """The quotient of integers: that of real numbers, cut off toward 0. It is no linear function."""
    real = (draft.cast(node, name, np.float32) for name in node.inputs)
    kind = draft.types[node.outputs[0]].dtype
    draft.apply(node, "Cast", draft.apply(node, "Div", *real), to=CODES[kind], out=node.outputs[0])
    return True


def _reciprocal(draft: Draft, node: Node) -> bool:
    """1 / (a b) as (1 / a) (1 / b)."""
    found = _factored(draft.graph, node.inputs[0])
    if found is None:
        return False
    draft.apply(node, "Mul", *_reciprocals(draft, node, found), out=node.outputs[0])
    return True


def _reciprocals(draft: Draft, node: Node, found: Factored) -> list[str]:
    made = []
    for name in found.factors:
        name = draft.apply(node, "Sqrt", name) if found.root else name
        if found.guard:
            name = draft.apply(node, "Max", name, scalar(draft, node, "guard", found.guard, name))
        made.append(draft.apply(node, "Reciprocal", name))
    return made


def _factored(graph: Graph, name: str) -> Factored | None:
    """A tensor as the product that it is made from by a root and by guards, of two tensors that are not functions of one."""
    producers, root, guard = graph.producers(), False, 0.0
    while True:
        node = producers.get(name)
        if node is None or node.domain:
            return None
        if node.op == "Mul" and all(n not in graph.constants for n in node.inputs):
            break
        limit = _guard(graph, node)
        if node.op == "Sqrt" and not root:
            root, name = True, node.inputs[0]
        elif limit is not None:
            guard = max(guard, sqrt(sqrt(limit) if root else limit))
            name = next(n for n in node.inputs if n and n not in graph.constants)
        else:
            return None
    a, b = node.inputs
    if is_function_of_one(graph, (a, b), node.outputs[0]):
        return None
    positive = _is_positive(graph, a) and _is_positive(graph, b)
    return Factored((a, b), root, guard) if guard <= GUARD and (positive or not (root or guard)) else None


def _guard(graph: Graph, node: Node) -> float | None:
    """The constant that a node adds to a tensor, or does not let it fall below; None for any other node."""
    known = [graph.constants[n] for n in node.inputs[:2] if n in graph.constants]
    is_guard = node.op in ("Add", "Max") or (node.op == "Clip" and not any(node.inputs[2:]))
    if not is_guard or len(known) != 1 or len(node.inputs) < 2 or not np.all(known[0] >= 0):
        return None
    return float(np.max(known[0]))


def _is_positive(graph: Graph, name: str) -> bool:
    """Whether a tensor's operators tell that nothing of it is below 0."""
    if name in graph.constants:
        return bool(np.all(graph.constants[name] >= 0))
    node = graph.producers().get(name)
    if node is None or node.domain:
        return False
    if node.op in _POSITIVE or (node.op == "Mul" and node.inputs[0] == node.inputs[1]):
        return True
    if node.op == "Pow" and node.inputs[1] in graph.constants:
        return bool(np.all(graph.constants[node.inputs[1]] % 2 == 0))
    follows = node.op in _OF_POSITIVE or lookup(node).kind is Kind.MOVEMENT
    return follows and all(_is_positive(graph, n) for n in node.inputs if n and is_float(graph.types[n].dtype))


RULES = {"Div": _division, "Reciprocal": _reciprocal}
