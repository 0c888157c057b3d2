"""Scores of a softmax so far below the greatest of their row that they become 0, as those are that a mask hides.

A quantizer that reached down to a mask of -10,000 would leave the scores few of its steps. What is clipped at `depth` below
the least maximum of any row becomes less than half a step of the softmax all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log
from typing import NamedTuple

import numpy as np

from fheq.observing.statistics import Stats, clipped
from fheq.planning.plan import Plan
from fheq.steps import Add, Maximum, Operand, Step

UNSEEN = 0.5  # how far beyond the observed span unseen values may be, as a part of it


def depth(bits: int) -> float:
    """How far below the maximum x is where exp(x - maximum) is half a step of an integer of that many bits."""
    return (bits + 1) * log(2)


class Floors(NamedTuple):
    """Values below which nothing matters: of tensors, and of what accumulators then still reach."""

    tensors: dict[str, float]
    accumulators: dict[str, float]


def limited(stats: Stats, floors: Mapping[str, float], ceilings: Mapping[str, float]) -> Stats:
    """The statistics of tensors when clipped below, or above."""
    found = dict(stats)
    for name in {**floors, **ceilings}:
        found[name] = clipped(found[name], floors.get(name, -np.inf), ceilings.get(name, np.inf))
    return found


def floors_of(layout: Plan, stats: Stats, bits: Callable[[str], int]) -> Floors:
    """Of scores that a softmax alone reads, of what alone is added up to them, and of what they are less something.

    Args:
        bits: of a quantized tensor.
    """
    readers: dict[str, list[Step]] = {}
    for step in layout.steps:
        for operand in step.operands:
            readers.setdefault(operand.key, []).append(step)
    tensors: dict[str, float] = {}
    accumulators: dict[str, float] = {}
    for step in layout.steps:
        if isinstance(step, Maximum) and step.sign == 1 and len(step.xs) == 1 and step.out in stats:
            key = step.xs[0].key
            powers = _powers(layout, readers[key], key)
            if powers and key in stats:
                tensors[key] = floor = float(np.min(stats[step.out].minimum)) - depth(bits(key))
                accumulators |= {power.out: floor - _greatest(stats, power.b, UNSEEN) for power in powers}
                parts = _parts(layout, stats, readers, key, floor)
                tensors |= parts
                if parts:
                    accumulators[key] = sum(max(low, float(np.min(stats[part].minimum))) for part, low in parts.items())
    return Floors(tensors, accumulators)


def _powers(layout: Plan, readers: Sequence[Step], key: str) -> list[Add]:
    """The differences of the scores `key` and their maximum, or the like, if nothing but exponentials is made of them."""
    differences = [step for step in readers if isinstance(step, Add) and step.sign == -1 and step.a.key == key]
    plain = all(operand.slope is None for step in readers for operand in step.operands)
    only = len(differences) + 1 == len(readers) and all(_to_exponentials(layout, step.out) for step in differences)
    return differences if plain and only and not _is_output(layout, key) else []


def _to_exponentials(layout: Plan, difference: str) -> bool:
    readers = layout.graph.consumers().get(difference, [])
    return not _is_output(layout, difference) and bool(readers) and all(node.op == "Exp" for node in readers)


def _parts(layout: Plan, stats: Stats, readers: Mapping[str, Sequence[Step]], key: str, floor: float) -> dict[str, float]:
    """Where the scores are the sum of two tensors: below what each makes them negligible whatever the other is."""
    made = next((step for step in layout.steps if step.out == key == layout.points.get(key)), None)
    if not isinstance(made, Add) or made.sign != 1 or made.a.key == made.b.key:
        return {}
    for part in made.operands:
        if part.slope is not None or part.key not in stats or readers[part.key] != [made] or _is_output(layout, part.key):
            return {}
    return {made.a.key: floor - _greatest(stats, made.b), made.b.key: floor - _greatest(stats, made.a)}


def _greatest(stats: Stats, operand: Operand, beyond: float = 0.0) -> float:
    """The greatest value of a tensor, or one beyond it, in parts of the observed span."""
    seen = stats[operand.key]
    low, high = float(np.min(seen.minimum)), float(np.max(seen.maximum))
    return high + beyond * (high - low)


def _is_output(layout: Plan, key: str) -> bool:
    held = {name if operand is None else operand.key for name, operand in layout.outputs.items()}
    return key in held or any(layout.regions[name].source == key for name in held if name in layout.regions)
