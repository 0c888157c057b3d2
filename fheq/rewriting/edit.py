"""New nodes and constants while a graph is rewritten."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any

import numpy as np

from fheq.graph import Graph, Node, TensorType
from fheq.rewriting.fold import evaluated, output_types, prune, type_of

VERSION = 18
"""Opset of the nodes that rewrites make."""


class Draft:
    """The parts of a new graph; made and used up inside one rewrite."""

    def __init__(self, graph: Graph, nodes: Iterable[Node] = (), hook: Callable[[Draft, Node], bool] | None = None) -> None:
        """Starts from the tensors of `graph`.

        `hook(draft, node)` may write other nodes in place of one, and says whether it did.
        """
        self.graph = graph
        self.nodes = list(nodes)
        self.constants = dict(graph.constants)
        self.types: dict[str, TensorType] = dict(graph.types)
        self.pinned = dict(graph.pinned)
        self.hook = hook

    def fresh(self, base: str) -> str:
        """A tensor name that is not taken."""
        name, count = base, 1
        while name in self.types:
            name, count = f"{base}_{count}", count + 1
        return name

    def constant(self, base: str, value: Any, dtype: np.dtype | None = None) -> str:
        """Adds a known tensor; its name."""
        name = self.fresh(base)
        self.constants[name] = np.asarray(value, dtype)
        self.types[name] = type_of(self.constants[name])
        return name

    def write(self, node: Node) -> None:
        """Adds a node, or what the hook makes of it."""
        missing = [name for name in node.outputs if name and name not in self.types]
        if missing:
            self.types.update(output_types(node, self.constants, self.types))
        if self.hook is None or not self.hook(self, node):
            self.nodes.append(node)

    def apply(self, origin: Node, op: str, *inputs: str, out: str = "", **attrs: Any) -> str:
        """Adds a node that stands for a part of `origin`, or its value where that is known; the name of its output."""
        base = origin.name or next(o for o in origin.outputs if o)
        known = not out and all(name in self.constants for name in inputs if name)
        out = out or self.fresh(f"{next(o for o in origin.outputs if o)}/{op}")
        node = Node(f"{base}/{op}", op, inputs, (out,), MappingProxyType(attrs), "", VERSION)
        if known:
            return self.constant(out, evaluated(node, self.constants, self.types)[out])
        self.write(node)
        return out

    def finish(self) -> Graph:
        """The new graph, without what no output depends on."""
        return prune(
            self.graph.replace(
                nodes=tuple(self.nodes),
                constants=MappingProxyType(self.constants),
                types=MappingProxyType(self.types),
                pinned=MappingProxyType(self.pinned),
            )
        )
