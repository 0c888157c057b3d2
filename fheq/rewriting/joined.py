"""Results of linear operators that are joined with other tensors before weights: the weights take in the operators.

Embeddings beside numbers, for instance, or inputs that the model brings to one range. Joined, such a result would be
quantized anew, with a table for each of its elements; what it is an affine function of is joined in its place.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fheq.graph import Graph, Node
from fheq.ops.table import Kind, lookup
from fheq.rewriting.affine_regions import Search, affine_map, elementwise_map
from fheq.rewriting.compose import DEARER_PER_BIT, MOST_WEIGHTS, PRODUCTS_PER_TABLE
from fheq.rewriting.edit import Draft


class Part(NamedTuple):
    """What is joined as an affine function of something else: the nodes of it, in topological order."""

    source: str
    nodes: tuple[Node, ...]


def compose_joined(graph: Graph) -> Graph:
    """The graph with joined results of linear operators taken into the weights that follow, where that costs less."""
    search = Search(graph)
    for node in graph.nodes:
        joined = graph.producers().get(node.inputs[0]) if node.inputs else None
        if joined is None or not _is_product_of_row(search, node, joined):
            continue
        parts = {name: part for name in joined.inputs if (part := _part(search, joined, name)) is not None}
        paying = {name: part for name, part in parts.items() if _gain(graph, node, joined, name, part) > 0}
        if paying:
            return compose_joined(_replaced(graph, node, joined, paying))
    return graph


def _is_product_of_row(search: Search, node: Node, joined: Node) -> bool:
    """Whether a node multiplies one joined row by known weights that are free to change."""
    graph, shape = search.graph, search.graph.types[joined.outputs[0]].shape
    weight = graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
    return (
        (joined.op, joined.domain) == ("Concat", "")
        and (node.op == "MatMul" or (node.op == "Gemm" and not node.attrs["transA"] and node.attrs["alpha"] == 1))
        and (weight is not None and weight.ndim == 2 and all(n in graph.constants for n in node.inputs[1:] if n))
        and math.prod(shape[:-1]) == 1
        and joined.attrs["axis"] % len(shape) == len(shape) - 1
        and len(set(joined.inputs)) == len(joined.inputs)
        and (search.is_affine(node) and search.is_affine(joined) and search.enclosed(joined, {id(node): node}))
    )


def _part(search: Search, joined: Node, name: str) -> Part | None:
    """A joined tensor as a function of what the linear operators before it read, or as a multiple of an input; None where it
    is neither."""
    inside, frontier, found = {id(joined): joined}, {name}, None
    while len(frontier) == 1:
        (tensor,) = frontier
        kinds = {lookup(node).kind for node in list(inside.values())[1:]}
        if Kind.LINEAR in kinds or (Kind.ELEMENTWISE in kinds and search.is_input(tensor)):
            found = Part(tensor, tuple(sorted(list(inside.values())[1:], key=lambda node: search.order[id(node)])))
        node = search.producers.get(tensor)
        if node is None or not search.is_affine(node) or not search.enclosed(node, inside):
            break
        inside[id(node)] = node
        frontier = set(search.computed(node))
    return found


def _gain(graph: Graph, node: Node, joined: Node, name: str, part: Part) -> float:
    """How many tables it saves to join the source of a part, about; 0 where its weights are too many."""
    before, after = (math.prod(graph.types[n].shape) for n in (name, part.source))
    columns, rows = math.prod(graph.types[node.outputs[0]].shape), graph.types[joined.outputs[0]].shape[-1]
    wider = max(0.0, math.log2((rows - before + after) / rows) / 2)
    if after * columns > MOST_WEIGHTS:
        return 0.0
    return before - rows * (DEARER_PER_BIT**wider - 1) - after * columns / PRODUCTS_PER_TABLE


def _replaced(graph: Graph, node: Node, joined: Node, parts: dict[str, Part]) -> Graph:
    weight = graph.constants[node.inputs[1]].astype(np.float64)
    weight = weight.T if node.attrs.get("transB", 0) else weight
    ends = np.cumsum([0, *(graph.types[name].shape[-1] for name in joined.inputs)])
    blocks, offset = [], np.zeros(weight.shape[1])
    for name, start, end in zip(joined.inputs, ends, ends[1:]):
        block = weight[start:end]
        if name in parts:
            source, nodes = parts[name]
            shape = graph.types[source].shape
            if all(lookup(n).kind is Kind.ELEMENTWISE for n in nodes):  # their matrix would be all zeros but its diagonal
                slope, constant = (v.ravel() for v in elementwise_map(nodes, source, shape, name, graph.constants))
                offset, block = offset + constant @ block, slope[:, None] * block
            else:
                matrix, constant = affine_map(nodes, source, shape, name, graph.constants)
                offset, block = offset + constant @ block, matrix.T @ block
        blocks.append(block)
    gone = {id(n) for part in parts.values() for n in part.nodes} | {id(joined)}
    draft, out, dtype = Draft(graph), node.outputs[0], graph.types[node.outputs[0]].dtype
    for n in graph.nodes:
        if n is node:
            lead = graph.types[joined.outputs[0]].shape[:-1]
            flat = [draft.reshape(n, parts[m].source, (*lead, -1)) if m in parts else m for m in joined.inputs]
            x = draft.apply(joined, "Concat", *flat, axis=len(lead))
            w = draft.constant(f"{node.inputs[1]}/composed", np.concatenate(blocks), dtype)
            bias = [draft.constants[b] * node.attrs["beta"] for b in node.inputs[2:] if b]
            product = draft.fresh(f"{out}/MatMul")
            draft.write(replace(node, op="MatMul", inputs=(x, w), outputs=(product,), attrs={}))
            draft.apply(n, "Add", product, draft.constant(f"{out}/bias", sum(bias, offset), dtype), out=out)
        elif id(n) not in gone:
            draft.write(n)
    return draft.finish()
