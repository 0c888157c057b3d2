"""Tables on nothing but a table's results, and tables of inputs that change nothing: one table, and none.

concrete merges the first kind too; done here, predictions know of it. The second kind costs it a bootstrap.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from fheq.program import Gather, Instruction, IntProgram, Lookup


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
        made[i.out] = i
    return replace(program, instructions=tuple(made.values()))


def _merged(first: Lookup, then: Lookup, shape: tuple[int, ...]) -> Lookup:
    """Two tables, one after the other, as one."""
    groups = np.stack([np.broadcast_to(lookup.group, shape).ravel() for lookup in (first, then)])
    (a, b), group = np.unique(groups, axis=1, return_inverse=True)
    between = first.table[a].astype(np.int64) & ((1 << then.bits) - 1)
    table = np.take_along_axis(then.table[b], between, axis=1)
    return replace(then, args=first.args, table=table, group=group.reshape(shape), lsbs=first.lsbs, bits=first.bits)


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
