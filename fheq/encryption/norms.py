"""How noise differs among the elements of a value: the squared 2-norms of what each adds up.

The optimizer bounds the noise of a whole tensor by its noisiest element. Noises of sums add up with squared weights, so the
program with squared weights, on variances, gives those of all elements.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from fheq.encryption.failures import Widths
from fheq.program import Convolution, Gather, Instruction, IntProgram, Lookup, MatMul, Plus, Round, Scale, Shift

Array = Any
BOOTSTRAP = 1 << 20  # variance of a table's result when that of an input is 1: fresh noise is negligible beside it
HIGHEST = 1 << 40  # of variances, so that they are computed in 64 bits


class Norms:
    """Reads values as `fheq.encryption.failures.Ciphertexts` does, but of their variances."""

    def __init__(self, program: IntProgram, widths: Widths):
        self.program, self.widths = program, widths

    def lookup(self, instruction: Lookup, x: Array) -> Array:
        """Fresh noise, or none of a constant table."""
        made = instruction.out in self.widths.tables
        return jnp.full(self.program.values[instruction.out].shape, BOOTSTRAP if made else 0)

    def round(self, instruction: Round, x: Array) -> Array:
        """Exact rounding subtracts a table's result for each bit."""
        return x if instruction.approximate else x + instruction.lsbs * BOOTSTRAP

    def settle(self, name: str, x: Array) -> Array:
        """Fresh noise after the identity by which an approximately rounded value is read by anything but a table."""
        return jnp.full_like(x, BOOTSTRAP) if name in self.widths.identities else x


def squared(program: IntProgram) -> IntProgram:
    """The program that computes variances from variances."""
    values = {name: replace(value, low=0, high=HIGHEST) for name, value in program.values.items()}
    return replace(program, instructions=tuple(map(_squared, program.instructions)), values=values)


def _squared(instruction: Instruction) -> Instruction:
    if isinstance(instruction, MatMul | Convolution):
        return replace(instruction, weight=instruction.weight**2)
    if isinstance(instruction, Scale):
        return replace(instruction, factor=instruction.factor**2)
    if isinstance(instruction, Shift):
        return replace(instruction, amount=instruction.amount * 0)
    if isinstance(instruction, Plus):
        return replace(instruction, sign=1)
    if isinstance(instruction, Gather) and instruction.fill is not None:
        return replace(instruction, fill=instruction.fill * 0)
    if isinstance(instruction, Lookup):
        return replace(instruction, table=instruction.table[:1, :1])  # which `Norms` reads nothing of
    return instruction
