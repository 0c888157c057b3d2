"""The integers that steps read for a tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fheq.graph import Node
from fheq.origins import is_boolean, is_function_of_one
from fheq.planning.walk import Walk
from fheq.planning.weighed_decisions import weighed_decision
from fheq.regions import COPIES, FILLER
from fheq.steps import Operand, counts_decisions, makes_accumulator


def operand(walk: Walk, tensor: str, absorbs: Callable[[np.ndarray], bool] | None = None) -> Operand:
    """The integers to read for a tensor: those of its source where no table is needed, else those of a new point.

    Args:
        absorbs: given for a reader that takes affine functions of the source's integers; called with the label of each
            element's function (shape of the tensor), it says whether the reader can.
    """
    region = walk.regions[tensor]
    shape = walk.graph.types[tensor].shape
    if region.source in walk.quantized:
        if region.root == region.source:
            return Operand(tensor, region.source, shape, region.moved, region.fill)
        if absorbs and region.affine:
            alike = lambda _, need: np.zeros((len(need), 1))
            labels = walk.evaluator().signature(tensor, alike).reshape(shape)
            labels = np.where(region.elements.reshape(shape) == FILLER, -1, labels)
            if absorbs(labels):
                return walk.affine_operand(tensor)
    weighed = weighed_decision(walk, tensor, absorbs) if absorbs else None
    if weighed is not None:
        return weighed
    walk.points[region.root] = region.source
    return Operand(tensor, region.root, shape, region.moved, region.fill)


def summand(walk: Walk, tensor: str, node: Node) -> Operand:
    """The integers that a sum reads for a tensor: an accumulator as it is, where nothing but sums reads it.

    Not where decisions are made of the sum: the integers of an operand's own grid tell equals from others.
    """
    region = walk.regions[tensor]
    step = next((s for s in walk.steps if s.out == region.source and makes_accumulator(s)), None)
    if step is None or counts_decisions(step) or _decides(walk, node.outputs[0]):
        return operand(walk, tensor)
    if not _leads_to(walk, region.source, node) and not _is_summed(walk, region.source):
        return operand(walk, tensor)
    found = walk.affine_operand(tensor) if region.affine and np.all(region.elements != FILLER) else None
    if found is None or found.slope is None or np.any(found.slope <= 0):
        return operand(walk, tensor)
    same = np.all(found.slope == 1) and np.all(found.intercept == 0)
    return replace(found, slope=None, intercept=None) if same else found


def _decides(walk: Walk, tensor: str) -> bool:
    """Whether nothing but decisions is made of a tensor."""
    readers = walk.consumers.get(tensor, [])
    return bool(readers) and all(is_boolean(walk.graph, name) for reader in readers for name in reader.outputs)


def _leads_to(walk: Walk, source: str, node: Node) -> bool:
    """Whether a node is all that reads a source, whatever movements and functions come before it."""
    kept, stack = {port.name for port in walk.graph.outputs}, [source]
    while stack:
        name = stack.pop()
        if name in kept or name not in walk.regions or walk.regions[name].source != source:
            return False
        stack += [out for reader in walk.consumers.get(name, []) if reader is not node for out in reader.outputs if out]
    return True


def _is_summed(walk: Walk, source: str) -> bool:
    """Whether all that reads a source, moved or as it is, are sums with other tensors that no decisions are made of."""
    kept, stack = {port.name for port in walk.graph.outputs}, [source]
    while stack:
        name = stack.pop()
        if name in kept:
            return False
        for reader in walk.consumers.get(name, []):
            if reader.op in COPIES and reader.inputs[0] == name:
                stack += filter(None, reader.outputs)
            elif not _is_sum(walk, reader) or _decides(walk, reader.outputs[0]):
                return False
    return True


def _is_sum(walk: Walk, node: Node) -> bool:
    read = [name for name in node.inputs if name not in walk.graph.constants]
    sums = node.op in ("Add", "Sub") and len(read) == 2
    return sums and not is_function_of_one(walk.graph, read, node.outputs[0])
