"""Bits of which at most one is 1: the places of one-hot rows, comparisons of one number with different ones.

A product with them reaches no further than its largest terms, one from each row.
"""

from __future__ import annotations

import numpy as np

from fheq.client.one_hot import equality
from fheq.planning.walk import Walk
from fheq.regions import FILLER, broadcast_elements
from fheq.steps import Operand


def alternatives(walk: Walk, x: Operand) -> np.ndarray | None:
    """A number per feature (the last axis of an operand); of those with equal numbers at most one is 1. None where nothing
    is known, or where the rows of the operand differ."""
    found = _compared(walk, x.key)
    if found is None or not x.shape or 0 in x.shape:
        return None
    element, number = (np.where(x.elements == FILLER, FILLER, v[x.elements]).reshape(-1, x.shape[-1]) for v in found)
    groups = [_group(*row) for row in zip(element, number)]
    first = groups[0]
    if first is None or len(np.unique(first)) == len(first):
        return None
    return first if all(g is not None and np.array_equal(g, first) for g in groups) else None


def _group(element: np.ndarray, number: np.ndarray) -> np.ndarray | None:
    """Groups of a row's features by the element that is compared; None where two make the same comparison."""
    unread = element == FILLER
    pairs = np.stack([element, number])[:, ~unread]
    if np.unique(pairs, axis=1).shape != pairs.shape:
        return None
    own = np.where(unread, -1 - np.arange(len(element)), element)
    _, first, group = np.unique(own, return_index=True, return_inverse=True)
    return first[group]


def _compared(walk: Walk, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Of a tensor of comparisons for equality: the element that each one compares, and with what; None for other tensors."""
    node, known = equality(walk.graph, walk.producers, name), walk.graph.constants
    if node is None:
        return None
    computed, constant = sorted(node.inputs, key=lambda n: n in known)
    shape, region = walk.graph.types[name].shape, walk.regions[computed]
    element = region.moved[broadcast_elements(walk.graph.types[computed].shape, shape)]
    return element, np.broadcast_to(known[constant], shape).astype(np.float64).ravel()
