"""Tensors that hold whole multiples of a step by what makes them: signs, rounded numbers, these clipped and scaled.

In steps of their own they are exact in the fewest integers. Networks of binary or ternary activations, and those that round
in plain operators, have them.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import numpy as np

from fheq.affine import Affine
from fheq.graph import Graph, Node, is_float
from fheq.ops.table import Kind, lookup

NOISE = 1e-6  # relative; constants are float32


class Grid(NamedTuple):
    """Whole multiples of `step` from `low` to `high`, which may be infinite."""

    step: float
    low: float
    high: float


def grid_on(affine: Affine) -> Grid:
    """The values of a quantizer per tensor."""
    low, high = (float(affine.scale * (end - affine.zero_point)) for end in (affine.qmin, affine.qmax))
    return Grid(float(affine.scale), low, high)


def grid_of(graph: Graph, name: str) -> Grid | None:
    """The grid that a tensor's operators keep it on, if they do."""
    node = graph.producers().get(name)
    if node is None or node.domain:
        return None
    if node.op == "Sign":
        return Grid(1.0, -1.0, 1.0)
    if node.op in ("Round", "Floor", "Ceil"):
        return Grid(1.0, -inf, inf)
    computed = [n for n in dict.fromkeys(node.inputs) if n and n not in graph.constants]
    found = grid_of(graph, computed[0]) if len(computed) == 1 else None
    return None if found is None else _after(graph, node, found)


def _after(graph: Graph, node: Node, grid: Grid) -> Grid | None:
    """The grid after one more operator."""
    step, low, high = grid
    if node.op == "Cast" or lookup(node).kind is Kind.MOVEMENT:
        return grid if is_float(graph.types[node.outputs[0]].dtype) else None
    if node.op == "Neg":
        return Grid(step, -high, -low)
    if node.op == "Relu":
        return Grid(step, max(low, 0.0), max(high, 0.0))
    known = [graph.constants[n] for n in node.inputs if n in graph.constants]
    if any(np.size(v) != 1 for v in known):
        return None
    values = [float(np.ravel(v)[0]) for v in known]
    if node.op == "Clip" and all(_is_multiple(v, step) for v in values):
        least = float(np.ravel(graph.constants[node.inputs[1]])[0]) if len(node.inputs) > 1 and node.inputs[1] else -inf
        most = float(np.ravel(graph.constants[node.inputs[2]])[0]) if len(node.inputs) > 2 and node.inputs[2] else inf
        return Grid(step, min(max(low, least), most), max(min(high, most), least))
    factor = _factor(graph, node, values)
    if factor is not None:
        ends = sorted((low * factor, high * factor))
        return Grid(step * abs(factor), *ends)
    shift = _shift(graph, node, values)
    return Grid(step, low + shift, high + shift) if shift is not None and _is_multiple(shift, step) else None


def _factor(graph: Graph, node: Node, values: list[float]) -> float | None:
    """What a node multiplies a tensor by."""
    if len(values) != 1 or values[0] == 0:
        return None
    if node.op == "Mul":
        return values[0]
    return 1 / values[0] if node.op == "Div" and node.inputs[1] in graph.constants else None


def _shift(graph: Graph, node: Node, values: list[float]) -> float | None:
    """What a node adds to a tensor."""
    if len(values) != 1:
        return None
    if node.op == "Add":
        return values[0]
    return -values[0] if node.op == "Sub" and node.inputs[1] in graph.constants else None


def _is_multiple(value: float, step: float) -> bool:
    count = value / step
    return abs(count - round(count)) <= NOISE * max(abs(count), 1.0)
