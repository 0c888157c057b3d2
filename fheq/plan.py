"""The plan: where a graph is quantized, and which integer steps run between the tables.

The plan depends on the graph alone, not on bits, data or parameters. It names

- **points**: tensors that are brought to integers by a table, each from one source;
- **sources**: integer tensors that regions start from: graph inputs and the results of steps;
- **steps**: linear ops, sums, products, maxima and joins of quantized tensors.

Calibration observes the points and sources, `fit` gives them quantizers, `fake_quant` plants them, `lower` emits them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import jax
import numpy as np

from fheq.affine import Affine
from fheq.client import split
from fheq.encodings import is_encoding, separate_encodings
from fheq.errors import UnsupportedError, describe
from fheq.forms import build_linear, build_maximum, build_product, pairwise
from fheq.graph import Graph, Node
from fheq.ops.table import Kind, lookup
from fheq.regions import FILLER, Elements, Movement, broadcast_elements, in_float64, movements
from fheq.rewrites import activate_before_maximum, compose, decompose, quantize_before_movement, settle_decisions
from fheq.rewriting.edit import bypassed
from fheq.rewriting.fold import is_float_cast
from fheq.stated_accumulators import take_accumulators
from fheq.steps import Join, Operand, Step
from fheq.weighed_decisions import weighed_decision


@dataclass(frozen=True, eq=False)
class Region:
    """What is known of a computed tensor inside a region (arrays are flat, one entry per element).

    Args:
        source: the integer tensor that it is a function of.
        elements: the source element, or -1 for a known filler.
        root: the last tensor before which only movement happened; its integers can be moved to this tensor.
        moved: the element of `root`, or -1 for a known filler.
        fill: real value of the fillers of `moved`.
        affine: it is an affine function of its source element.
    """

    source: str
    elements: np.ndarray
    root: str
    moved: np.ndarray
    fill: np.ndarray
    affine: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """See the module's docstring.

    Args:
        graph: the decomposed graph, its linear operators composed, that the names refer to.
        steps: in order of evaluation.
        regions: by computed tensor (and graph input).
        points: point to its source.
        outputs: graph output to the operand that it is, or None where it is an affine function of its source and needs no
            table.
        adopted: graph inputs that take over a quantizer stated by the model.
        accumulators: what the model states of the tensors that steps make (`fheq.stated_accumulators`).
        elements: evaluates regions.
        client: what the client makes of the outputs after decryption, or None where they are the model's (`fheq.client`).
    """

    graph: Graph
    steps: tuple[Step, ...]
    regions: Mapping[str, Region]
    points: Mapping[str, str]
    outputs: Mapping[str, Operand | None]
    adopted: Mapping[str, Affine]
    accumulators: Mapping[str, Affine]
    elements: Elements
    client: Graph | None

    @cached_property
    def encoded(self) -> dict[str, str]:
        """Other encodings of inputs, each with the input."""
        return {node.outputs[0]: node.inputs[0] for node in self.graph.nodes if is_encoding(node)}

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of a tensor of the graph, or of a step's result."""
        return self.graph.types[tensor].shape

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of what is encrypted: the graph's inputs, and other encodings of them (`fheq.encodings`)."""
        return (*(port.name for port in self.graph.inputs), *self.encoded)


@lru_cache(maxsize=32)
def plan(graph: Graph) -> Plan:
    """Plans a graph.

    Raises:
        UnsupportedError: a node that cannot run on encrypted data, named, or an output without elements.
    """
    for port in graph.outputs:
        if 0 in port.type.shape:
            raise UnsupportedError(f"output {port.name!r} has no elements (shape {port.type.shape}): drop it from the model")
    server, client = split(graph)
    server, stated = take_accumulators(server)
    with jax.ensure_compile_time_eval():  # also where the caller is being traced
        exact = bypassed(server, lambda node: is_float_cast(node, server.types))
        simple = settle_decisions(decompose(quantize_before_movement(exact)))
        return Planner(separate_encodings(compose(activate_before_maximum(simple)))).finish(client, stated)


class Planner:
    """Walks the nodes once; the state is what `Plan` holds."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.producers, self.consumers = graph.producers(), graph.consumers()
        self.steps: list[Step] = []
        self.regions: dict[str, Region] = {}
        self.points: dict[str, str] = {}
        self.adopted: dict[str, Affine] = {}
        self.moves: dict[str, Movement] = {}
        self.quantized: set[str] = set()  # sources that hold quantized values, not accumulators
        self.inputs = [port.name for port in graph.inputs]  # and other encodings of them
        for name in self.inputs:
            self.begin(name, quantized=True)
        for node in graph.nodes:
            self.visit(node)

    def finish(self, client: Graph | None, stated: Mapping[str, Affine]) -> Plan:
        outputs: dict[str, Operand | None] = {}
        for port in self.graph.outputs:
            if port.name in self.regions:
                affine = self.regions[port.name].affine
                outputs[port.name] = None if affine else self.operand(port.name)
        parts = self.graph, tuple(self.steps), self.regions, self.points, outputs, self.adopted
        return Plan(*parts, stated, self.evaluator(), client)

    def evaluator(self) -> Elements:
        sources = frozenset([*self.inputs, *(step.out for step in self.steps)])
        return Elements(self.graph, self.moves, sources)

    def begin(self, tensor: str, quantized: bool) -> None:
        """Starts a region at an integer tensor."""
        everything = np.arange(int(np.prod(self.graph.types[tensor].shape)))
        self.regions[tensor] = Region(tensor, everything, tensor, everything, np.zeros(len(everything)), True)
        if quantized:
            self.quantized.add(tensor)

    def add(self, step: Step, quantized: bool = False) -> None:
        self.steps.append(step)
        self.begin(step.out, quantized)

    def visit(self, node: Node) -> None:
        op = lookup(node)
        dynamic = [name for name in dict.fromkeys(node.inputs) if name in self.regions]
        if is_encoding(node):
            self.inputs.append(node.outputs[0])
            self.begin(node.outputs[0], quantized=True)
        elif op.kind is Kind.MOVEMENT:
            self.move(node, dynamic)
        elif op.kind is Kind.ELEMENTWISE:
            self.elementwise(node, dynamic)
        elif op.kind is Kind.LINEAR:
            both = len([name for name in node.inputs[:2] if name in self.regions]) == 2
            self.add(build_product(self, node) if both else build_linear(self, node))
        elif op.kind is Kind.MAX:
            self.add(build_maximum(self, node), quantized=True)
        else:
            raise UnsupportedError(f"{describe(node)}: {node.op} of an encrypted tensor has no integer form")

    # Movement

    def move(self, node: Node, dynamic: list[str]) -> None:
        for name, move in movements(self.graph, node).items():
            if not name:
                continue
            self.moves[name] = move
            sources = {self.regions[d].source for d in dynamic if self.reads(move, d)}
            if len(sources) <= 1:
                self.regions[name] = self.moved_region(move, dynamic)
            else:
                self.join(node, name, move)

    def reads(self, move: Movement, name: str) -> bool:
        return bool(np.any(move.which == move.inputs.index(name)))

    def known(self, move: Movement) -> np.ndarray:
        """Real values of the elements that come from no computed tensor."""
        fill = move.filler.copy()
        for i, name in enumerate(move.inputs):
            if name in self.graph.constants:
                here = move.which == i
                fill[here] = np.asarray(self.graph.constants[name], np.float64).ravel()[move.element[here]]
        return fill

    def moved_region(self, move: Movement, dynamic: list[str]) -> Region:
        read = [d for d in dynamic if self.reads(move, d)] or dynamic[:1]
        regions = [self.regions[d] for d in read]
        size = len(move.which)
        elements, moved = np.full(size, FILLER), np.full(size, FILLER)
        fill = self.known(move)
        for name, region in zip(read, regions):
            here = move.which == move.inputs.index(name)
            at = move.element[here]
            elements[here], moved[here], fill[here] = region.elements[at], region.moved[at], region.fill[at]
        first = regions[0]
        if any(r.root != first.root for r in regions):
            # Branches of one source side by side: the result itself is the place to quantize.
            name = next(n for n, m in self.moves.items() if m is move)
            everything = np.arange(size)
            return Region(first.source, elements, name, everything, np.zeros(size), all(r.affine for r in regions))
        return Region(first.source, elements, first.root, moved, fill, all(r.affine for r in regions))

    def join(self, node: Node, name: str, move: Movement) -> None:
        pieces = tuple(self.operand(d) if d in self.regions else None for d in move.inputs)
        kept = [i for i, piece in enumerate(pieces) if piece is not None]
        position = np.array([kept.index(i) if i in kept else FILLER for i in range(len(pieces))] + [FILLER])
        step = Join(
            name,
            node,
            self.graph.types[name].shape,
            tuple(p for p in pieces if p is not None),
            position[move.which],
            move.element,
            self.known(move),
        )
        self.add(step, quantized=True)

    # Elementwise

    def elementwise(self, node: Node, dynamic: list[str]) -> None:
        out = node.outputs[0]
        shape = self.graph.types[out].shape
        spread = {d: broadcast_elements(self.graph.types[d].shape, shape) for d in dynamic}
        regions = [self.regions[d] for d in dynamic]
        seen = [r.elements[spread[d]] for d, r in zip(dynamic, regions)]
        fused = len({r.source for r in regions}) == 1 and all(np.array_equal(seen[0], s) for s in seen[1:])
        if not fused:
            self.pair(node, dynamic)
        elif self.same_quantizer(node, regions[0]):
            self.regions[out] = regions[0]
            nothing = np.zeros(len(seen[0]), np.int64)  # a copy, also of values between the grid's
            self.moves[out] = Movement((node.inputs[0],), nothing, np.arange(len(nothing)), np.zeros(len(nothing)))
        else:
            everything = np.arange(len(seen[0]))
            affine = all(r.affine for r in regions) and self.is_affine(node)
            self.regions[out] = Region(regions[0].source, seen[0], out, everything, np.zeros(len(everything)), affine)

    def is_affine(self, node: Node) -> bool:
        positions = [i for i, name in enumerate(node.inputs) if name in self.regions]
        allowed = lookup(node).affine
        return set(positions) <= set(allowed) and (len(positions) == 1 or node.op in ("Add", "Sub", "Sum", "Mean"))

    def same_quantizer(self, node: Node, region: Region) -> bool:
        """Whether a stated quantizer meets integers that are on its grid already (it then needs no table).

        A graph input that meets a quantizer adopts it.
        """
        stated = self.graph.pinned.get(node.outputs[0])
        if node.op != "FakeQuant" or stated is None or region.root != region.source:
            return False
        if region.source not in self.quantized:
            return False
        unmoved = np.array_equal(region.moved, np.arange(len(region.moved)))
        if region.source in self.inputs and region.source not in self.adopted and (stated.axis is None or unmoved):
            self.adopted[region.source] = replace(stated, mode=node.attrs["rounding_mode"])
            return True
        held = self.held(region.source)
        return held is not None and stated.axis is None and _same(held, stated)

    def held(self, source: str) -> Affine | None:
        """The stated quantizer of all of a quantized source, if there is one."""
        if source in self.inputs:
            return self.adopted.get(source)
        step = next((s for s in self.steps if s.out == source), None)
        held = [self.graph.pinned.get(o.key) or self.held(o.key) for o in step.operands] if step else []
        first = held[0] if held else None
        return first if first is not None and all(h is not None and _same(h, first) for h in held) else None

    def pair(self, node: Node, dynamic: list[str]) -> None:
        """An op of two encrypted tensors that are functions of different elements."""
        if node.op in ("Add", "Sub", "Sum", "Mul", "Max", "Min") and len(node.inputs) == 2:
            self.add(pairwise(self, node), quantized=node.op in ("Max", "Min"))
            return
        raise UnsupportedError(
            f"{describe(node)}: {node.op} of {len(dynamic)} different encrypted tensors has no integer form; "
            "rewrite it with Add, Sub, Mul, Max, Min, MatMul or comparisons of two tensors"
        )

    # Operands

    def operand(self, tensor: str, absorbs: Callable[[np.ndarray], bool] | None = None) -> Operand:
        """The integers to read for a tensor: those of its source where no table is needed, else those of a new point.

        Args:
            absorbs: given for a reader that takes affine functions of the source's integers; called with the label of each
                element's function (shape of the tensor), it says whether the reader can.
        """
        region = self.regions[tensor]
        shape = self.graph.types[tensor].shape
        if region.source in self.quantized:
            if region.root == region.source:
                return Operand(tensor, region.source, shape, region.moved, region.fill)
            if absorbs and region.affine:
                alike = lambda _, need: np.zeros((len(need), 1))
                labels = self.evaluator().signature(tensor, alike).reshape(shape)
                labels = np.where(region.elements.reshape(shape) == FILLER, -1, labels)
                if absorbs(labels):
                    intercept, one = (self.constant_values(tensor, value) for value in (0.0, 1.0))
                    fill = np.where(region.elements == FILLER, intercept, 0.0)
                    return Operand(tensor, region.source, shape, region.elements, fill, one - intercept, intercept)
        weighed = weighed_decision(self, tensor, absorbs) if absorbs else None
        if weighed is not None:
            return weighed
        self.points[region.root] = region.source
        return Operand(tensor, region.root, shape, region.moved, region.fill)

    def constant_values(self, tensor: str, value: float) -> np.ndarray:
        """The flat values of a tensor when its source is `value` everywhere."""
        size = int(np.prod(self.graph.types[tensor].shape))
        source = lambda _, need: np.full((len(need), 1), value)
        return in_float64(lambda: self.evaluator().evaluate(tensor, np.arange(size), source)).astype(np.float64).ravel()


def _same(a: Affine, b: Affine) -> bool:
    leaves = ("scale", "zero_point", "qmin", "qmax")
    return all(np.array_equal(np.asarray(getattr(a, n)), np.asarray(getattr(b, n))) for n in leaves)
