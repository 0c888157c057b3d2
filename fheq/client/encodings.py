"""Inputs that several quantizers of the model read: encrypted once for each.

What a model quantizes in two ways is two tensors of integers. The client has the real values, so it encodes them on each
grid: that is exact and takes no table, where a common grid would take one per quantizer and round twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from fheq.affine import LEAVES
from fheq.graph import Graph, Node, is_float
from fheq.ops.table import Kind, Op, lookup, register
from fheq.rewriting.edit import Draft

# Encode: another encoding of an input of the model, the same real values.
register(Op("Encode", 1, Kind.ELEMENTWISE, lambda node, x: x, domain="fheq"))

Grid = tuple[Any, ...] | None
"""What tells stated quantizers apart; None for readers of the real values."""


def is_encoding(node: Node) -> bool:
    """Whether a node stands for another encoding of an input."""
    return (node.domain, node.op) == ("fheq", "Encode")


def separate_encodings(graph: Graph) -> Graph:
    """The graph with an Encode node before the readers of an input that want it on another grid than the first one does."""
    for port in graph.inputs:
        if is_float(port.type.dtype):
            ends = list(_ends(graph, port.name, moved=False))
            if any(name == port.name for name in (p.name for p in graph.outputs)):
                ends.append((None, port.name, None))
            grids = sorted(dict.fromkeys(grid for _, _, grid in ends), key=lambda grid: grid is not None)
            if len(grids) > 1:
                graph = _separated(graph, port.name, ends, grids)
    return graph


def _ends(graph: Graph, tensor: str, moved: bool) -> Iterator[tuple[Node | None, str, Grid]]:
    """What reads a tensor, movement of it alone being followed: the node, the tensor that it reads, and its grid."""
    outputs = {port.name for port in graph.outputs}
    for node in graph.consumers().get(tensor, []):
        if _moves(graph, node):
            for out in filter(None, node.outputs):
                if out in outputs:
                    yield None, out, None
                yield from _ends(graph, out, moved=True)
        else:
            yield node, tensor, _grid(graph, node, tensor, moved)


def _moves(graph: Graph, node: Node) -> bool:
    """Whether a node does nothing but move one computed tensor."""
    return lookup(node).kind is Kind.MOVEMENT and sum(n not in graph.constants for n in set(node.inputs) if n) == 1


def _grid(graph: Graph, node: Node, tensor: str, moved: bool) -> Grid:
    stated = graph.pinned.get(node.outputs[0])
    if node.op != "FakeQuant" or stated is None or node.inputs[0] != tensor or (stated.axis is not None and moved):
        return None
    leaves = tuple(np.asarray(getattr(stated, leaf), np.float64) for leaf in LEAVES)
    return node.attrs["rounding_mode"], stated.axis, *((leaf.shape, leaf.tobytes()) for leaf in leaves)


def _separated(graph: Graph, source: str, ends: list[tuple[Node | None, str, Grid]], grids: list[Grid]) -> Graph:
    draft, producers = Draft(graph), graph.producers()
    made: dict[tuple[str, Grid], str] = {(source, grids[0]): source}
    wanted: dict[tuple[str, str], Grid] = {
        (node.outputs[0], tensor): grid for node, tensor, grid in ends if node is not None
    }

    def on_grid(tensor: str, grid: Grid) -> str:
        """A moved input on a grid."""
        if grid == grids[0]:
            return tensor
        if (tensor, grid) not in made:
            if tensor == source:
                made[tensor, grid] = draft.fresh(f"{source}/{grids.index(grid) + 1}")
                out = made[tensor, grid]
                draft.write(Node(out, "Encode", (source,), (out,), {}, "fheq", 1))
            else:
                node = producers[tensor]
                inputs = tuple(n if not n or n in draft.constants else on_grid(n, grid) for n in node.inputs)
                outputs = tuple(draft.fresh(f"{n}/{grids.index(grid) + 1}") if n else "" for n in node.outputs)
                made.update({(n, grid): out for n, out in zip(node.outputs, outputs)})
                draft.write(replace(node, inputs=inputs, outputs=outputs))
        return made[tensor, grid]

    for node in graph.nodes:
        key = node.outputs[0]
        inputs = tuple(on_grid(n, wanted[key, n]) if (key, n) in wanted else n for n in node.inputs)
        draft.write(node if inputs == node.inputs else replace(node, inputs=inputs))
    return draft.finish()
