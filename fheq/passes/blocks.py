"""Tables that repeat their entries in blocks: low bits that decide nothing are removed exactly before the table.

A table costs two to three times as much with each bit that it reads; removing a bit exactly takes one small table (that of
concrete's truncate_bit_pattern). Where a table is constant on blocks of 2^k integers, as a comparison or the sign of an
accumulator is, it may read k bits fewer and give the same.

Rounding to the nearest by a power of two, ties to even as in ONNX, makes such blocks but for their first integers, which go
with the block or with the one before. There the bits are removed twice: once to see by the block which way its first integer
goes, and once after 1 was subtracted where that is down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fheq.optimizer.solve import solve
from fheq.passes.ranges import element_ranges
from fheq.program import Instruction, IntProgram, Lookup, Plus, Round, Shift, Value

LEAST = 5  # bits of the narrowest table that is tried
LEFT = (5, 4, 3, 2, 1)  # bits that tables are left with
P_ERROR = 1e-5  # at which costs are compared


class Blocks(NamedTuple):
    """How a table repeats its entries: `table[g, v]` depends on `(v + start[g]) >> lsbs` alone.

    lsbs: low bits that decide nothing; start: `(G,)` from 0 to 2^lsbs - 1; low, high: `(G,)` the entries that are read;
    ties: whether the first integers of some blocks go with the block before.
    """

    lsbs: int
    start: np.ndarray
    low: np.ndarray
    high: np.ndarray
    ties: bool


def read_in_blocks(program: IntProgram) -> IntProgram:
    """The program with low bits removed before tables that do not need them, where that is predicted to be cheaper."""
    wide = _wide(program)
    plain = _found(wide, ties=False)
    found = [plain, {**_found(wide, ties=True), **{name: b for name, b in plain.items() if b.lsbs > 1}}]
    tried = [_rounded(program, each, left) for each in found[: 1 + (found[1] != plain)] if each for left in LEFT]
    return min([program, *tried], key=lambda one: solve(one, P_ERROR, None).solution.total) if tried else program


def blocks(table: np.ndarray, low: np.ndarray, high: np.ndarray, ties: bool) -> Blocks | None:
    """The longest blocks of a table `(G, entries)` of which each row is read from low to high, both `(G,)`."""
    lsbs, first = table.shape[1].bit_length() - 1, np.zeros(len(table), np.int64)
    for g, row in enumerate(table):
        changes = np.flatnonzero(row[low[g] + 1 : high[g] + 1] != row[low[g] : high[g]]) + low[g] + 1
        if len(changes):
            lsbs, first[g] = _longest(changes, lsbs, ties)
        if lsbs == 0:
            return None
    return Blocks(lsbs, -first % (1 << lsbs), low, high, ties)


def _longest(changes: np.ndarray, most: int, ties: bool) -> tuple[int, int]:
    """The low bits of the longest blocks by the places where entries change, and where a block starts."""
    if ties and np.any(np.diff(changes) < 2):  # an entry of its own
        return 0, 0
    for lsbs in range(most, int(ties), -1):
        places = np.unique(changes % (1 << lsbs))
        for first in places if len(places) <= 1 + ties else ():
            if np.all((places - first) % (1 << lsbs) <= ties):
                return lsbs, int(first)
    return 0, 0


def _wide(program: IntProgram) -> list[tuple[Lookup, np.ndarray, np.ndarray]]:
    """The tables that are wide enough to be tried, and by their rows the lowest and the highest entry that is read."""
    wide = [lookup for lookup in program.lookups if lookup.lsbs == 0 and lookup.bits >= LEAST]
    ranges, found = element_ranges(program) if wide else {}, []
    for lookup in wide:
        top = (1 << lookup.bits) - 1
        low, high = ranges[lookup.args[0]]
        wraps = (low < 0) | (high > top)
        group = np.broadcast_to(lookup.group, low.shape).ravel()
        ends = np.zeros((2, len(lookup.table)), np.int64)
        ends[0] = top
        np.minimum.at(ends[0], group, np.where(wraps, 0, low).ravel())
        np.maximum.at(ends[1], group, np.where(wraps, top, high).ravel())
        found.append((lookup, np.minimum(*ends), ends[1]))
    return found


def _found(wide: Sequence[tuple[Lookup, np.ndarray, np.ndarray]], ties: bool) -> dict[str, Blocks]:
    """By the name of their results, the tables that repeat their entries."""
    tried = {lookup.out: blocks(lookup.table, low, high, ties) for lookup, low, high in wide}
    return {name: repeats for name, repeats in tried.items() if repeats is not None}


def _rounded(program: IntProgram, found: Mapping[str, Blocks], left: int) -> IntProgram:
    instructions: list[Instruction] = []
    values = dict(program.values)
    for instruction in program.instructions:
        repeats = found.get(instruction.out)
        lsbs = 0 if repeats is None else min(repeats.lsbs, instruction.bits - left)  # type: ignore[attr-defined]
        if repeats is None or lsbs <= repeats.ties:
            instructions.append(instruction)
            continue
        assert isinstance(instruction, Lookup)
        made = _instead(instruction, repeats, lsbs)
        shape, top = values[instruction.args[0]].shape, (1 << made[-1].bits + lsbs) - 1  # type: ignore[attr-defined]
        high = {Round: top >> lsbs << lsbs, Lookup: 1}
        values |= {one.out: Value(shape, 0, high.get(type(one), top)) for one in made[:-1]}
        instructions += made
    return replace(program, instructions=tuple(instructions), values=values)


def _instead(lookup: Lookup, repeats: Blocks, lsbs: int) -> list[Instruction]:
    """The table that reads `lsbs` bits fewer, after what removes them."""
    start = repeats.start % (1 << lsbs)
    if repeats.ties and np.any(lookup.table[start == 0, 0] != lookup.table[start == 0, 1]):
        start = start + (1 << lsbs)  # a block for what goes down from 0
    bits = max(1, int(np.max(repeats.high + start)).bit_length() - lsbs)
    first = (np.arange(1 << bits)[None, :] << lsbs) - start[:, None]
    entries = lambda at: np.take_along_axis(lookup.table, np.clip(at, repeats.low[:, None], repeats.high[:, None]), axis=1)
    table = entries(first + repeats.ties)
    moved, settled = f"{lookup.out}.moved", f"{lookup.out}.settled"
    amount = (start - (1 << lsbs >> 1))[lookup.group]  # rounding is to the nearest
    made: list[Instruction] = [Shift(moved, lookup.args, amount)]
    if repeats.ties:
        block, down = f"{lookup.out}.block", f"{lookup.out}.down"
        goes_down = (entries(first) != table).astype(np.uint8)
        made.append(Round(block, (moved,), lsbs))
        made.append(replace(lookup, out=down, args=(block,), table=goes_down, lsbs=lsbs, bits=bits))
        made.append(Plus(settled, (moved, down), -1))
    rounded = f"{lookup.out}.rounded"
    made.append(Round(rounded, (made[-1].out,), lsbs))
    return [*made, replace(lookup, args=(rounded,), table=table, lsbs=lsbs, bits=bits)]
