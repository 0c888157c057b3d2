"""Subgraphs of control flow: read as nodes, and written into the graph around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto

from fheq.graph import Node

CONSTANT_VERSION = 13
CONTROL_FLOW = ("If", "Loop", "Scan")
WITH_SUBGRAPHS = (*CONTROL_FLOW, "SequenceMap")


@dataclass(frozen=True)
class Subgraph:
    """A body or branch. Names that are neither inputs, constants nor made by a node are those of the graph around it."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, np.ndarray]

    def local(self) -> set[str]:
        """The names that belong to the subgraph."""
        return {*self.inputs, *self.constants, *(name for node in self.nodes for name in node.outputs if name)}

    def with_outer(self, names: Callable[[str], str]) -> Subgraph:
        """The subgraph with the names that it takes from around it replaced."""
        local = self.local()
        mapped = lambda name: name if not name or name in local else names(name)
        nodes = tuple(rename(node, mapped) for node in self.nodes)
        return replace(self, nodes=nodes, outputs=tuple(map(mapped, self.outputs)))

    def instance(self, prefix: str, given: Sequence[str]) -> tuple[list[Node], list[str]]:
        """Its nodes with inputs bound and names of its own made unique, and the names of its outputs.

        Raises:
            ValueError: not as many inputs as it has.
        """
        names = {name: f"{prefix}/{name}" for name in self.local()}
        names |= {"": "", **dict(zip(self.inputs, given, strict=True))}

        def mapped(name: str) -> str:
            return names.get(name, name)

        nodes = [constant(names[name], value) for name, value in self.constants.items()]
        nodes += [replace(rename(n, mapped), name=f"{prefix}/{n.name or n.op}") for n in self.nodes]
        return nodes, [mapped(name) for name in self.outputs]


def constant(name: str, value: Any) -> Node:
    """A Constant node."""
    return Node(name, "Constant", (), (name,), MappingProxyType({"value": np.asarray(value)}), "", CONSTANT_VERSION)


def rename(node: Node, names: Callable[[str], str]) -> Node:
    """A node with other tensor names, those that its subgraphs take from around them included."""
    attrs = {k: v.with_outer(names) if isinstance(v, Subgraph) else v for k, v in node.attrs.items()}
    inputs, outputs = tuple(map(names, node.inputs)), tuple(map(names, node.outputs))
    return replace(node, inputs=inputs, outputs=outputs, attrs=MappingProxyType(attrs))


def outer_reads(attributes: Iterable[AttributeProto]) -> set[str]:
    """The names that the subgraphs among a node's attributes take from around them."""
    graphs = [graph for a in attributes for graph in ([a.g] if a.HasField("g") else a.graphs)]
    return {name for graph in graphs for name in captured(graph)}


def captured(graph: onnx.GraphProto) -> set[str]:
    """The names that a subgraph takes from around it."""
    local = {"", *(i.name for i in graph.input), *(t.name for t in graph.initializer)}
    local |= {t.values.name for t in graph.sparse_initializer} | {name for node in graph.node for name in node.output}
    return read_names(graph) - local


def read_names(graph: onnx.GraphProto) -> set[str]:
    """The names that a graph's nodes, their subgraphs and its outputs read."""
    read = {o.name for o in graph.output} | {name for node in graph.node for name in node.input}
    return read.union(*(outer_reads(node.attribute) for node in graph.node))
