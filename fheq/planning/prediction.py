"""How many tables a model will apply, for which of its nodes, and how long its sums are, from its plan alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from fheq.graph import Node
from fheq.origins import is_boolean
from fheq.planning.plan import Plan
from fheq.steps import Linear, Maximum, Product, Step, Sum


def predicted_tables(layout: Plan) -> Mapping[str, int]:
    """Table applications of one sample by what they are for: "activations", "products" and "maxima".

    An activation takes one for each element, a product of encrypted numbers two squares, or one table where a factor is 0 or
    1, a maximum one less than it has operands. Lowering may find some of them twice and apply them once.
    """
    counts = Counter({"activations": 0, "products": 0, "maxima": 0})
    for kind, _, count in _applications(layout):
        counts[kind] += count
    return counts


def tables_by_node(layout: Plan, nodes: Iterable[Node]) -> list[tuple[Node, int]]:
    """The nodes of a model that take tables, with their applications for one sample, most first.

    A table is its node's whose result it makes, or a part of it: those are named after it.
    """
    owners = {name: node for node in nodes for name in (node.name, *node.outputs) if name}
    counts: Counter[int] = Counter()
    found: dict[int, Node] = {}
    for _, tensor, count in _applications(layout):
        while tensor and tensor not in owners:
            tensor = tensor.rpartition("/")[0]
        if tensor:
            node = owners[tensor]
            found[id(node)] = node
            counts[id(node)] += count
    return [(found[key], count) for key, count in counts.most_common() if count]


def _applications(layout: Plan) -> Iterator[tuple[str, str, int]]:
    """Kind, tensor and number of table applications."""
    for point in (p for p in layout.points if p not in layout.encoded_ahead):
        yield "activations", point, int(np.sum(layout.regions[point].elements >= 0))
    for step in layout.steps:
        if isinstance(step, Product):
            yield "products", step.out, (1 if _chooses(layout, step) else 2) * math.prod(step.operands[0].shape)
        elif isinstance(step, Maximum):
            yield "maxima", step.out, math.prod(step.shape) * (sum(x.shape[-1] for x in step.xs) - 1)


def _chooses(layout: Plan, step: Product) -> bool:
    return any(is_boolean(layout.graph, operand.key) for operand in step.operands)


def largest_sum(layout: Plan) -> int:
    """The number of terms of the longest sum; 0 without any."""
    return max((_terms(step) for step in layout.steps), default=0)


def _terms(step: Step) -> int:
    if isinstance(step, Linear):
        return step.weight[0].size if step.form == "conv" else step.weight.shape[-2 if step.form == "matmul" else -1]
    if isinstance(step, Sum) or (isinstance(step, Product) and step.contract):
        return step.operands[0].shape[-1]
    return 0
