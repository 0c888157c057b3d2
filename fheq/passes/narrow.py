"""Tables on values that leveled operations tie to wider ones than any table reads.

concrete gives connected values one width, and refuses tables on more than 16 bits, however few of them a value uses. There
its bits are moved to the top, and the rest is removed approximately: nothing of the value is lost. So it is where bits were
removed exactly, which is done at any width: what is left lies at the top.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fheq.optimizer.leveled import connected_widths
from fheq.program import Instruction, IntProgram, Lookup, Round, Scale, Value
from fheq.spec import MAX_TABLE_BITS


def narrow_wide(program: IntProgram) -> IntProgram:
    """The program with such tables on the bits that their values use."""
    widths = connected_widths(program)
    approximate = {i.out for i in program.instructions if isinstance(i, Round) and i.approximate}
    values, instructions, made = dict(program.values), list[Instruction](), dict[str, str]()
    for instruction in program.instructions:
        x = instruction.args[0]
        if isinstance(instruction, Lookup) and x not in approximate and widths[x] > MAX_TABLE_BITS:
            lsbs = widths[x] - instruction.bits
            if x not in made:
                up, raised, made[x] = lsbs - instruction.lsbs, x, f"{x}/narrowed"
                if up:
                    raised = f"{x}/raised"
                    instructions.append(Scale(raised, (x,), np.asarray(1 << up)))
                instructions.append(Round(made[x], (raised,), lsbs, True))
                values |= dict.fromkeys((raised, made[x]), Value(values[x].shape, 0, values[x].high << up))
            instruction = replace(instruction, args=(made[x],), lsbs=lsbs)
        instructions.append(instruction)
    return replace(program, instructions=tuple(instructions), values=values) if made else program
