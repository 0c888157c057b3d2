"""Linear operators with nothing but affine maps in between, composed: the tensors in between need no tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from fheq.graph import Graph, Node
from fheq.ops.table import Kind, lookup
from fheq.ops.windows import window_of
from fheq.rewriting.affine_regions import AffineRegion, affine_map, affine_regions, is_decrypted
from fheq.rewriting.edit import VERSION, Draft

MOST_WEIGHTS = 1 << 20
"""Largest weight that a composition may make."""

PRODUCTS_PER_TABLE = 1 << 11
"""Products with known weights that one table may be traded for: they take about a tenth of a table's time at 8 bits."""

DEARER_PER_BIT = 1.15
"""How much more a table costs per bit by which the accumulator that its result enters gets wider."""


@dataclass(frozen=True)
class Form:
    """A composed operator, before its weight is computed.

    Args:
        products: what it multiplies for one sample.
        weights: the elements of its weight.
        fan_in: the elements that it sums.
        write: adds it to a draft, given the node that it is named after.
    """

    products: int
    weights: int
    fan_in: int
    write: Callable[[Draft, AffineRegion, Node], Any]


def compose(graph: Graph) -> Graph:
    """The graph with the affine regions composed that cost more in tables than they do in products as one operator.

    The composed operator is a Conv, a product along the last axis, or a product with the region's whole Jacobian, whichever
    multiplies least. Nothing changes where the model states a quantizer in between.
    """
    while True:
        found = [(gain, region, form) for region in affine_regions(graph) for gain, form in _gains(graph, region)]
        if not found:
            return graph
        _, region, form = max(found, key=lambda entry: entry[0])
        graph = replaced(graph, region, form)


def in_place(graph: Graph, region: AffineRegion) -> Form | None:
    """A region as one product along the last axis, or as one convolution; None where it is neither."""
    return _rows(graph, region) or _places(graph, region)


def _gains(graph: Graph, region: AffineRegion) -> Iterator[tuple[float, Form]]:
    """The forms of a region that pay, and how many tables that is worth."""
    before = tables_before(graph, region)
    for form in (_rows(graph, region), _places(graph, region), _whole(graph, region)):
        if form is not None and form.weights <= MOST_WEIGHTS:
            wider = max(0.0, math.log2(form.fan_in / region.fan_in) / 2)  # bits: sums grow with the root of their length
            gain = region.tables - before * (DEARER_PER_BIT**wider - 1) - form.products / PRODUCTS_PER_TABLE
            if gain > 0:
                yield gain, form


def tables_before(graph: Graph, region: AffineRegion) -> int:
    """The tables whose results must be more precise when the region's result is wider, about.

    An output is decrypted with all its bits, so that a wide one makes every table of the circuit dearer; other results lose
    their low bits before the next table.
    """
    if any(region.source == port.name for port in graph.inputs):
        return 0
    if not is_decrypted(graph, region.out):
        return math.prod(graph.types[region.source].shape)
    producers, reading = graph.producers(), [n for n in graph.nodes if lookup(n).kind in (Kind.LINEAR, Kind.MAX)]
    stack = list(dict.fromkeys(name for node in reading for name in _computed(graph, node)))
    read: set[str] = set()
    while stack:
        name = stack.pop()
        node = producers.get(name)
        if node is not None and lookup(node).kind is Kind.MOVEMENT:
            stack += _computed(graph, node)
        elif node is not None:
            read.add(name)
    return sum(math.prod(graph.types[name].shape) for name in read)


def replaced(graph: Graph, region: AffineRegion, form: Form) -> Graph:
    """The graph with a form in place of a region."""
    draft = Draft(graph)
    inside = {id(node) for node in region.nodes}
    named = [node for node in region.nodes if lookup(node).kind is Kind.LINEAR][-1]
    for node in graph.nodes:
        if node is region.nodes[-1]:
            form.write(draft, region, named)
        elif id(node) not in inside:
            draft.write(node)
    return draft.finish()


def _computed(graph: Graph, node: Node) -> list[str]:
    return [name for name in node.inputs if name and name not in graph.constants]


def _known(graph: Graph, node: Node) -> list[np.ndarray]:
    return [graph.constants[name] for name in node.inputs if name in graph.constants]


def _weight(draft: Draft, region: AffineRegion, named: Node, weight: np.ndarray, bias: np.ndarray) -> tuple[str, str]:
    dtype = draft.types[region.out].dtype
    base = next((name for name in named.inputs[:2] if name in draft.graph.constants), region.out)
    return draft.constant(f"{base}/composed", weight, dtype), draft.constant(f"{region.out}/bias", bias, dtype)


def _node(named: Node, op: str, inputs: tuple[str, ...], out: str, **attrs: Any) -> Node:
    return Node(named.name, op, inputs, (out,), MappingProxyType(attrs), "", VERSION)


def _product(
    draft: Draft, region: AffineRegion, named: Node, x: str, out: str, weight: np.ndarray, bias: np.ndarray
) -> None:
    """`x @ weight + bias` along the last axis."""
    w, b = _weight(draft, region, named, weight, bias)
    if len(draft.types[x].shape) == 2:
        draft.write(_node(named, "Gemm", (x, w, b), out, alpha=1.0, beta=1.0, transA=0, transB=0))
        return
    product = draft.fresh(f"{out}/MatMul")
    draft.write(_node(named, "MatMul", (x, w), product))
    draft.apply(named, "Add", product, b, out=out)


# The whole region as one matrix


def _whole(graph: Graph, region: AffineRegion) -> Form:
    shape, result = (graph.types[name].shape for name in (region.source, region.out))
    size = math.prod(shape) * math.prod(result)

    def write(draft: Draft, region: AffineRegion, named: Node) -> None:
        matrix, offset = affine_map(region.nodes, region.source, shape, region.out, graph.constants)
        flat = draft.reshape(named, region.source, (1, math.prod(shape)))
        done = result == (1, math.prod(result))
        out = region.out if done else draft.fresh(f"{region.out}/flat")
        _product(draft, region, named, flat, out, matrix.T, offset)
        if not done:
            draft.reshape(named, out, result, out=region.out)

    return Form(size, size, math.prod(shape), write)


# Rows: one matrix along the last axis


def _rows(graph: Graph, region: AffineRegion) -> Form | None:
    shape, result = (graph.types[name].shape for name in (region.source, region.out))
    if len(shape) < 2 or shape[:-1] != result[:-1] or not all(_by_row(graph, node) for node in region.nodes):
        return None
    size = shape[-1] * result[-1]
    one_row = (*(1,) * (len(shape) - 1), shape[-1])

    def write(draft: Draft, region: AffineRegion, named: Node) -> None:
        matrix, offset = affine_map(region.nodes, region.source, one_row, region.out, graph.constants)
        _product(draft, region, named, region.source, region.out, matrix.T, offset)

    return Form(size * math.prod(shape[:-1]), size, shape[-1], write)


def _by_row(graph: Graph, node: Node) -> bool:
    """Whether a node does the same to every row along the last axis."""
    known = _known(graph, node)
    shapes = {graph.types[name].shape[:-1] for name in (*_computed(graph, node), node.outputs[0])}
    if len(shapes) != 1 or lookup(node).kind is Kind.MOVEMENT:
        return False
    if lookup(node).kind is Kind.ELEMENTWISE:
        return all(math.prod(value.shape[:-1]) == 1 for value in known)
    first = node.inputs[0] not in graph.constants and not node.attrs.get("transA", 0)
    bias = known[1:]
    return node.op in ("MatMul", "Gemm") and first and known[0].ndim == 2 and all(math.prod(b.shape[:-1]) == 1 for b in bias)


# Places: one convolution


def _places(graph: Graph, region: AffineRegion) -> Form | None:
    """A chain of Conv, AveragePool and affine maps per channel: a Conv whose kernel is what one result depends on."""
    if not all(_by_place(graph, node) for node in region.nodes):
        return None
    rank = len(graph.types[region.source].shape) - 2
    kernel, strides, pads, group = [1] * rank, [1] * rank, [(0, 0)] * rank, 0
    for node in region.nodes:
        if lookup(node).kind is not Kind.LINEAR:
            continue
        shape = graph.types[node.inputs[0]].shape
        window = window_of(node, shape[2:], node.attrs.get("kernel_shape") or _known(graph, node)[0].shape[2:])
        if any(map(any, window.padding)):
            if node is not region.nodes[0] or node.op != "Conv" or any(window.overhang):
                return None
            pads = list(window.pads)
        spans = [(k - 1) * d for k, d in zip(window.kernel, window.dilations)]
        kernel = [k + span * s for k, span, s in zip(kernel, spans, strides)]
        strides = [s * t for s, t in zip(strides, window.strides)]
        group = math.gcd(group, node.attrs.get("group", 1) if node.op == "Conv" else shape[1])
    channels, result = graph.types[region.source].shape[1], graph.types[region.out].shape
    size = result[1] * (channels // group) * math.prod(kernel)

    def write(draft: Draft, region: AffineRegion, named: Node) -> None:
        nodes = tuple(_unpadded(node) for node in region.nodes)
        matrix, offset = affine_map(nodes, region.source, (1, channels, *kernel), region.out, graph.constants)
        blocks = matrix.reshape(group, result[1] // group, group, channels // group, *kernel)
        weight = blocks[np.arange(group), :, np.arange(group)].reshape(result[1], channels // group, *kernel)
        flat_pads = (*(p[0] for p in pads), *(p[1] for p in pads))
        options = {"strides": tuple(strides), "pads": flat_pads, "dilations": (1,) * rank, "group": group}
        inputs = (region.source, *_weight(draft, region, named, weight, offset))
        draft.write(_node(named, "Conv", inputs, region.out, **options, auto_pad="NOTSET", kernel_shape=tuple(kernel)))

    return Form(size * math.prod(result[2:]), size, size // result[1], write)


def _by_place(graph: Graph, node: Node) -> bool:
    """Whether a node does the same at every place of an image."""
    computed = _computed(graph, node)
    shape = graph.types[computed[0]].shape
    if len(shape) < 3 or shape[0] != 1 or len(computed) > 1 or lookup(node).kind is Kind.MOVEMENT:
        return False
    if lookup(node).kind is Kind.ELEMENTWISE:
        rank = len(shape)
        same = graph.types[node.outputs[0]].shape == shape
        return same and all(math.prod(v.shape[max(v.ndim - rank + 2, 0) :]) == 1 for v in _known(graph, node))
    return node.op in ("Conv", "AveragePool") and node.inputs[0] == computed[0]


def _unpadded(node: Node) -> Node:
    if lookup(node).kind is not Kind.LINEAR:
        return node
    attrs = {name: value for name, value in node.attrs.items() if name not in ("pads", "auto_pad")}
    return replace(node, attrs=MappingProxyType(attrs))
