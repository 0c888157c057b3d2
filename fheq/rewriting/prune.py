"""Graphs without what no output depends on."""

from __future__ import annotations

from collections.abc import Iterable

from fheq.graph import Graph, Node
from fheq.rewriting.evaluation import output_types, type_of


def prune(graph: Graph) -> Graph:
    """Drops what no output depends on, and adds the types of tensors that have none yet."""
    nodes = live(graph.nodes, [port.name for port in graph.outputs])
    inputs = [port.name for port in graph.inputs]
    read = {name for node in nodes for name in node.inputs if name} | {port.name for port in graph.outputs}
    constants = {name: value for name, value in graph.constants.items() if name in read}
    types = {name: graph.types[name] for name in inputs} | {name: type_of(value) for name, value in constants.items()}
    for node in nodes:
        old = {name: graph.types[name] for name in node.outputs if name in graph.types}
        types.update(old if len(old) == sum(map(bool, node.outputs)) else output_types(node, constants, types))
    pinned = {name: affine for name, affine in graph.pinned.items() if name in types}
    return graph.replace(nodes=nodes, constants=constants, types=types, pinned=pinned)


def live(nodes: Iterable[Node], outputs: Iterable[str]) -> tuple[Node, ...]:
    """The nodes that the outputs depend on."""
    wanted, kept = set(outputs), []
    for node in reversed(tuple(nodes)):
        if any(name in wanted for name in node.outputs if name):
            wanted.update(name for name in node.inputs if name)
            kept.append(node)
    return tuple(reversed(kept))
