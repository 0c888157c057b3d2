"""Weights of a sum as weights of its terms: (a + b) W is [a, b] [W; W].

Layers that add what they compute to what they read, as h + relu(h W) does, are sums of quantized tensors. To be multiplied
with weights a sum would be quantized anew, with a table for each of its elements; side by side, its terms need none. Of a
term that is a linear layer's result, as in a chain of linear bottlenecks, what the layer reads takes its place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fheq.graph import Graph, Node
from fheq.ops.table import Kind, lookup
from fheq.regions import COPIES
from fheq.rewriting.affine_regions import AffineRegion, Search, affine_map
from fheq.rewriting.compose import DEARER_PER_BIT, MOST_WEIGHTS, PRODUCTS_PER_TABLE, in_place, replaced, tables_before
from fheq.rewriting.edit import Draft
from fheq.rewriting.joined import Part

_WEIGHED = {"Conv": (1, 1), "Gemm": (-1, 0), "MatMul": (-1, 0)}
"""The channel axis of what an operator reads, and of its weight."""

_SUMS = ("AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum")
"""Operators with the same weight for all that they read, which sum each term alone."""


def distribute(graph: Graph) -> Graph:
    """The graph with the weights of sums given to their terms, where these are quantized anyway and that costs less.

    It holds for sums that nothing reads but weights, one other sum, and functions with tables of their own.
    """
    while (changed := _of_one_sum(graph)) is not None:
        graph = changed
    return graph


def _of_one_sum(graph: Graph) -> Graph | None:
    search = Search(graph)
    sums = _terms(search)
    for node in graph.nodes:
        terms = sums.get(node.outputs[0], Counter[str]())
        regions = _weighed(search, node) if len(terms) > 1 else []
        parts = [_parts(search, region, terms) for region in regions]
        if regions and all(found and _pays(graph, region, found) for region, found in zip(regions, parts)):
            return _distributed(graph, regions[0], parts[0])
    return None


def _is_sum(search: Search, node: Node) -> bool:
    shapes = {search.graph.types[name].shape for name in (*node.inputs, *node.outputs) if name}
    two = node.op in ("Add", "Sub") and len(search.computed(node)) == 2 and len(shapes) == 1
    return two and search.is_affine(node) and search.is_step(node)


def _terms(search: Search) -> dict[str, Counter[str]]:
    """What each sum adds up, through the sums that it is made of, and how often."""
    found: dict[str, Counter[str]] = {}
    for node in search.graph.nodes:
        if _is_sum(search, node):
            total: Counter[str] = Counter()
            for name, sign in zip(node.inputs, (1, 1 if node.op == "Add" else -1)):
                total.update({term: sign * often for term, often in found.get(name, Counter({name: 1})).items()})
            found[node.outputs[0]] = Counter({term: often for term, often in total.items() if often})
    return found


def _is_sum_of_its_own(search: Search, name: str) -> bool:
    """Whether a tensor would be read as an accumulator by a sum, and take a table as a term."""
    while (node := search.producers.get(name)) is not None and search.is_affine(node):
        name, *others = search.computed(node)
        if search.is_step(node) or others:
            return search.is_step(node) or lookup(node).kind is Kind.MOVEMENT
    return node is not None and search.is_step(node) and node.op not in ("Max", "Min")


def _weighed(search: Search, node: Node) -> list[AffineRegion]:
    """From a sum to each of the results of weights that read it; none where something else needs it quantized."""
    (total,) = node.outputs
    regions, sums = [], 0
    for reader in search.consumers.get(total, []):
        region = _up_to_weights(search, total, reader)
        if region is not None:
            regions.append(region)
        elif _is_sum(search, reader):
            sums += 1
        elif search.is_affine(reader) or lookup(reader).kind is not Kind.ELEMENTWISE:
            return []
    return regions if sums < 2 else []


def _up_to_weights(search: Search, total: str, reader: Node) -> AffineRegion | None:
    """Movement or affine functions of a sum, and the weights that alone read them; None where none do."""
    nodes = [reader]
    while search.is_affine(nodes[-1]) and len(search.computed(nodes[-1])) == 1:
        node = nodes[-1]
        if lookup(node).kind is Kind.LINEAR:
            found = AffineRegion(total, tuple(nodes), node.outputs[0], 0, 1)
            return found if _is_weighed(search, node) and (_moves(found) or in_place(search.graph, found)) else None
        readers = search.consumers.get(node.outputs[0], [])
        if len(readers) != 1 or not search.outputs.isdisjoint(node.outputs):
            return None
        nodes.append(readers[0])
    return None


def _moves(region: AffineRegion) -> bool:
    """Whether nothing but movement comes before the weights."""
    return all(node.op in COPIES and len(node.outputs) == 1 and not node.domain for node in region.nodes[:-1])


def _is_weighed(search: Search, node: Node) -> bool:
    if node.op in _SUMS:
        return True
    if node.op not in _WEIGHED or node.inputs[0] in search.graph.constants or node.attrs.get("group", 1) != 1:
        return False
    return not node.attrs.get("transA", 0) and (node.op == "Conv" or search.graph.constants[node.inputs[1]].ndim == 2)


def _parts(search: Search, region: AffineRegion, terms: Counter[str]) -> list[tuple[Part, int]]:
    """What a region's weights may read in place of each term of their sum, and how often; nothing where some term would take
    a table of its own."""
    found = []
    for name, often in terms.items():
        part = _layer(search, region, name) if _is_sum_of_its_own(search, name) else Part(name, ())
        if part is None:
            return []
        found.append((part, often))
    return found


def _layer(search: Search, region: AffineRegion, name: str) -> Part | None:
    """A term as a linear layer that does the same at every place, of what has a table or needs none.

    Returns:
        None where it is no such layer, or the region's weights cannot take it in.
    """
    source, nodes = name, list[Node]()
    while not any(lookup(node).kind is Kind.LINEAR for node in nodes):
        node = search.producers.get(source)
        if node is None or not search.is_affine(node) or len(search.computed(node)) != 1:
            return None
        (source,), nodes = search.computed(node), [node, *nodes]
    op = region.nodes[-1].op
    if op in _SUMS or _is_sum_of_its_own(search, source):
        return None
    axis, graph = _WEIGHED[op][0], search.graph
    shape, result = (graph.types[n].shape for n in (source, name))
    places = lambda whole: whole[:axis] + whole[axis:][1:]
    form = in_place(graph, AffineRegion(source, tuple(nodes), name, 0, 1))
    alone = form is not None and form.weights == shape[axis] * result[axis]  # reads one place for each of its results
    pointwise = alone and places(shape) == places(result)
    whole = AffineRegion(source, (*nodes, *region.nodes), region.out, 0, 1)
    return Part(source, tuple(nodes)) if pointwise and in_place(graph, whole) else None


def _pays(graph: Graph, region: AffineRegion, parts: list[tuple[Part, int]]) -> bool:
    """Whether the tables of a sum cost more than products with the weights of each term, and accumulators that are wider."""
    last, result = region.nodes[-1], graph.types[region.out].shape
    weights = graph.constants[last.inputs[1]].size if last.op in _WEIGHED else 0
    places = math.prod(result[2:]) if last.op == "Conv" else math.prod(result[:-1])
    tables = math.prod(graph.types[region.source].shape)
    wider = sum(math.prod(graph.types[part.source].shape) for part, _ in parts) / tables
    dearer = tables_before(graph, region) * (DEARER_PER_BIT ** max(0.0, math.log2(wider) / 2) - 1)
    gain = tables - dearer - (wider - 1) * weights * places / PRODUCTS_PER_TABLE
    return gain > 0 and wider * weights <= MOST_WEIGHTS


def _distributed(graph: Graph, region: AffineRegion, parts: list[tuple[Part, int]]) -> Graph:
    """The graph with a region's weights given to the terms of the sum that it reads, movement being done to each of them.

    Affine functions become part of the weights first, which leaves the rest for the next time.
    """
    if not _moves(region):
        form = in_place(graph, region)
        assert form is not None
        return replaced(graph, region, form)
    draft, inside = Draft(graph), {id(node) for node in region.nodes}
    for node in graph.nodes:
        if node is region.nodes[-1]:
            _write(draft, region, parts)
        elif id(node) not in inside:
            draft.write(node)
    return draft.finish()


def _write(draft: Draft, region: AffineRegion, parts: list[tuple[Part, int]]) -> None:
    *moves, node = region.nodes
    if node.op in _SUMS:
        names = [_applied(draft, region.nodes, part.source) for part, _ in parts]
        _write_sum(draft, node, list(zip(names, (often for _, often in parts))))
        return
    axis, along = _WEIGHED[node.op][0], _WEIGHED[node.op][1] ^ node.attrs.get("transB", 0)
    moved = [_applied(draft, moves, part.source) for part, _ in parts]
    stored = draft.graph.constants[node.inputs[1]]
    weights, offsets = zip(*(_taken_in(draft.graph, part, axis, along, often * stored) for part, often in parts))
    w = draft.constant(f"{node.inputs[1]}/each", np.concatenate(weights, axis=along), stored.dtype)
    x = draft.apply(node, "Concat", *moved, axis=axis % len(draft.types[moved[0]].shape))
    offset, out = node.attrs.get("alpha", 1.0) * sum(offsets), node.outputs[0]
    if not np.any(offset):
        draft.write(replace(node, inputs=(x, w, *node.inputs[2:])))
        return
    product = draft.fresh(f"{out}/each")
    draft.write(replace(node, inputs=(x, w, *node.inputs[2:]), outputs=(product,)))
    channels = offset.reshape(-1, *(1,) * (stored.ndim - 2 if node.op == "Conv" else 0))
    draft.apply(node, "Add", product, draft.constant(f"{out}/bias", channels, stored.dtype), out=out)


def _taken_in(graph: Graph, part: Part, axis: int, along: int, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights that take in the layer before them, and what its bias makes of each of their outputs.

    Args:
        axis: of the channels that are read; along: that axis of the weight.
    """
    if not part.nodes:
        return weight, np.zeros(())
    shape = graph.types[part.source].shape
    place = tuple(size if i == axis % len(shape) else 1 for i, size in enumerate(shape))
    matrix, offset = affine_map(part.nodes, part.source, place, part.nodes[-1].outputs[0], graph.constants)
    made = np.moveaxis(np.tensordot(weight, matrix, (along, 0)), -1, along)
    return made, np.tensordot(weight, offset, (along, 0)).reshape(weight.shape[1 - along], -1).sum(axis=1)


def _applied(draft: Draft, nodes: Sequence[Node], name: str) -> str:
    """What nodes, each of which reads the one before it, make of a tensor."""
    for node in nodes:
        out = draft.fresh(f"{node.outputs[0]}/each")
        draft.write(replace(node, inputs=(name, *node.inputs[1:]), outputs=(out,)))
        name = out
    return name


def _write_sum(draft: Draft, node: Node, terms: list[tuple[str, int]]) -> None:
    """The sum of terms, each as often as is said, in place of a node."""
    (first, most), *rest = sorted(terms, key=lambda term: -term[1])
    value = _times(draft, node, first, most)
    draft.add_up(node, value, [(often, _times(draft, node, name, abs(often))) for name, often in rest], node.outputs[0])


def _times(draft: Draft, node: Node, name: str, often: int) -> str:
    if often == 1:
        return name
    return draft.apply(node, "Mul", name, draft.constant(f"{name}/times", often, draft.types[name].dtype))
