"""Tables on a table's results alone, multiples of such results, tables that change nothing in an input: one table, and none.

concrete merges the first kind too; done here, predictions know of it. A multiple of a table's result has so many times its
noise, where a table of multiples has its own. The last kind costs concrete a bootstrap.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from fheq.program import Gather, Instruction, IntProgram, Lookup, Scale


def merge_tables(program: IntProgram) -> IntProgram:
    """The program with such tables merged into others or left out."""
    program = _without_identities(program)
    readers = Counter(arg for i in program.instructions for arg in i.args)
    readers.update(entry.value for entry in program.outputs)
    made: dict[str, Instruction] = {}
    for i in program.instructions:
        first = made.get(i.args[0])
        if isinstance(i, Lookup) and isinstance(first, Lookup) and i.lsbs == 0 and readers[first.out] == 1:
            del made[first.out]
            i = _merged(first, i, program.values[i.out].shape)
        elif isinstance(i, Scale) and isinstance(first, Lookup) and readers[first.out] == 1:
            del made[first.out]
            i = _multiplied(first, i, program.values[i.out].shape)
        made[i.out] = i
    return replace(program, instructions=tuple(made.values()))


def _merged(first: Lookup, then: Lookup, shape: tuple[int, ...]) -> Lookup:
    """Two tables, one after the other, as one."""
    groups = np.stack([np.broadcast_to(lookup.group, shape).ravel() for lookup in (first, then)])
    (a, b), group = np.unique(groups, axis=1, return_inverse=True)
    between = first.table[a].astype(np.int64) & ((1 << then.bits) - 1)
    table = np.take_along_axis(then.table[b], between, axis=1)
    return replace(first, out=then.out, table=table, group=group.reshape(shape), origin=then.origin)


def _multiplied(lookup: Lookup, scale: Scale, shape: tuple[int, ...]) -> Lookup:
    """A table whose results are multiplied, as a table of multiples."""
    parts = np.stack([np.broadcast_to(part, shape).ravel() for part in (lookup.group, scale.factor)])
    (group, factor), at = np.unique(parts, axis=1, return_inverse=True)
    table = lookup.table[group].astype(np.int64) * factor[:, None]
    return replace(lookup, out=scale.out, table=table, group=at.reshape(shape))


def _without_identities(program: IntProgram) -> IntProgram:
    """Without the tables that give the integers of an input, perhaps moved, as they are."""
    plain = {entry.value for entry in program.inputs}
    renamed: dict[str, str] = {}
    instructions: list[Instruction] = []
    for i in program.instructions:
        i = replace(i, args=tuple(renamed.get(arg, arg) for arg in i.args))
        if isinstance(i, Gather) and plain.issuperset(i.args):
            plain.add(i.out)
        if isinstance(i, Lookup) and i.args[0] in plain and _is_identity(i, program.values[i.args[0]].high):
            renamed[i.out] = i.args[0]
        else:
            instructions.append(i)
    outputs = tuple(replace(entry, value=renamed.get(entry.value, entry.value)) for entry in program.outputs)
    return replace(program, instructions=tuple(instructions), outputs=outputs) if renamed else program


def _is_identity(lookup: Lookup, high: int) -> bool:
    return bool(np.all(lookup.table[:, : high + 1] == np.arange(high + 1)))
