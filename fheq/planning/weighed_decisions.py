"""Operands that are affine functions of a decision: the reader's weights take them in, and the table makes bits.

Of `off + slope * b` an operand needs no table but the comparison's own. `fheq.rewriting.decisions` brings functions of
decisions to this form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from fheq.ops.table import Kind, lookup
from fheq.origins import is_boolean
from fheq.planning.walk import Walk
from fheq.regions import FILLER, Elements, broadcast_elements, in_float64
from fheq.rewriting.decisions import function_labels
from fheq.steps import Operand


def weighed_decision(walk: Walk, tensor: str, absorbs: Callable[[np.ndarray], bool]) -> Operand | None:
    """The bits that a tensor is an affine function of, element by element, where nobody else reads a tensor in between.

    Args:
        absorbs: as for `operand`.
    """
    found = _decision(walk, tensor)
    if found is None:
        return None
    decision, at = found
    size, shape = len(at), walk.graph.types[tensor].shape
    elements = Elements(walk.graph, walk.moves, frozenset([decision]))
    value = lambda bit: elements.evaluate(tensor, np.arange(size), lambda _, need: np.full((len(need), 1), bit))
    off, on = (in_float64(partial(value, bit)).astype(np.float64).ravel() for bit in (0.0, 1.0))
    (reader,) = walk.consumers[tensor]
    labels = function_labels(reader.op, off, on)
    region = walk.regions[decision]
    moved = region.moved[at]
    if labels is None or np.any(moved == FILLER) or not absorbs(labels.reshape(shape)):
        return None
    walk.points[region.root] = region.source
    return Operand(tensor, region.root, shape, moved, np.zeros(size), on - off, off)


def _decision(walk: Walk, tensor: str) -> tuple[str, np.ndarray] | None:
    """The boolean tensor before a chain of movements and affine nodes, and the element of it for each of the tensor's."""
    types, name = walk.graph.types, tensor
    at = np.arange(int(np.prod(types[tensor].shape)))
    while name != walk.regions[name].source:
        node = walk.producers[name]
        if is_boolean(walk.graph, name):
            return (name, at) if name != tensor else None
        computed = [n for n in dict.fromkeys(node.inputs) if n in walk.regions]
        if len(computed) != 1 or len(walk.consumers.get(name, ())) != 1 or name in walk.graph.pinned:
            return None
        if lookup(node).kind is Kind.MOVEMENT:
            move = walk.moves[name]
            if np.any(move.which[at] != move.inputs.index(computed[0])):
                return None
            at = move.element[at]
        elif walk.is_affine(node):
            at = broadcast_elements(types[computed[0]].shape, types[name].shape)[at]
        else:
            return None
        name = computed[0]
    return None
