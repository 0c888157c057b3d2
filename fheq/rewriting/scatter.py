"""Scatter operators that combine values, as rounds of scatters that do not (a rule of `fheq.rewriting.decompose`)."""

from __future__ import annotations

import numpy as np

from fheq.graph import Node
from fheq.ops.scatter import scatter_places
from fheq.rewriting.edit import Draft

COMBINES = {"add": ("Add", 0), "mul": ("Mul", 1), "max": ("Max", None), "min": ("Min", None)}


def _scatter(draft: Draft, node: Node) -> bool:
    """In each round no place gets more than one update; places without one get what changes nothing."""
    reduction = node.attrs.get("reduction", "none")
    x, indices, updates = node.inputs
    if reduction == "none" or indices not in draft.constants:
        return False
    op, neutral = COMBINES[reduction]
    shape, kind = draft.types[x].shape, draft.types[x].dtype
    places = scatter_places(node, shape, draft.constants[indices])
    rounds = _occurrences(places)
    value = x
    for number in range(rounds.max(initial=-1) + 1):
        here = np.flatnonzero(rounds == number)
        start = value if neutral is None else draft.constant(f"{node.outputs[0]}/start", np.full(shape, neutral), kind)
        chosen = draft.apply(node, "Gather", _flat(draft, node, updates), _known(draft, node, here), axis=0)
        spread = draft.apply(
            node, "ScatterElements", _flat(draft, node, start), _known(draft, node, places[here]), chosen, axis=0
        )
        combined = draft.apply(node, op, _flat(draft, node, value), spread)
        value = combined
    draft.apply(node, "Reshape", value, _known(draft, node, shape), out=node.outputs[0], allowzero=1)
    return True


def _occurrences(places: np.ndarray) -> np.ndarray:
    """For each place, how often it came before."""
    order = np.argsort(places, kind="stable")
    ranked = places[order]
    starts = np.searchsorted(ranked, ranked)
    result = np.empty(len(places), np.int64)
    result[order] = np.arange(len(places)) - starts
    return result


def _known(draft: Draft, node: Node, values: np.ndarray | tuple[int, ...]) -> str:
    return draft.constant(f"{node.outputs[0]}/known", values, np.dtype(np.int64))


def _flat(draft: Draft, node: Node, name: str) -> str:
    return draft.apply(node, "Reshape", name, _known(draft, node, (-1,)), allowzero=0)


RULES = {"ScatterElements": _scatter, "ScatterND": _scatter}
