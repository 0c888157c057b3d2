"""Nodes that compute the same of the same, as exporters write them who state a mean once for each use of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import numpy as np

from fheq.graph import Graph, Node
from fheq.regions import RESHAPES
from fheq.rewriting.prune import prune


def merge_equal_nodes(graph: Graph) -> Graph:
    """The graph with each value computed once. A tensor with a quantizer of its own, or that is an output, stays."""
    kept = {port.name for port in graph.outputs} | set(graph.pinned)
    names: dict[str, str] = {}
    alike: dict[Hashable, list[Node]] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        moved = replace(node, inputs=tuple(names.get(name, name) for name in node.inputs))
        others = alike.setdefault(_key(graph, moved), [])
        same = next((other for other in others if _read_equal_constants(graph, moved, other)), None)
        if same is None:
            others.append(moved)
        if same is None or kept.intersection((*same.outputs, *node.outputs)):
            nodes.append(moved)
        else:
            names |= {old: new for old, new in zip(node.outputs, same.outputs) if old}
    return prune(graph.replace(nodes=tuple(nodes))) if names else graph


def _key(graph: Graph, node: Node) -> Hashable:
    """What is equal for nodes of equal values; of known tensors, which may be large, their types alone."""
    if node.op in RESHAPES and not node.domain:  # in whatever words
        return "Reshape", node.inputs[0], graph.types[node.outputs[0]]
    used = tuple(name != "" for name in node.outputs)
    attrs = tuple((name, _value(node.attrs[name])) for name in sorted(node.attrs))
    inputs = tuple(graph.types[name] if name in graph.constants else name for name in node.inputs)
    return node.op, node.domain, node.version, used, attrs, inputs


def _read_equal_constants(graph: Graph, one: Node, two: Node) -> bool:
    """Whether the known tensors that two nodes of one key read have the same values."""
    if one.op in RESHAPES and not one.domain:
        return True
    pairs = [(a, b) for a, b in zip(one.inputs, two.inputs) if a != b]
    return all(_value(graph.constants[a]) == _value(graph.constants[b]) for a, b in pairs)


def _value(value: Any) -> Hashable:
    if isinstance(value, np.ndarray):
        content = tuple(value.ravel().tolist()) if value.dtype.hasobject else value.tobytes()
        return value.dtype.str, value.shape, content
    if isinstance(value, list | tuple):
        return tuple(map(_value, value))
    return value if isinstance(value, Hashable) else id(value)
