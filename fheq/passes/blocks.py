"""Tables that repeat their entries in blocks: low bits that decide nothing are removed exactly before the table.

A table costs two to three times as much with each bit that it reads; removing a bit exactly takes one small table (that of
concrete's truncate_bit_pattern). Where a table is constant on blocks of 2^k integers, as a comparison or the sign of an
accumulator is, it may read k bits fewer and give the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fheq.optimizer.solve import solve
from fheq.passes.ranges import element_ranges
from fheq.program import Instruction, IntProgram, Lookup, Round, Shift, Value

LEAST = 5  # bits of the narrowest table that is tried
LEFT = (5, 4, 3, 2, 1)  # bits that tables are left with
P_ERROR = 1e-5  # at which costs are compared


class Blocks(NamedTuple):
    """How a table repeats its entries: `table[g, v]` depends on `(v + start[g]) >> lsbs` alone.

    lsbs: low bits that decide nothing; start: `(G,)` from 0 to 2^lsbs - 1; low, high: `(G,)` the entries that are read.
    """

    lsbs: int
    start: np.ndarray
    low: np.ndarray
    high: np.ndarray


def read_in_blocks(program: IntProgram) -> IntProgram:
    """The program with low bits removed before tables that do not need them, where that is predicted to be cheaper."""
    found = _found(program)
    if not found:
        return program
    tried = [program, *(_rounded(program, found, left) for left in LEFT)]
    return min(tried, key=lambda one: solve(one, P_ERROR, None).solution.total)


def blocks(table: np.ndarray, low: np.ndarray, high: np.ndarray) -> Blocks | None:
    """The longest blocks of a table `(G, entries)` of which each row is read from low to high, both `(G,)`."""
    lsbs, first = table.shape[1].bit_length() - 1, np.zeros(len(table), np.int64)
    for g, row in enumerate(table):
        changes = np.flatnonzero(row[low[g] + 1 : high[g] + 1] != row[low[g] : high[g]]) + low[g] + 1
        if len(changes):
            first[g] = changes[0]
            step = int(np.gcd.reduce(np.diff(changes))) if len(changes) > 1 else 0
            lsbs = min(lsbs, (step & -step).bit_length() - 1) if step else lsbs
        if lsbs == 0:
            return None
    return Blocks(lsbs, -first % (1 << lsbs), low, high)


def _found(program: IntProgram) -> dict[str, Blocks]:
    """By the name of their results, the tables that repeat their entries."""
    wide = [lookup for lookup in program.lookups if lookup.lsbs == 0 and lookup.bits >= LEAST]
    if not wide:
        return {}
    ranges, found = element_ranges(program), {}
    for lookup in wide:
        top = (1 << lookup.bits) - 1
        low, high = ranges[lookup.args[0]]
        wraps = (low < 0) | (high > top)
        group = np.broadcast_to(lookup.group, low.shape).ravel()
        ends = np.zeros((2, len(lookup.table)), np.int64)
        ends[0] = top
        np.minimum.at(ends[0], group, np.where(wraps, 0, low).ravel())
        np.maximum.at(ends[1], group, np.where(wraps, top, high).ravel())
        repeats = blocks(lookup.table, np.minimum(*ends), ends[1])
        if repeats is not None:
            found[lookup.out] = repeats
    return found


def _rounded(program: IntProgram, found: Mapping[str, Blocks], left: int) -> IntProgram:
    instructions: list[Instruction] = []
    values = dict(program.values)
    for instruction in program.instructions:
        repeats = found.get(instruction.out)
        lsbs = 0 if repeats is None else min(repeats.lsbs, instruction.bits - left)  # type: ignore[attr-defined]
        if repeats is None or lsbs <= 0:
            instructions.append(instruction)
        else:
            assert isinstance(instruction, Lookup)
            made = _instead(instruction, repeats, lsbs)
            shape, top = values[instruction.args[0]].shape, (1 << made[2].bits + lsbs) - 1
            values |= {one.out: Value(shape, 0, high) for one, high in zip(made, (top, top >> lsbs << lsbs))}
            instructions += made
    return replace(program, instructions=tuple(instructions), values=values)


def _instead(lookup: Lookup, repeats: Blocks, lsbs: int) -> tuple[Shift, Round, Lookup]:
    """The table that reads `lsbs` bits fewer, after what removes them."""
    start = repeats.start % (1 << lsbs)
    bits = max(1, int(np.max(repeats.high + start)).bit_length() - lsbs)
    entries = (np.arange(1 << bits)[None, :] << lsbs) - start[:, None]
    at = np.clip(entries, repeats.low[:, None], repeats.high[:, None])
    table = np.take_along_axis(lookup.table, at, axis=1)
    moved, rounded = f"{lookup.out}.moved", f"{lookup.out}.rounded"
    amount = (start - (1 << lsbs >> 1))[lookup.group]  # rounding is to the nearest
    return (
        Shift(moved, lookup.args, amount),
        Round(rounded, (moved,), lsbs),
        replace(lookup, args=(rounded,), table=table, lsbs=lsbs, bits=bits),
    )
