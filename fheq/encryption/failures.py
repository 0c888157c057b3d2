"""How noise makes tables fail: ciphertexts read as encrypted runs read them, in JAX.

A message of b bits has one bit of padding above it: integers are kept modulo 2^(b+1). A table has 2^b entries and is
negacyclic: from 2^b on it reads its entries again, negated. So a value beyond its accumulator's width does not wrap around
as it does without noise: the table's result changes its sign. Source: blind rotation in Chillotti, Gama, Georgieva,
Izabachène, "TFHE: Fast Fully Homomorphic Encryption over the Torus" (J. Cryptology 2020), section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fheq import affine
from fheq.encryption.decryption import centred
from fheq.encryption.noise import Noise
from fheq.errors import DataError
from fheq.optimizer.leveled import leveled
from fheq.program import IntProgram, Lookup, Round

Array = Any


class Widths(NamedTuple):
    """Bits that a run's tables read, and those of what it decrypts, int32.

    tables: by the result of a lookup; none of one whose table is constant, for concrete folds it; identities: of the tables
    by which anything but a lookup reads an approximately rounded value, by its name; outputs: in their order.
    """

    tables: dict[str, Array]
    identities: dict[str, Array]
    outputs: tuple[Array, ...]

    @classmethod
    @lru_cache(maxsize=4)
    def of(cls, program: IntProgram) -> Widths:
        """Those of a program."""
        flat = leveled(program)
        reads = lambda node: np.int32(flat.nodes[node].reads)
        rounded = [i.out for i in program.instructions if isinstance(i, Round) and i.approximate]
        return cls(
            {name: reads(node) for name, node in flat.tables.items() if node >= 0},
            {name: reads(flat.roundings[name][0]) for name in rounded if name in flat.roundings},
            tuple(np.int32(flat.nodes[node].bits) for node in flat.outputs),
        )


class Reads(NamedTuple):
    """The independent noises of a run, each with the value whose elements have one: that of what tables read of a value (a
    key switch has no randomness of its own: tables on the same value see the same), that at each bit which exact rounding
    removes, and that of each output."""

    tables: dict[str, str]
    roundings: dict[tuple[str, int], str]
    outputs: dict[int, str]

    @classmethod
    def of(cls, program: IntProgram, widths: Widths) -> Reads:
        """Those of a program."""
        rounds = [i for i in program.instructions if isinstance(i, Round)]
        settled = [i.out for i in rounds if i.out in widths.identities]
        read = [i.args[0] for i in program.lookups if i.out in widths.tables]
        removed = {(i.out, bit): i.args[0] for i in rounds if not i.approximate for bit in range(i.lsbs)}
        return cls({name: name for name in (*read, *settled)}, removed, dict(enumerate(e.value for e in program.outputs)))

    def parts(self, program: IntProgram, every: Array) -> dict[Any, Array]:
        """What a vector has for all elements of all of them, for each."""
        found: dict[Any, Array] = {}
        at = 0
        for key, name in [*self.tables.items(), *self.roundings.items(), *self.outputs.items()]:
            shape = program.values[name].shape
            found[key] = every[at : at + prod(shape)].reshape(shape)
            at += prod(shape)
        return found


def deviations(reads: Reads, noise: Noise, spread: Mapping[str, np.ndarray]) -> np.ndarray:
    """The standard deviation of every noise of a run, float32 in the order of `Reads`: in cells, of outputs in integers.

    Args:
        reads: the program's.
        spread: by value, the part of the noisiest element's variance that each has through leveled operations.
    """

    def those(name: str, worst: float, share: float) -> np.ndarray:
        return worst * np.sqrt(share * spread[name] + 1 - share)

    found = []
    for name in reads.tables:
        at_tables = name in noise.tables
        worst = noise.tables[name] if at_tables else noise.roundings[name][0]
        found.append(those(name, worst, noise.table_shares[name] if at_tables else noise.rounding_shares[name][0]))
    for (out, bit), name in reads.roundings.items():
        found.append(those(name, noise.roundings[out][bit], noise.rounding_shares[out][bit]))
    found += [those(name, noise.outputs[i], 1.0) for i, name in reads.outputs.items()]
    return np.concatenate([part.ravel() for part in found]).astype(np.float32)


def check_noise(reads: Reads, noise: Noise) -> None:
    """Checks that a noise is of the program that has these reads.

    Raises:
        DataError: it is another's.
    """
    tables = all(name in noise.tables or name in noise.roundings for name in reads.tables)
    rounded = all(len(noise.roundings.get(out, ())) > bit for out, bit in reads.roundings)
    if not (tables and rounded and len(noise.outputs) == len(reads.outputs)):
        raise DataError("noise is of another program: give what fheq.noise finds for this one")


class Ciphertexts:
    """Reads the values of one sample through independent noises.

    Args:
        program: by `Form.with_numbers`.
        widths, deviations: what `Widths.of` and the function of this name give.
        key: of the sample.
    """

    def __init__(self, program: IntProgram, widths: Widths, deviations: Array, key: Array):
        self.program, self.widths = program, widths
        self.unrounded = {i.out: i for i in program.instructions if isinstance(i, Round) and i.approximate}
        self.read: dict[str, Array] = {}
        # All at once: a generator for every value, or a product, would take most of the time to compile.
        drawn = deviations * jax.random.normal(key, deviations.shape, jnp.float32)
        self.noises = Reads.of(program, widths).parts(program, drawn)

    @staticmethod
    def cell(x: Array, lsbs: Array, width: Array, noise: Array, centre: float = 0.0) -> Array:
        """The cell, in [0, 2^(width+1)), that a table of `width` bits reads of x, whose cells are 2^lsbs wide."""
        inside = x & ((jnp.ones((), x.dtype) << (width + lsbs + 1)) - 1)
        position = (inside.astype(jnp.float32) + centre) / affine.cell(lsbs, jnp.float32)
        return jnp.floor(position + noise + 0.5).astype(jnp.int32) & ((2 << width) - 1)

    def lookup(self, instruction: Lookup, x: Array) -> Array:
        """A table per group, on what noise makes of x."""
        name = instruction.args[0]
        group = jnp.broadcast_to(instruction.group, x.shape)
        if instruction.out not in self.widths.tables:
            return instruction.table[group, jnp.zeros_like(x)]
        width = self.widths.tables[instruction.out]
        if name not in self.read:
            # concrete shifts unrounded values by half a unit, to the middle of what they stand for
            centre = 0.5 if name in self.unrounded else 0.0
            self.read[name] = self.cell(x, instruction.lsbs, width, self.noises[name], centre)
        cell = self.read[name]
        entry = cell & ((1 << width) - 1)
        result = instruction.table[group, entry & ((1 << instruction.bits) - 1)].astype(jnp.int64)
        # concrete fills a table that reads a wider value with zeros
        result = jnp.where(entry >> instruction.bits == 0, result, 0)
        return jnp.where(cell == entry, result, -result)

    def settle(self, name: str, x: Array) -> Array:
        """A value for anything but a table: an approximately rounded one first passes an identity table."""
        if name not in self.widths.identities:
            return x
        rounded, width = self.unrounded[name], self.widths.identities[name]
        if name not in self.read:
            self.read[name] = self.cell(x, rounded.lsbs, width, self.noises[name], 0.5)
        cell = self.read[name]
        entry = (cell & ((1 << width) - 1)).astype(x.dtype) << rounded.lsbs
        return jnp.where(cell >> width == 0, entry, -entry)

    def round(self, instruction: Round, x: Array) -> Array:
        """Removes low bits: exactly, by a table for each; approximately, by nothing until a table reads the value."""
        if instruction.approximate:
            return x
        x = x + (1 << instruction.lsbs >> 1)
        for bit in range(instruction.lsbs):
            lowest = self.cell(x, bit, 0, self.noises[instruction.out, bit])  # shifted to the place of the padding
            x = x - (lowest.astype(x.dtype) << bit)
        return x

    def decrypt(self, i: int, x: Array) -> Array:
        """Output i, decrypted."""
        name, bits = self.program.outputs[i].value, jnp.asarray(self.widths.outputs[i], x.dtype)
        failed = self.noises[i]
        if name not in self.unrounded:
            return centred(x + jnp.round(failed).astype(x.dtype), bits)
        lsbs = self.unrounded[name].lsbs
        cell = jnp.floor((x.astype(jnp.float32) + 0.5) / affine.cell(lsbs, jnp.float32) + failed + 0.5).astype(x.dtype)
        return centred(cell, bits) << lsbs
