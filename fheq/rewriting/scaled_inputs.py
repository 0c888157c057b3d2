"""Known multiples of inputs in sums that are decrypted, as products with weights.

Integers of an input stand for multiples of one step; those of a multiple of it would take a table. As accumulators of
weights, sums bring them together with the rest.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fheq.graph import Graph, Node
from fheq.ops.table import Kind, lookup
from fheq.rewriting.affine_regions import Search, elementwise_map
from fheq.rewriting.edit import Draft


def weigh_inputs(graph: Graph) -> Graph:
    """The graph with the weights of inputs in sums for the output alone; tables read the sums of such products, which are
    wide, at a higher price than those of multiples."""
    search, draft = Search(graph), Draft(graph)
    decrypted = search.decrypted()
    for node in graph.nodes:
        if _is_sum(search, node) and all(name in decrypted for name in node.outputs):
            node = replace(node, inputs=tuple(_weighed(search, draft, node, name) for name in node.inputs))
        draft.write(node)
    return draft.finish() if len(draft.nodes) > len(graph.nodes) else graph


def _is_sum(search: Search, node: Node) -> bool:
    return node.op in ("Add", "Sub") and search.is_affine(node) and len(search.computed(node)) == 2


def _weighed(search: Search, draft: Draft, node: Node, name: str) -> str:
    """A summand, as a product with weights where it is a multiple of an input."""
    graph, chain, base = search.graph, list[Node](), name
    while (maker := search.producers.get(base)) is not None and lookup(maker).kind is Kind.ELEMENTWISE:
        base, *others = search.computed(maker)
        if not search.is_affine(maker) or others or graph.types[base].shape != graph.types[name].shape:
            return name
        chain.append(maker)
    if not chain or not search.is_input(base):
        return name
    shape = graph.types[base].shape
    slope, zero = elementwise_map(chain[::-1], base, shape, name, graph.constants)
    dtype = graph.types[name].dtype
    uniform = slope.size == 0 or np.all(slope == slope.flat[0])
    if uniform and slope.flat[0] == 1:
        return name
    weight = slope.reshape(-1)[:1].reshape(1, 1) if uniform else slope[..., None, None]
    rows = draft.reshape(node, base, (*shape, *(1,) * (1 if uniform else 2)))
    w = draft.constant(f"{name}/weight", weight, dtype)
    product = draft.reshape(node, draft.apply(node, "MatMul", rows, w), shape)
    return draft.apply(node, "Add", product, draft.constant(f"{name}/bias", zero, dtype)) if np.any(zero) else product
