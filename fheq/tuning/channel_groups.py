"""Tensors between linear layers whose channels all their readers see alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fheq.planning.plan import Plan
from fheq.rewriting.weights import replaceable
from fheq.steps import Linear
from fheq.tuning.surgeon import one_matrix


@dataclass(frozen=True)
class Group:
    """A tensor whose channels may go or change their units, and the layers that read it.

    Args:
        readers: linear steps; the inputs of all have the same channels.
        share: share of the model's tables that one channel takes; none of what the client encodes.
    """

    key: str
    readers: tuple[Linear, ...]
    share: float


def read_by_linear(layout: Plan) -> list[Group]:
    """The tensors that linear steps alone read, all with the same channels."""
    readers: dict[str, list[Any]] = {}
    for step in layout.steps:
        for operand in step.operands:
            readers.setdefault(operand.key, []).append(step)
    kept = {operand.key for operand in layout.outputs.values() if operand is not None}
    tables = sum(int(np.prod(layout.shape(point))) for point in layout.points if point not in layout.encoded_ahead)
    found = []
    for key, steps in readers.items():
        if key in layout.inputs or key in kept or not all(_changeable(layout, step) for step in steps):
            continue
        first, *others = (elements_by_channel(step) for step in steps)
        alike = all(len(s) == len(first) and all(map(np.array_equal, s, first)) for s in others)
        if alike and _disjoint(first):
            free = not tables or key in layout.encoded_ahead
            share = 0.0 if free else max(map(len, first)) / tables
            found.append(Group(key, tuple(steps), share))
    return found


def _changeable(layout: Plan, step: Any) -> bool:
    return isinstance(step, Linear) and replaceable(layout.graph, step) and step.x.slope is None and one_matrix(step)


def elements_by_channel(step: Linear) -> list[np.ndarray]:
    """The elements of the key that each input channel holds."""
    axis = len(step.x.shape) - 1 if step.form == "matmul" else 1
    rows = np.moveaxis(step.x.elements.reshape(step.x.shape), axis, 0).reshape(step.x.shape[axis], -1)
    return [np.unique(row[row >= 0]) for row in rows]


def _disjoint(sets: list[np.ndarray]) -> bool:
    everything = np.concatenate(sets)
    return len(np.unique(everything)) == len(everything)
