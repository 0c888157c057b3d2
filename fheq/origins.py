"""What the elements of a tensor come from: the tensor whose elements they are functions of, one for one, or copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fheq.graph import Graph, Node
from fheq.ops.table import Kind, find, lookup
from fheq.regions import RESHAPES, broadcast_elements

KEPT = 16  # graphs: rewrites make many, and ask most of the last


class Origin(NamedTuple):
    """The tensor of which another is a function, element by element through operators of ONNX alone, itself without one; and
    the element that each of its own is a function of, flat, None where these are in the same order."""

    source: str
    elements: np.ndarray | None


def elementwise_source(graph: Graph, name: str) -> str:
    """See `Origin`."""
    return _origins(graph).get(name, Origin(name, None)).source


def is_function_of_one(graph: Graph, names: Sequence[str], out: str) -> bool:
    """Whether tensors that an elementwise operator reads are functions of one, of which the same elements meet.

    Args:
        out: its result.
    """
    if len(set(names)) == 1 or any(name not in graph.types for name in (*names, out)):  # as those of a draft
        return len(set(names)) == 1
    return _met(graph, _origins(graph), names, graph.types[out].shape) is not None


@lru_cache(maxsize=KEPT)
def _origins(graph: Graph) -> dict[str, Origin]:
    found: dict[str, Origin] = {}
    for node in graph.nodes:
        read = [name for name in dict.fromkeys(node.inputs) if name and name not in graph.constants]
        for out in filter(None, node.outputs):
            met = _met(graph, found, read, graph.types[out].shape) if _keeps_places(node) else None
            found[out] = met or Origin(out, None)
    return found


def _keeps_places(node: Node) -> bool:
    row = find(node) if node.domain in ("", "ai.onnx.ml") else None
    return row is not None and (row.kind is Kind.ELEMENTWISE or node.op in RESHAPES)


def _met(graph: Graph, found: Mapping[str, Origin], names: Sequence[str], shape: tuple[int, ...]) -> Origin | None:
    """The origin of what tensors make that are broadcast to a shape (or reshaped to it); None where they have several."""
    size = int(np.prod(shape))
    met: Origin | None = None
    for name in names:
        origin, own = found.get(name, Origin(name, None)), graph.types[name].shape
        if int(np.prod(own)) != size:
            spread = broadcast_elements(own, shape)
            origin = Origin(origin.source, spread if origin.elements is None else origin.elements[spread])
        if met is None:
            met = origin
        elif met.source != origin.source or not _same(met.elements, origin.elements, size):
            return None
    return met


def _same(a: np.ndarray | None, b: np.ndarray | None, size: int) -> bool:
    in_order = lambda v: np.arange(size) if v is None else v
    return a is b or np.array_equal(in_order(a), in_order(b))


def copied_from(graph: Graph, name: str) -> Iterator[str]:
    """The tensors whose values a tensor has, itself first: those before casts and movements of one tensor, which put nothing
    but whole numbers beside them."""
    producers = graph.producers()
    while True:
        yield name
        node = producers.get(name)
        if node is None or (node.op != "Cast" and lookup(node).kind is not Kind.MOVEMENT):
            return
        read = {n for n in node.inputs if n and n not in graph.constants}
        known = [graph.constants[n] for n in node.inputs if n in graph.constants]
        if len(read) != 1 or any(v.dtype.kind == "f" and np.any(v % 1) for v in known):
            return
        (name,) = read


def is_integer(graph: Graph, name: str) -> bool:
    """Whether a tensor holds whole numbers, being made from integers."""
    return any(graph.types[n].dtype.kind in "iu" for n in copied_from(graph, name))


def is_boolean(graph: Graph, name: str) -> bool:
    """Whether a tensor holds nothing but 0 and 1, being made from comparisons or from inputs that are booleans."""
    return name not in graph.constants and (graph.types[name].dtype == np.bool_ or name in _booleans(graph))


@lru_cache(maxsize=KEPT)
def _booleans(graph: Graph) -> frozenset[str]:
    """The computed tensors that are copies of booleans, and of known 0 and 1."""
    found: set[str] = set()

    def holds(name: str) -> bool:
        if name in graph.constants:
            return bool(np.all(np.isin(graph.constants[name], (0, 1))))
        return graph.types[name].dtype == np.bool_ or name in found

    for node in graph.nodes:
        row = find(node)
        data = [n for i, n in enumerate(node.inputs) if n and row is not None and not row.is_static(i)]
        if row is not None and (row.kind is Kind.MOVEMENT or node.op == "Cast") and all(map(holds, data)):
            found.update(filter(None, node.outputs))
    return frozenset(found)
