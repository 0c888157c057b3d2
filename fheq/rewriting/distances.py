"""CDist and Solve in simple operators (rules of `fheq.rewriting.decompose`).

Euclidean distances to known points take a table per feature and a product: `|x - v|^2 = |x|^2 - 2 x v + |v|^2`. All others
take a table for each feature of each pair of points.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fheq.graph import Node
from fheq.ops.distances import metric_of
from fheq.ops.table import Kind, lookup
from fheq.rewriting.edit import Draft
from fheq.rewriting.primitives import reduced, scalar

INT64 = np.dtype(np.int64)


def squared_distances(draft: Draft, node: Node, x: str, points: np.ndarray, factor: float = 1.0, out: str = "") -> str:
    """Squared Euclidean distances `(N, M)` of rows `(N, F)` to known points `(M, F)`, times a factor."""
    base, kind = node.outputs[0] or node.outputs[-1], draft.types[x].dtype
    centre = points.mean(axis=0)  # small numbers lose less to rounding
    x = draft.apply(node, "Sub", x, draft.constant(f"{base}/centre", centre, kind))
    both = draft.apply(node, "Concat", x, draft.apply(node, "Mul", x, x), axis=1)
    points = points - centre
    weight = factor * np.concatenate([-2 * points.T, np.ones_like(points.T)])
    product = draft.apply(node, "MatMul", both, draft.constant(f"{base}/weight", weight, kind))
    offset = draft.constant(f"{base}/norms", factor * np.sum(points**2, axis=1), kind)
    return draft.apply(node, "Add", product, offset, out=out)


def _cdist(draft: Draft, node: Node) -> bool:
    a, b, out = *node.inputs, node.outputs[0]
    metric, power = metric_of(node)
    if metric == "cosine":
        a, b = (draft.apply(node, "LpNormalization", name, axis=1, p=2) for name in (a, b))
        likeness = draft.apply(node, "MatMul", a, draft.apply(node, "Transpose", b, perm=(1, 0)))
        draft.apply(node, "Sub", scalar(draft, node, "one", 1, likeness), likeness, out=out)
        return True
    if power == 2 and b in draft.constants:
        points = draft.constants[b].astype(np.float64)
        if metric == "sqeuclidean" and not _rooted(draft.graph.consumers(), out):
            squared_distances(draft, node, a, points, out=out)
            return True
        squares = squared_distances(draft, node, a, points)  # below 0 by rounding only
        positive = draft.apply(node, "Relu", squares, out=out if metric == "sqeuclidean" else "")
        if metric != "sqeuclidean":
            draft.apply(node, "Sqrt", positive, out=out)
        return True
    wide = [
        draft.apply(node, "Unsqueeze", name, draft.constant(f"{out}/axis", [axis], INT64)) for name, axis in ((a, 1), (b, 0))
    ]
    apart = draft.apply(node, "Sub", *wide)
    if metric == "chebyshev":
        reduced(draft, node, "ReduceMax", draft.apply(node, "Abs", apart), (2,), keep=False, out=out)
        return True
    if power == 2:
        powers = draft.apply(node, "Mul", apart, apart)
    else:
        powers = draft.apply(node, "Abs", apart)
        powers = powers if power == 1 else draft.apply(node, "Pow", powers, scalar(draft, node, "power", power, powers))
    last = metric == "sqeuclidean" or power == 1
    total = reduced(draft, node, "ReduceSum", powers, (2,), keep=False, out=out if last else "")
    if not last and power == 2:
        draft.apply(node, "Sqrt", total, out=out)
    elif not last:
        draft.apply(node, "Pow", total, scalar(draft, node, "root", 1 / power, total), out=out)
    return True


def _rooted(consumers: Mapping[str, list[Node]], name: str) -> bool:
    """Whether a root or a logarithm is taken of a tensor, as it is or moved."""
    readers = consumers.get(name, [])
    moved = [out for node in readers if lookup(node).kind is Kind.MOVEMENT for out in node.outputs if out]
    return any(node.op in ("Sqrt", "Pow", "Log") for node in readers) or any(_rooted(consumers, out) for out in moved)


def _solve(draft: Draft, node: Node) -> bool:
    """Solve by a known matrix, as the product with its inverse."""
    matrix, y = node.inputs
    if matrix not in draft.constants:
        return False
    inverse = np.linalg.inv(draft.constants[matrix].astype(np.float64))
    name = draft.constant(f"{node.outputs[0]}/inverse", inverse, draft.types[y].dtype)
    draft.apply(node, "MatMul", name, y, out=node.outputs[0])
    return True


RULES = {"CDist": _cdist, "Solve": _solve}
