"""The state of the walk over a graph: the regions, points and steps that it has found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fheq.affine import Affine
from fheq.graph import Graph, Node, is_float
from fheq.ops.table import lookup
from fheq.regions import FILLER, Elements, Movement, in_float64
from fheq.steps import Operand, Step


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


class Walk:
    """What `fheq.planning.planner` fills while it visits the nodes, and `Plan` holds."""

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

    def is_affine(self, node: Node) -> bool:
        if node.op == "Cast" and is_float(self.graph.types[node.outputs[0]].dtype):
            return True
        if node.op == "Whole":  # an accumulator of a MatMulInteger; it would round the slope of anything else
            region = self.regions[node.inputs[0]]
            return region.root == region.source and region.source not in self.inputs
        positions = [i for i, name in enumerate(node.inputs) if name in self.regions]
        allowed = lookup(node).affine
        return set(positions) <= set(allowed) and (len(positions) == 1 or node.op in ("Add", "Sub", "Sum", "Mean"))

    def affine_operand(self, tensor: str) -> Operand:
        """A tensor as an affine function of its source's integers."""
        region = self.regions[tensor]
        intercept, one = (self.constant_values(tensor, value) for value in (0.0, 1.0))
        fill = np.where(region.elements == FILLER, intercept, 0.0)
        shape = self.graph.types[tensor].shape
        return Operand(tensor, region.source, shape, region.elements, fill, one - intercept, intercept)

    def constant_values(self, tensor: str, value: float) -> np.ndarray:
        """The flat values of a tensor when its source is `value` everywhere."""
        size = int(np.prod(self.graph.types[tensor].shape))
        source = lambda _, need: np.full((len(need), 1), value)
        return in_float64(lambda: self.evaluator().evaluate(tensor, np.arange(size), source)).astype(np.float64).ravel()
