"""How noise makes tables fail: ciphertexts read as encrypted runs read them, in JAX.

A message of b bits has one bit of padding above it: integers are kept modulo 2^(b+1). A table has 2^b entries and is
negacyclic: from 2^b on it reads its entries again, negated. So a value beyond its accumulator's width does not wrap around
as it does without noise: the table's result changes its sign. Source: blind rotation in Chillotti, Gama, Georgieva,
Izabachène, "TFHE: Fast Fully Homomorphic Encryption over the Torus" (J. Cryptology 2020), section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from fheq.encryption.decryption import centred
from fheq.encryption.noise import Noise
from fheq.optimizer.leveled import leveled
from fheq.program import IntProgram, Lookup, Round

Array = Any


class Ciphertexts:
    """Reads the values of one sample through independent noises; tables on the same value see the same noise, as a key
    switch has no randomness of its own.

    Args:
        noise: standard deviations, perhaps traced.
        spread: by value, the part of the noisiest element's variance that each has through leveled operations.
        key: of the sample.
    """

    def __init__(self, program: IntProgram, noise: Noise, spread: Mapping[str, Array], key: Array):
        self.program = program
        self.noise = noise
        self.spread = spread
        self.flat = leveled(program)
        self.unrounded = {i.out: i for i in program.instructions if isinstance(i, Round) and i.approximate}
        self.read: dict[str, Array] = {}
        # All at once: a generator for every value would take most of the time to compile.
        self.normals = jax.random.normal(key, (self.draws(),), jnp.float32)

    def draws(self) -> int:
        """How many numbers a run draws."""
        tables = {i.args[0] for i in self.program.lookups if self.flat.tables[i.out] >= 0}
        names = [*(tables | (set(self.unrounded) & set(self.flat.roundings))), *(e.value for e in self.program.outputs)]
        for i in self.program.instructions:
            names += [i.out] * (i.lsbs if isinstance(i, Round) and not i.approximate else 0)
        return sum(prod(self.program.values[name].shape) for name in names)

    def normal(self, shape: tuple[int, ...]) -> Array:
        """The next standard normals."""
        found, self.normals = self.normals[: prod(shape)], self.normals[prod(shape) :]
        return found.reshape(shape)

    def deviation(self, name: str, worst: Array, share: Array | float) -> Array:
        """Of each element of a value, from that of the noisiest and the part of its variance that differs."""
        return worst * jnp.sqrt(share * self.spread[name] + 1 - share)

    def cell(self, x: Array, lsbs: int, width: int, deviation: Array, centre: float = 0.0) -> Array:
        """The cell, in [0, 2^(width+1)), that a table of `width` bits reads of x, whose cells are 2^lsbs wide."""
        inside = x & ((1 << (width + lsbs + 1)) - 1)
        position = (inside.astype(jnp.float32) + centre) * 2.0**-lsbs
        cell = jnp.floor(position + deviation * self.normal(x.shape) + 0.5).astype(jnp.int32)
        return cell & ((1 << (width + 1)) - 1)

    def lookup(self, instruction: Lookup, table: Array, x: Array) -> Array:
        """A table per group, on what noise makes of x."""
        name = instruction.args[0]
        node = self.flat.tables[instruction.out]
        group = jnp.broadcast_to(jnp.asarray(instruction.group), x.shape)
        if node < 0:  # no table: concrete folds constants
            return table[group, jnp.zeros_like(x)]
        width = self.flat.nodes[node].reads
        if name not in self.read:
            # concrete shifts unrounded values by half a unit, to the middle of what they stand for
            centre = 0.5 if name in self.unrounded else 0.0
            deviation = self.deviation(name, self.noise.tables[name], self.noise.table_shares[name])
            self.read[name] = self.cell(x, instruction.lsbs, width, deviation, centre)
        cell = self.read[name]
        entry = cell & ((1 << width) - 1)
        result = table[group, entry & ((1 << instruction.bits) - 1)].astype(jnp.int64)
        if width > instruction.bits:  # concrete fills a table that reads a wider value with zeros
            result = jnp.where(entry >> instruction.bits == 0, result, 0)
        return jnp.where(cell == entry, result, -result)

    def settle(self, name: str, x: Array) -> Array:
        """A value for anything but a table: an approximately rounded one first passes an identity table."""
        if name not in self.unrounded or name not in self.noise.roundings:
            return x
        rounded = self.unrounded[name]
        width = self.flat.nodes[self.flat.roundings[name][0]].reads
        if name not in self.read:
            deviation = self.deviation(name, self.noise.roundings[name][0], self.noise.rounding_shares[name][0])
            self.read[name] = self.cell(x, rounded.lsbs, width, deviation, 0.5)
        cell = self.read[name]
        entry = (cell & ((1 << width) - 1)).astype(x.dtype) << rounded.lsbs
        return jnp.where(cell >> width == 0, entry, -entry)

    def round(self, instruction: Round, x: Array) -> Array:
        """Removes low bits: exactly, by a table for each; approximately, by nothing until a table reads the value."""
        if instruction.approximate:
            return x
        x = x + (1 << instruction.lsbs >> 1)
        found = zip(self.noise.roundings[instruction.out], self.noise.rounding_shares[instruction.out])
        for bit, (worst, share) in enumerate(found):
            deviation = self.deviation(instruction.args[0], worst, share)
            lowest = self.cell(x, bit, 0, deviation)  # shifted to the place of the padding
            x = x - (lowest.astype(x.dtype) << bit)
        return x

    def decrypt(self, i: int, x: Array) -> Array:
        """Output i, decrypted."""
        name, bits = self.program.outputs[i].value, self.flat.nodes[self.flat.outputs[i]].bits
        failed = self.deviation(name, self.noise.outputs[i], 1.0) * self.normal(x.shape)
        if name not in self.unrounded:
            return centred(x + jnp.round(failed).astype(x.dtype), bits)
        lsbs = self.unrounded[name].lsbs
        cell = jnp.floor((x.astype(jnp.float32) + 0.5) * 2.0**-lsbs + failed + 0.5).astype(x.dtype)
        return centred(cell, bits) << lsbs
