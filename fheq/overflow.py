"""How often accumulators leave their width: over data, and whether any input could make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import enable_x64

from fheq.arrays.compiled import compiled_for
from fheq.batching import split_all
from fheq.display.console import shorten, text_table
from fheq.form import Numbers, form_of
from fheq.program import IntProgram, Lookup, Round, Scale, Shift
from fheq.simulate import check_integers, sample_values

Array = Any


@dataclass(frozen=True)
class AccumulatorOverflow:
    """An accumulator that tables read.

    Args:
        share: of the values that tables read over the data, those out of [0, 2^bits), or that rounding takes out of it.
        low, high: what any input in range can make of it.
        certified: whether no input in range can make it overflow.
    """

    accumulator: str
    bits: int
    share: float
    low: int
    high: int
    certified: bool


@dataclass(frozen=True)
class Overflow:
    """`rows`: one per accumulator that a table reads; `samples`: of the data."""

    rows: tuple[AccumulatorOverflow, ...]
    samples: int

    def __str__(self) -> str:
        rows = [
            (shorten(r.accumulator), str(r.bits), f"{r.share:.3%}", f"{r.low}..{r.high}", "yes" if r.certified else "no")
            for r in self.rows
        ]
        table = text_table(("accumulator", "bits", "overflow", "worst case", "certified"), rows)
        sure = sum(r.certified for r in self.rows)
        end = f"{self.samples:,} samples; {sure} of {len(self.rows)} accumulators can never overflow"
        return f"{table}\n{end}"


def overflow(program: IntProgram, *inputs: Array) -> Overflow:
    """Counts, over data, the accumulators that leave their width; there an encrypted run gives wrong results.

    Args:
        program: what `lower` gives.
        inputs: integers in the model's layout, as for `simulate`; held-out data, since calibration sized the accumulators.

    Raises:
        DataError: an array of another type or shape, or out of range; the message names the input.
    """
    arrays = check_integers(program, inputs)
    with enable_x64():
        counts = jax.device_get(_counts(program, form_of(program)[1], *arrays))
    rows = []
    for name, (outside, total) in counts.items():
        known = program.accumulators[name]
        share = float(np.sum(outside)) / max(int(np.sum(total)), 1)
        rows.append(AccumulatorOverflow(name, known.bits, share, known.low, known.high, not known.can_wrap))
    return Overflow(tuple(rows), len(split_all([e.port for e in program.inputs], arrays)[0]))


def _unrounded(program: IntProgram, lookup: Lookup) -> str:
    """The value of the accumulator that a table reads, before its low bits are removed."""
    made = {i.out: i for i in program.instructions}
    name = lookup.args[0]
    if lookup.lsbs and program.accumulators[lookup.accumulator].lsbs:
        while isinstance(made[name], (Round, Scale)):  # exactly, and then moved up where values are wide
            name = made[name].args[0]
        return name
    if lookup.lsbs:  # removed for blocks, or moved up before they are removed
        while not isinstance(made[name], (Shift, Scale)):
            name = made[name].args[0]
        return made[name].args[0]
    return name


@compiled_for(1)
def _counts(program: IntProgram, numbers: Numbers, *inputs: Array) -> dict[str, tuple[Array, Array]]:
    form, _ = form_of(program)
    read: dict[str, set[str]] = {}
    for lookup in program.lookups:
        if lookup.accumulator:
            read.setdefault(lookup.accumulator, set()).add(_unrounded(program, lookup))

    def sample(*values: Array) -> dict[str, tuple[Array, Array]]:
        env = sample_values(form.with_numbers(numbers), form.wide, None, values)
        found = {}
        for name, sources in read.items():
            known = program.accumulators[name]
            top = (1 << known.bits) - ((1 << known.lsbs) >> 1)
            x = jnp.concatenate([env[source].ravel() for source in sorted(sources)])
            read_as = x & ((2 << known.bits) - 1)  # offsets are kept modulo the width with its bit of padding
            found[name] = jnp.sum(read_as >= top), jnp.asarray(x.size)
        return found

    return jax.vmap(sample)(*split_all([e.port for e in program.inputs], inputs))
