"""The walk over a graph that finds its regions, points and steps: see `fheq.planning.plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fheq.affine import Affine
from fheq.client.encodings import is_encoding
from fheq.errors import UnsupportedError
from fheq.graph import Graph, Node, describe
from fheq.ops.table import Kind, lookup
from fheq.planning.forms import build_linear, build_maximum, build_product, pairwise
from fheq.planning.weighed_decisions import weighed_decision
from fheq.regions import FILLER, Elements, Movement, broadcast_elements, in_float64, is_boolean, movements
from fheq.steps import Join, Operand, Step, counts_decisions, makes_accumulator


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

    def outputs(self) -> dict[str, Operand | None]:
        """The operand that each graph output is; None for an affine function of its source."""
        found: dict[str, Operand | None] = {}
        for port in self.graph.outputs:
            if port.name in self.regions:
                affine = self.regions[port.name].affine
                found[port.name] = None if affine else self.operand(port.name)
        return found

    def evaluator(self) -> Elements:
        """Evaluates the regions found so far."""
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
        elif self.same_quantizer(node, regions[0]) or self.same_numbers(node, regions[0]):
            self.regions[out] = regions[0]
            nothing = np.zeros(len(seen[0]), np.int64)  # a copy, also of values between the grid's
            self.moves[out] = Movement((node.inputs[0],), nothing, np.arange(len(nothing)), np.zeros(len(nothing)))
        else:
            everything = np.arange(len(seen[0]))
            affine = all(r.affine for r in regions) and self.is_affine(node)
            self.regions[out] = Region(regions[0].source, seen[0], out, everything, np.zeros(len(everything)), affine)

    def is_affine(self, node: Node) -> bool:
        if node.op == "Cast" and self.graph.types[node.outputs[0]].dtype.kind == "f":
            return True
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

    def same_numbers(self, node: Node, region: Region) -> bool:
        """Whether a Cast keeps the numbers of a quantized source: integers that become floats, or floats on a whole grid."""
        if node.op != "Cast" or region.source not in self.quantized or region.root != region.source:
            return False
        given, made = (self.graph.types[name].dtype.kind for name in (node.inputs[0], node.outputs[0]))
        held = self.held(region.source)
        whole = held is not None and all(np.all(np.mod(v, 1) == 0) for v in (held.scale, held.scale * held.zero_point))
        return (given in "iu" and made == "f") or (whole and made in "iu")

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

    def summand(self, tensor: str, node: Node) -> Operand:
        """The integers that a sum reads for a tensor: an accumulator as it is, where it goes nowhere else.

        Not where decisions are made of the sum: the integers of an operand's own grid tell equals from others.
        """
        region = self.regions[tensor]
        step = next((s for s in self.steps if s.out == region.source and makes_accumulator(s)), None)
        if step is None or counts_decisions(step) or self.decides(node.outputs[0]) or not self.leads_to(region.source, node):
            return self.operand(tensor)
        found = self.affine_operand(tensor) if region.affine and np.all(region.elements != FILLER) else None
        if found is None or found.slope is None or np.any(found.slope <= 0):
            return self.operand(tensor)
        same = np.all(found.slope == 1) and np.all(found.intercept == 0)
        return replace(found, slope=None, intercept=None) if same else found

    def decides(self, tensor: str) -> bool:
        """Whether nothing but decisions is made of a tensor."""
        readers = self.consumers.get(tensor, [])
        return bool(readers) and all(is_boolean(self.graph, name) for reader in readers for name in reader.outputs)

    def leads_to(self, source: str, node: Node) -> bool:
        """Whether a node is all that reads a source, whatever movements and functions come before it."""
        kept, stack = {port.name for port in self.graph.outputs}, [source]
        while stack:
            name = stack.pop()
            if name in kept or name not in self.regions or self.regions[name].source != source:
                return False
            stack += [out for reader in self.consumers.get(name, []) if reader is not node for out in reader.outputs if out]
        return True

    def affine_operand(self, tensor: str) -> Operand:
        """A tensor as an affine function of its source's integers."""
        region = self.regions[tensor]
        intercept, one = (self.constant_values(tensor, value) for value in (0.0, 1.0))
        fill = np.where(region.elements == FILLER, intercept, 0.0)
        shape = self.graph.types[tensor].shape
        return Operand(tensor, region.source, shape, region.elements, fill, one - intercept, intercept)

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
                    return self.affine_operand(tensor)
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
