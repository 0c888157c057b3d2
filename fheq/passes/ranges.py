"""Proved ranges of every element of a program: interval arithmetic from the inputs' ranges on."""

from __future__ import annotations

import numpy as np

from fheq.passes.linear_maps import apply_weight
from fheq.passes.rows import distinct
from fheq.program import (
    Convolution,
    Gather,
    Instruction,
    IntProgram,
    Lookup,
    MatMul,
    Plus,
    Round,
    Scale,
    Shift,
    SumLast,
)

Range = tuple[np.ndarray, np.ndarray]


def element_ranges(program: IntProgram) -> dict[str, Range]:
    """Smallest and largest integer of each element of each value, for all inputs in range; int64, of the value's shape.

    They are those of the integers themselves, before a table reads them modulo its width. Equal ends: the element is known.
    """
    ranges: dict[str, Range] = {}
    for entry in program.inputs:
        shape = program.values[entry.value].shape
        affine = entry.affine.expanded(len(shape))
        low, high = (np.broadcast_to(v, shape).astype(np.int64) for v in (affine.qmin, affine.qmax))
        ranges[entry.value] = low, high
    for instruction in program.instructions:
        args = [ranges[a] for a in instruction.args]
        low, high = _range(instruction, args, program.values[instruction.out].shape)
        ranges[instruction.out] = low.astype(np.int64), high.astype(np.int64)
    return ranges


def _range(instruction: Instruction, args: list[Range], shape: tuple[int, ...]) -> Range:
    low, high = args[0]
    if isinstance(instruction, Gather):
        return _gathered(instruction, args, 0, shape), _gathered(instruction, args, 1, shape)
    if isinstance(instruction, (MatMul, Convolution)):
        weight = instruction.weight
        total, span = (apply_weight(instruction, x, w) for x, w in ((low + high, weight), (high - low, np.abs(weight))))
        return (total - span) / 2, (total + span) / 2
    if isinstance(instruction, SumLast):
        return low.sum(axis=-1), high.sum(axis=-1)
    if isinstance(instruction, Shift):
        return low + instruction.amount, high + instruction.amount
    if isinstance(instruction, Scale):
        ends = low * instruction.factor, high * instruction.factor
        return np.minimum(*ends), np.maximum(*ends)
    if isinstance(instruction, Plus):
        a, b = args[1] if instruction.sign > 0 else (-args[1][1], -args[1][0])
        return low + a, high + b
    if isinstance(instruction, Round):
        half = 1 << instruction.lsbs >> 1
        low, high = ((v + half) >> instruction.lsbs << instruction.lsbs for v in (low, high))
        return low, high
    assert isinstance(instruction, Lookup)
    return _looked_up(instruction, low, high)


def _gathered(instruction: Gather, args: list[Range], end: int, shape: tuple[int, ...]) -> np.ndarray:
    flat = np.concatenate([arg[end].ravel() for arg in args])
    if instruction.index is None:
        return flat.reshape(shape)
    values = flat[np.maximum(instruction.index, 0)]
    fill = 0 if instruction.fill is None else instruction.fill
    return np.where(instruction.index < 0, fill, values).reshape(shape)


def reached(instruction: Lookup, low: np.ndarray, high: np.ndarray) -> Range:
    """The entries of a table that integers from low to high can read: all of them where they may wrap around."""
    top = (1 << instruction.bits) - 1
    first, last = low >> instruction.lsbs, high >> instruction.lsbs
    wraps = (first >> instruction.bits) != (last >> instruction.bits)
    return np.where(wraps, 0, first & top), np.where(wraps, top, last & top)


def _looked_up(instruction: Lookup, low: np.ndarray, high: np.ndarray) -> Range:
    first, last = reached(instruction, low, high)
    group = np.broadcast_to(instruction.group, low.shape)
    starts = group * instruction.table.shape[1]
    slices = np.stack([(starts + first).ravel(), (starts + last).ravel() + 1], axis=1)
    at, which = distinct(slices)
    entries = np.append(instruction.table.ravel(), 0)  # a slice may end at the end
    smallest, largest = (
        f.reduceat(entries, slices[at].ravel())[::2].astype(np.int64)[which] for f in (np.minimum, np.maximum)
    )
    return smallest.reshape(low.shape), largest.reshape(low.shape)
