"""Variances as means of squared deviations.

Frameworks make them as mean(x^2) - mean(x)^2, which saves a pass over floats. Integers lose the difference of two large
numbers, which may even come out below 0.
"""

from __future__ import annotations

import numpy as np

from fheq.graph import Node
from fheq.regions import RESHAPES
from fheq.rewriting.edit import Draft
from fheq.rewriting.primitives import known_axes, reduced, square

FLOAT = 1e-6  # relative error of a constant in float32


def centre_variance(draft: Draft, node: Node) -> bool:
    """mean(x^2) - mean(x)^2 as mean((x - mean(x))^2)."""
    squares, mean = _mean(draft, node.inputs[0]), _squared(draft, node.inputs[1])
    x = None if squares is None else _squared(draft, squares[0])
    if squares is None or x is None or mean is None or _mean(draft, mean) != (x, squares[1]):
        return False
    axes, shape = squares[1], draft.types[x].shape
    kept = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    deviation = draft.apply(node, "Sub", x, draft.reshape(node, mean, kept))
    variance = reduced(draft, node, "ReduceMean", square(draft, node, deviation), axes)
    draft.reshape(node, variance, draft.types[node.outputs[0]].shape, out=node.outputs[0])
    return True


def _mean(draft: Draft, name: str) -> tuple[str, tuple[int, ...]] | None:
    """What a tensor is the mean of, in whatever shape, and over which axes."""
    node = _maker(draft, name)
    if node is None or node.op == "ReduceMean":
        return _reduced(draft, node)
    total = _maker(draft, node.inputs[0]) if node.op in ("Div", "Mul") and node.inputs[1] in draft.constants else None
    found = _reduced(draft, total) if total is not None and total.op == "ReduceSum" else None
    if found is None:
        return None
    count = np.prod([draft.types[found[0]].shape[axis] for axis in found[1]])
    given = draft.constants[node.inputs[1]].astype(np.float64)
    ratio = given * count if node.op == "Mul" else given / count
    return found if np.all(np.abs(ratio - 1) <= FLOAT) else None


def _reduced(draft: Draft, node: Node | None) -> tuple[str, tuple[int, ...]] | None:
    """What a reduction reads, and its axes, where they are known."""
    axes = None if node is None else known_axes(draft, node)
    return None if node is None or axes is None else (node.inputs[0], axes)


def _squared(draft: Draft, name: str) -> str | None:
    """What a tensor is the square of."""
    node = _maker(draft, name)
    if node is None:
        return None
    twice = node.op == "Mul" and node.inputs[0] == node.inputs[1]
    power = node.op == "Pow" and np.all(draft.constants.get(node.inputs[1], 0) == 2)
    return node.inputs[0] if twice or power else None


def _maker(draft: Draft, name: str) -> Node | None:
    """The node that computes a tensor, before that is brought to another shape; None where it is quantized on the way."""
    producers = draft.graph.producers()
    node = producers.get(name)
    while node is not None and name not in draft.pinned and not node.domain:
        if node.op not in RESHAPES:
            return node
        name = node.inputs[0]
        node = producers.get(name)
    return None
