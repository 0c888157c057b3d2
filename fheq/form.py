"""What programs have in common that differ in their numbers alone: weights, tables and what is removed before these.

A search simulates dozens of quantizations of one graph. Functions of a form, whose arguments are the numbers, are compiled
for all of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np

from fheq.program import Convolution, Gather, Instruction, IntProgram, Lookup, MatMul, Plus, Round, Scale, Shift

Array = Any
Numbers = Sequence[Mapping[str, Array]]
NOISY_REACH = 2  # tables that change the sign of their results at most double what values and partial sums reach
SMALL = 1 << 8  # entries of tables that are brought to one shape


@dataclass(frozen=True)
class Form:
    """What a function of programs is compiled for.

    Args:
        fingerprint: equal for programs of one form.
        program: one of them, whose numbers are not to be read: see `with_numbers`.
        wide: whether values are kept in 64 bits.
    """

    fingerprint: bytes
    program: IntProgram = field(compare=False)
    wide: bool = field(compare=False)

    def with_numbers(self, numbers: Numbers) -> IntProgram:
        """The program with numbers, which may be tracers, in its instructions."""
        changed = tuple(replace(i, **own) for i, own in zip(self.program.instructions, numbers, strict=True))
        return replace(self.program, instructions=changed)


@lru_cache(maxsize=4)
def form_of(program: IntProgram, noisy: bool = False) -> tuple[Form, Numbers]:
    """The form of a program, and its numbers.

    Args:
        noisy: whether tables may fail, so that values go beyond their ranges.
    """
    limit = 2**31 // (NOISY_REACH if noisy else 1)
    wide = not all(v.low > -limit and v.high < limit for v in program.values.values())
    known = sha256(repr((noisy, wide)).encode())
    for entry in (*program.inputs, *program.outputs):
        known.update(repr((entry.value, entry.port.type.shape, entry.port.batch_axis)).encode())
    for instruction in program.instructions:
        shape = program.values[instruction.out].shape
        known.update(repr((type(instruction).__name__, instruction.out, instruction.args, shape)).encode())
        for part in _kept(instruction):
            known.update(part.tobytes() + repr(part.shape).encode() if isinstance(part, np.ndarray) else repr(part).encode())
    numbers = tuple(_numbers(program, i, NOISY_REACH if noisy else 1) for i in program.instructions)
    return Form(known.digest(), program, wide), numbers


def _kept(instruction: Instruction) -> tuple[Any, ...]:
    """What an instruction does beside its numbers."""
    if isinstance(instruction, Gather):
        return instruction.index, instruction.fill
    if isinstance(instruction, MatMul):
        return (instruction.left,)
    if isinstance(instruction, Convolution):
        return instruction.strides, instruction.dilations, instruction.group
    if isinstance(instruction, Plus):
        return (instruction.sign,)
    if isinstance(instruction, Round):
        return (instruction.approximate, None if instruction.approximate else instruction.lsbs)
    return ()


def _numbers(program: IntProgram, instruction: Instruction, spare: int) -> dict[str, Any]:
    """The fields of an instruction that are numbers.

    Args:
        spare: how many times further than they should values may reach.
    """
    if isinstance(instruction, (MatMul, Convolution)):
        return {"weight": instruction.weight.astype(_float_type(program, instruction, spare))}
    if isinstance(instruction, Shift):
        return {"amount": instruction.amount}
    if isinstance(instruction, Scale):
        return {"factor": instruction.factor}
    if isinstance(instruction, Round) and instruction.approximate:
        return {"lsbs": np.int32(instruction.lsbs)}
    if isinstance(instruction, Lookup):
        return {
            "table": _of_common_shape(instruction.table),
            "group": instruction.group.astype(np.int32),
            "lsbs": np.int32(instruction.lsbs),
            "bits": np.int32(instruction.bits),
        }
    return {}


def _of_common_shape(table: np.ndarray) -> np.ndarray:
    """A small table with the entries of the largest such one, and a power of two of rows: how many differ varies."""
    rows, entries = table.shape
    if entries > SMALL:
        return table
    return np.pad(table.astype(np.int64), ((0, (1 << (rows - 1).bit_length()) - rows), (0, SMALL - entries)))


def _float_type(program: IntProgram, instruction: MatMul | Convolution, spare: int) -> type[np.floating]:
    """The float type in which every partial sum is an exact integer: float products are far faster than integer ones."""
    value = program.values[instruction.args[0]]
    weight = np.abs(instruction.weight)
    if isinstance(instruction, MatMul):
        terms = weight.sum(axis=-1 if instruction.left else -2)
    else:
        terms = weight.reshape(len(weight), -1).sum(axis=1)
    reach = int(terms.max()) * max(abs(value.low), abs(value.high)) * spare
    return np.float32 if reach < 2**24 else np.float64
