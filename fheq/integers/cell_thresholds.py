"""Cells of accumulators that end where a stated quantizer's steps do.

Where a model's scales are powers of two, one step of an activation is a power of two of steps of its accumulator. Rounding
that removes as many low bits then loses nothing but the direction of ties, if its cells lie on the quantizer's steps. Of an
accumulator that is not rounded, tables may still be read in such blocks (`fheq.passes.blocks`): it starts with one.
"""

from __future__ import annotations

import numpy as np

from fheq.planning.granularity import channel_axis, first_of_channel
from fheq.planning.plan import Plan
from fheq.steps import Step

CLIPPING = ("Relu", "Clip", "Identity", "Dropout")
NOISE = 1e-6  # relative; scales are float32


def meets_stated_steps(layout: Plan, step: Step) -> bool:
    """Whether all tables of an accumulator are stated quantizers of one scale each, which round to the nearest."""
    stated = [layout.graph.pinned.get(point) for point in _points(layout, step)]
    return bool(stated) and all(a is not None and a.axis is None and a.mode == "ROUND" for a in stated)


def _points(layout: Plan, step: Step) -> list[str]:
    return [point for point, source in layout.points.items() if source == step.out]


def shift_onto_thresholds(
    layout: Plan, step: Step, unit: np.ndarray, zero_point: np.ndarray, lsbs: int
) -> np.ndarray | None:
    """What is added to an accumulator, less than a cell, to have its cells end at thresholds; None where they can't.

    Args:
        unit, zero_point: of the accumulator, `(C,)`.
    """
    if lsbs == 0 or not meets_stated_steps(layout, step):
        return None
    first, *others = (_shift(layout, step, point, unit, zero_point, 2.0**lsbs) for point in _points(layout, step))
    return first if first is not None and all(s is not None and np.all(s == first) for s in others) else None


def block_bits(layout: Plan, step: Step, unit: np.ndarray, most: int) -> int:
    """The low bits, up to `most`, that all steps of the stated quantizers of an accumulator span; 0 where there are none."""
    if not meets_stated_steps(layout, step):
        return 0
    ratios = np.stack([np.asarray(layout.graph.pinned[p].scale, np.float64) / unit for p in _points(layout, step)])
    whole = lambda lsbs: np.all(np.abs(ratios / 2**lsbs - np.round(ratios / 2**lsbs)) <= NOISE * ratios / 2**lsbs)
    return next((lsbs for lsbs in range(most, 0, -1) if np.all(ratios >= 2**lsbs - 0.5) and whole(lsbs)), 0)


def shift_onto_blocks(layout: Plan, step: Step, unit: np.ndarray, zero_point: np.ndarray, lsbs: int) -> np.ndarray | None:
    """As `shift_onto_thresholds`, to have blocks of 2^lsbs integers, counted from 0, start at thresholds."""
    return shift_onto_thresholds(layout, step, unit, zero_point + (1 << lsbs >> 1), lsbs)


def _shift(layout: Plan, step: Step, point: str, unit: np.ndarray, zero_point: np.ndarray, cell: float) -> np.ndarray | None:
    """The shift for one quantizer."""
    added = _added(layout, step, point)
    ratio = np.asarray(layout.graph.pinned[point].scale, np.float64) / (unit * cell)
    cells = np.round(ratio)
    if added is None or np.any(cells < 1) or np.any(np.abs(ratio - cells) > NOISE * cells):
        return None
    middle = (1 - cells) / 2 * cell + added / unit  # the zero point, but for whole cells, with which half a step ends a cell
    return np.floor(np.mod(middle - zero_point, cell) + NOISE)


def _added(layout: Plan, step: Step, point: str) -> np.ndarray | None:
    """What is added to a step's result, per channel or `(1,)`, before a quantizer, if nothing else but clipping is done."""
    total, producers, known = np.zeros(()), layout.graph.producers(), layout.graph.constants
    name = producers[point].inputs[0]
    while name != step.out:
        node = producers[name]
        if node.op == "Add" and any(i in known for i in node.inputs):
            total = total + next(known[i] for i in node.inputs if i in known).astype(np.float64)
        elif node.op not in CLIPPING:
            return None
        name = next(i for i in node.inputs if i not in known)
    if total.ndim > len(step.shape) or np.broadcast_shapes(total.shape, step.shape) != step.shape:
        return None
    return np.ravel(first_of_channel(np.broadcast_to(total, step.shape), channel_axis(layout, step.out)))
