"""Inputs that are only compared with known thresholds: the features of trees, binarized ones.

All that is asked of such a value is on which side of each threshold it lies. So the edges between the steps of its quantizer
are laid on the thresholds, where rounding changes no decision: on the lowest and the highest of them exactly, on those
between as nearly as the bits allow, in the fewest steps that do so. What lies beyond them all saturates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from fheq.affine import Affine
from fheq.fitting.whole_numbers import is_whole
from fheq.graph import Node
from fheq.observing.statistics import TensorStats
from fheq.planning.plan import Plan
from fheq.regions import in_float64

CLOSED = {"LessOrEqual": True, "Greater": True, "Less": False, "GreaterOrEqual": False}
"""Comparisons of `x` with a threshold, and whether the threshold itself goes with what is below."""
TRIED = 1024  # numbers of steps, beside the most that bits allow
PRECISION = 2.0**-22  # relative error of thresholds in float32


@dataclass(frozen=True, eq=False)
class Edges:
    """Where the decisions of an input change.

    Args:
        element: `(n,)` flat elements of the input, one per edge.
        edge: `(n,)` the real values at which their decisions change.
        free: by element, whether decisions are all that it is read for.
    """

    element: np.ndarray
    edge: np.ndarray
    free: np.ndarray


@lru_cache(maxsize=64)
def edges_of(layout: Plan, key: str) -> Edges:
    """The thresholds of an input of the plan."""
    free = np.ones(int(np.prod(layout.shape(key))), bool)
    operands = [operand for step in layout.steps for operand in step.operands]
    for operand in (*operands, *(o for o in layout.outputs.values() if o is not None)):
        if operand.key == key:
            free[operand.elements[operand.elements >= 0]] = False
    read = [name for name, source in layout.points.items() if source == key]
    read += [o for o, operand in layout.outputs.items() if operand is None and layout.regions[o].source == key]
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for name, node in _made_by(layout, read):
        if _is_comparison(layout, node):
            found.append(_edges(layout, key, node))
        elif key in node.inputs:
            elements = layout.regions[name].elements
            free[elements[elements >= 0]] = False
    element, edge = (np.concatenate(column) for column in zip(*found)) if found else (np.zeros(0, int), np.zeros(0))
    return Edges(element, edge, free)


def _made_by(layout: Plan, tensors: list[str]) -> Iterator[tuple[str, Node]]:
    """Tensors of the regions that end in `tensors`, and what makes them, back to comparisons or to the source."""
    producers, seen, stack = layout.graph.producers(), set(), list(tensors)
    while stack:
        name = stack.pop()
        node = producers.get(name)
        if name in seen or node is None or name not in layout.regions or node.op == "IsNaN":  # what is quantized is a number
            continue
        seen.add(name)
        yield name, node
        if not _is_comparison(layout, node):
            stack += node.inputs


def _is_comparison(layout: Plan, node: Node) -> bool:
    """Whether a node asks on which side of a threshold an affine function of its source lies."""
    computed = [name for name in node.inputs if name in layout.regions]
    return node.op in CLOSED and node.domain == "" and all(layout.regions[name].affine for name in computed)


def _edges(layout: Plan, key: str, node: Node) -> tuple[np.ndarray, np.ndarray]:
    """Elements and thresholds of a comparison."""
    out = node.outputs[0]
    shape, elements = layout.shape(out), layout.regions[out].elements

    def difference(value: float) -> np.ndarray:
        """Of the two sides, where the source is `value`."""
        sides = [np.broadcast_to(_values(layout, name, value), shape).ravel() for name in node.inputs]
        with np.errstate(invalid="ignore"):
            return sides[0] - sides[1]

    start = difference(0.0)
    slope = difference(1.0) - start
    with np.errstate(divide="ignore", invalid="ignore"):
        root = -start / slope
    kept = np.isfinite(root) & (elements >= 0)
    below = (slope > 0) == CLOSED[node.op]
    return elements[kept], _between(root[kept], below[kept], layout.graph.types[key].dtype)


def _between(root: np.ndarray, below: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """An edge for each threshold, between it and the next number of the input's type: above it where it goes with what is
    below."""
    if dtype not in (np.float16, np.float32):
        return root
    nearest = root.astype(dtype)
    upper, lower = (np.nextafter(nearest, dtype.type(end)) for end in (np.inf, -np.inf))
    low = np.where(below, np.where(nearest > root, lower, nearest), np.where(nearest < root, nearest, lower))
    high = np.where(below, np.where(nearest > root, nearest, upper), np.where(nearest < root, upper, nearest))
    return (low.astype(np.float64) + high.astype(np.float64)) / 2


def _values(layout: Plan, tensor: str, value: float) -> np.ndarray:
    shape = layout.shape(tensor)
    if tensor in layout.graph.constants:
        return np.asarray(layout.graph.constants[tensor], np.float64)
    every = np.arange(int(np.prod(shape)))
    found = in_float64(lambda: layout.elements.evaluate(tensor, every, lambda _, need: np.full((len(need), 1), value)))
    return found.astype(np.float64).reshape(shape)


def on_edges(layout: Plan, key: str, affine: Affine, seen: TensorStats, bits: int) -> Affine:
    """The quantizer of an input, fitted to its thresholds where it is read for nothing else.

    Args:
        affine: as fitted to what was seen; channels that are read otherwise keep it.
        seen: by channel as `affine` has them.
        bits: for at most 2^bits steps.
    """
    found = edges_of(layout, key)
    if not len(found.edge):
        return affine
    shape = layout.shape(key)
    channel = (np.zeros(shape, int) if affine.axis is None else np.indices(shape)[affine.axis]).ravel()
    leaves = {name: np.atleast_1d(np.array(getattr(affine, name), np.float64)) for name in ("scale", "zero_point", "qmax")}
    whole = is_whole(seen, bits)
    free = [c for c in range(len(leaves["scale"])) if np.all(found.free[channel == c])]
    if not free:
        return affine
    for c in free:
        edge = found.edge[channel[found.element] == c]
        edge = np.unique(np.floor(edge) + 0.5 if whole[c] else edge)
        span = leaves["scale"][c] * leaves["qmax"][c]
        leaves["scale"][c], leaves["zero_point"][c], leaves["qmax"][c] = steps_between(edge, bits, span)
    scale, zero_point, qmax = (leaf.reshape(np.shape(affine.scale)) for leaf in leaves.values())
    return replace(affine, scale=scale, zero_point=zero_point, qmax=qmax, mode="HALF_EVEN")


def steps_between(edge: np.ndarray, bits: int, span: float) -> tuple[float, float, int]:
    """Scale, zero point (which may be fractional) and largest integer of steps with edges on the first and the last of
    ascending thresholds, and as near to the others as any number of steps up to 2^bits comes.

    Args:
        span: of what was seen: the steps of an input with one threshold, or none, are half of it.
    """
    most = 2**bits - 2
    if len(edge) > 1 and most < 1:
        edge = edge[len(edge) // 2 :][:1]
    if len(edge) < 2:
        middle = edge[0] if len(edge) else 0.0
        return span / 2, 0.5 - 2 * middle / span, 1
    size = edge[-1] - edge[0]
    counts = np.unique(np.append(np.arange(1, min(most, TRIED) + 1), most))
    place = (edge - edge[0]) / size * counts[:, None]
    missed = np.sum(np.abs(place - np.round(place)), axis=1) / counts
    exact = len(edge) * PRECISION * np.max(np.abs(edge)) / size
    count = counts[np.argmax(missed <= np.min(missed) + exact)]
    return size / count, 0.5 - edge[0] * count / size, int(count) + 1
