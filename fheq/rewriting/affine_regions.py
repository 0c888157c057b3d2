"""Affine regions of a graph: parts between two tensors that compute one affine map of known coefficients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import enable_x64

from fheq.graph import Graph, Node, is_float
from fheq.interpret import run_node
from fheq.ops.table import Kind, find, lookup
from fheq.origins import is_function_of_one
from fheq.regions import in_float64
from fheq.stated.accumulators import states_accumulator

CHUNK = 1 << 24  # elements of one intermediate tensor while the columns of a map are computed


@dataclass(frozen=True)
class AffineRegion:
    """Nodes, in topological order, whose only result `out` is an affine function of `source`.

    Args:
        tables: table applications that its linear operators cost when each has its input quantized anew.
        fan_in: the most elements that one of its linear operators sums.
    """

    source: str
    nodes: tuple[Node, ...]
    out: str
    tables: int
    fan_in: int


def affine_regions(graph: Graph) -> Iterator[AffineRegion]:
    """Every region that ends in a linear operator or a sum and would need tables inside.

    Nobody outside reads a tensor in between, and neither such a tensor nor a weight has a quantizer of its own.
    """
    search = Search(graph)
    for node in graph.nodes:
        if search.is_step(node) and search.is_affine(node):
            yield from search.ending_at(node)


class Search:
    """What is asked of the nodes of a graph."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.producers = graph.producers()
        self.consumers = graph.consumers()
        self.order = {id(node): i for i, node in enumerate(graph.nodes)}
        self.outputs = {port.name for port in graph.outputs}

    def computed(self, node: Node) -> list[str]:
        return [name for name in dict.fromkeys(node.inputs) if name and name not in self.graph.constants]

    def is_step(self, node: Node) -> bool:
        """Whether a node is a linear operator, or takes in tensors that are no functions of one, element by element."""
        op, computed = find(node), self.computed(node)
        if op is None or op.kind is not Kind.ELEMENTWISE or len(computed) < 2:
            return op is not None and op.kind is Kind.LINEAR
        return not is_function_of_one(self.graph, computed, node.outputs[0])

    def is_affine(self, node: Node) -> bool:
        """Whether a node is affine in what is computed, in floating point, with weights that are free to change."""
        op, computed = find(node), self.computed(node)
        names = [name for name in (*computed, *node.outputs) if name]
        if op is None or any(not is_float(self.graph.types[name].dtype) for name in names) or not computed:
            return False
        if any(name in self.graph.pinned for name in (*node.inputs, *node.outputs)):
            return False
        if op.kind is Kind.MOVEMENT:
            return True
        at = [i for i, name in enumerate(node.inputs) if name in computed]
        if op.kind is Kind.LINEAR:
            return len(at) == 1 and (at == [0] or node.op in ("MatMul", "Gemm"))
        additive = node.op in ("Add", "Sub", "Sum", "Mean")
        return op.kind is Kind.ELEMENTWISE and set(at) <= set(op.affine) and (len(at) == 1 or additive)

    def is_multiple(self, node: Node) -> bool:
        """Whether a node is a product of each element with one weight (`fheq.rewriting.scaled_inputs`)."""
        weights = [self.graph.types[name].shape for name in node.inputs if name in self.graph.constants]
        return node.op == "MatMul" and any(shape[-2:] == (1, 1) for shape in weights)

    def is_requantized(self, name: str) -> bool:
        """Whether a tensor takes a table to be joined or multiplied, having none of its own: it is a movement or an affine
        function of what a linear operator or a sum makes, or a multiple of an input."""
        node = self.producers.get(name)
        if node is None or not self.is_affine(node):
            sums = node is not None and self.is_step(node) and node.op not in ("Max", "Min")
            return sums or (node is not None and states_accumulator(node))
        if self.is_step(node) or any(map(self.is_requantized, self.computed(node))):
            return True
        return lookup(node).kind is Kind.ELEMENTWISE and all(map(self.is_input, self.computed(node)))

    def is_input(self, name: str) -> bool:
        """Whether a tensor is an input, moved perhaps."""
        while (node := self.producers.get(name)) is not None:
            if not self.is_affine(node) or lookup(node).kind is not Kind.MOVEMENT or len(self.computed(node)) != 1:
                return False
            (name,) = self.computed(node)
        return True

    def decrypted(self) -> set[str]:
        """The tensors of which outputs are movements and affine functions, and nothing else is made."""
        found: set[str] = set()
        for node in reversed(self.graph.nodes):
            readers = [reader for name in node.outputs for reader in self.consumers.get(name, [])]
            free = (self.is_affine(reader) and not self.is_step(reader) for reader in readers)
            if all(free) and all(found.issuperset(filter(None, reader.outputs)) for reader in readers):
                found.update(filter(None, node.outputs))
        return found

    def ending_at(self, last: Node) -> Iterator[AffineRegion]:
        """The regions of one source that end in a node, the smallest first."""
        inside = {id(last): last}
        frontier = set(self.computed(last))
        while True:
            if len(frontier) == 1:
                nodes = tuple(sorted(inside.values(), key=lambda node: self.order[id(node)]))
                (source,) = frontier
                tables = self.tables(source, nodes)
                if tables:
                    fan_in = max(self.fan_in(node) for node in nodes if self.is_step(node))
                    yield AffineRegion(source, nodes, last.outputs[0], tables, fan_in)
            made = [name for name in frontier if name in self.producers]
            if not made:
                return
            node = max((self.producers[name] for name in made), key=lambda node: self.order[id(node)])
            if not self.is_affine(node) or not self.enclosed(node, inside):
                return
            inside[id(node)] = node
            frontier = (frontier - set(node.outputs)) | set(self.computed(node))

    def fan_in(self, node: Node) -> int:
        shapes = [self.graph.types[name].shape for name in node.inputs[:2] if name]
        if node.op == "Conv":
            return math.prod(shapes[1][1:])
        if node.op in ("MatMul", "Gemm"):
            return shapes[0][0 if node.attrs.get("transA", 0) else -1]
        return max(1, math.prod(shapes[0]) // max(1, math.prod(self.graph.types[node.outputs[0]].shape)))

    def enclosed(self, node: Node, inside: Mapping[int, Node]) -> bool:
        readers = [reader for name in node.outputs if name for reader in self.consumers.get(name, [])]
        return self.outputs.isdisjoint(node.outputs) and all(id(reader) in inside for reader in readers)

    def tables(self, source: str, nodes: Sequence[Node]) -> int:
        """Elements of the accumulators that steps in the region read; 0 for a region that is better left as it is."""
        accumulators: dict[str, frozenset[str]] = {source: frozenset()}  # by tensor, those that it is a function of
        read: dict[str, int] = {}
        for node in nodes:
            origins = [accumulators[name] for name in self.computed(node)]
            step = self.is_step(node) and not self.is_multiple(node)
            if any(origins) and not all(origins):
                return 0  # the source itself beside weighted sums of it: as one weight, its 1 would leave them few steps
            if step:
                for name in self.computed(node):
                    if accumulators[name]:
                        read[name] = math.prod(self.graph.types[name].shape)
            for name in filter(None, node.outputs):
                accumulators[name] = frozenset([name]) if step else frozenset().union(*origins)
        return sum(read.values())


def is_decrypted(graph: Graph, tensor: str) -> bool:
    """Whether an output is a movement or an affine function of a tensor, with no linear operator or table in between."""
    search = Search(graph)
    reached = {tensor}
    for node in graph.nodes:
        if not reached.isdisjoint(node.inputs) and search.is_affine(node) and not search.is_step(node):
            reached.update(node.outputs)
    return not search.outputs.isdisjoint(reached)


def affine_map(
    nodes: Sequence[Node], source: str, shape: tuple[int, ...], out: str, constants: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Matrix `(outputs, inputs)` and offset `(outputs,)` of what the nodes make of a source of a given shape, in float64."""
    largest = 1

    def run(x: jax.Array) -> jax.Array:
        nonlocal largest
        env = _values(nodes, {source: x.reshape(shape)}, constants)
        largest = max(largest, *(v.size for v in env.values()))
        return env[out].ravel()

    with enable_x64():
        zero = jnp.zeros(int(np.prod(shape)), np.float64)
        offset = run(zero)
        rows = offset.size < zero.size
        derivative = jax.vmap(jax.vjp(run, zero)[1] if rows else lambda v: jax.jvp(run, (zero,), (v,))[1])
        units = np.eye(offset.size if rows else zero.size)
        batch = max(1, CHUNK // largest)
        parts = [derivative(jnp.asarray(units[i : i + batch])) for i in range(0, len(units), batch)]
        found = np.concatenate([np.asarray(part[0] if rows else part) for part in parts])
    return found if rows else found.T, np.asarray(offset)


def elementwise_map(
    nodes: Sequence[Node], source: str, shape: tuple[int, ...], out: str, constants: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Slope and offset, in the result's shape, of what affine functions make of each element of a source, in float64."""
    value = lambda x: in_float64(lambda: _values(nodes, {source: jnp.full(shape, x, np.float64)}, constants)[out])
    offset = value(0.0)
    return value(1.0) - offset, offset


def _values(nodes: Sequence[Node], env: dict[str, Any], constants: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What nodes make of tensors, known ones in float64."""
    known = {n: constants[n] for node in nodes for n in node.inputs if n in constants}
    known = {n: v.astype(np.float64) if is_float(v.dtype) else v for n, v in known.items()}
    read = lambda name: env[name] if name in env else jnp.asarray(known[name])
    for node in nodes:
        env.update((n, v) for n, v in zip(node.outputs, run_node(node, read, known)) if n)
    return env
