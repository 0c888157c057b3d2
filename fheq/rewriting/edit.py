"""New nodes and constants while a graph is rewritten."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from fheq.graph import Graph, Node, TensorType
from fheq.ops.arguments import DTYPES
from fheq.rewriting.evaluation import evaluated, output_types, type_of
from fheq.rewriting.prune import prune

VERSION = 18
"""Opset of the nodes that rewrites make."""

CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
"""ONNX's number of a type, as `Cast` takes it."""


def bypassed(graph: Graph, skip: Callable[[Node], bool]) -> Graph:
    """The graph without some nodes of one output, whose readers take their first input instead."""
    if not any(map(skip, graph.nodes)):
        return graph
    draft = Draft(graph)
    names: dict[str, str] = {}
    outputs = {port.name for port in graph.outputs}
    for node in graph.nodes:
        moved = replace(node, inputs=tuple(names.get(name, name) for name in node.inputs))
        if not skip(node):
            draft.write(moved)
        elif node.outputs[0] in outputs:
            draft.apply(node, "Identity", moved.inputs[0], out=node.outputs[0])
        else:
            names[node.outputs[0]] = moved.inputs[0]
    return draft.finish()


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

    def add_up(self, origin: Node, value: str, terms: Iterable[tuple[int, str]], out: str) -> None:
        """Adds one or more tensors, each with its sign, to another; the last sum is `out`."""
        *before, last = terms
        op = lambda sign: "Add" if sign > 0 else "Sub"
        for sign, name in before:
            value = self.apply(origin, op(sign), value, name)
        self.apply(origin, op(last[0]), value, last[1], out=out)

    def reshape(self, origin: Node, name: str, shape: tuple[int, ...], out: str = "") -> str:
        """A tensor in another shape, itself where it has it; one entry may be -1."""
        if not out and self.types[name].shape == shape:
            return name
        target = self.constant(f"{name}/shape", np.asarray(shape, np.int64))
        return self.apply(origin, "Reshape", name, target, out=out, allowzero=int(-1 not in shape))

    def pick(self, origin: Node, name: str, places: np.ndarray) -> str:
        """The elements of a tensor at flat places, in their shape; a first axis of 1, perhaps of samples, stays."""
        kept = self.types[name].shape[:1] == places.shape[:1] == (1,)
        flat = self.reshape(origin, name, (1, -1) if kept else (-1,))
        index = self.constant(f"{name}/places", places[0] if kept else places, np.dtype(np.int64))
        return self.apply(origin, "Gather", flat, index, axis=int(kept))

    def cast(self, origin: Node, name: str, dtype: Any) -> str:
        """A tensor in another type, itself where it has it."""
        dtype = np.dtype(dtype)
        return name if self.types[name].dtype == dtype else self.apply(origin, "Cast", name, to=CODES[dtype])

    def depends(self, *names: str) -> bool:
        """Whether all names are tensors that depend on data."""
        return all(name and name not in self.constants for name in names)

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
