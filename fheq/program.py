"""The integer program: plain data between lowering and its readers (simulation, cost, compilation).

All values are integers; those that enter a table, and the program's inputs and outputs, are unsigned. An instruction names
its result and its operands; shapes are those of one sample, a batch axis being 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fheq.affine import Affine
from fheq.batching import check_arrays, join
from fheq.client.one_hot import Code
from fheq.errors import DataError
from fheq.evaluate import evaluate
from fheq.graph import Graph, Port, is_float


@dataclass(frozen=True)
class Value:
    """Shape and range of an integer tensor.

    Args:
        low, high: proved from weights, tables and input ranges where `proved`; else the range that sizes the circuit, beyond
            which a table input wraps around.
    """

    shape: tuple[int, ...]
    low: int
    high: int

    @property
    def bits(self) -> int:
        """Width as concrete counts it: unsigned when nothing is negative, else with a sign bit."""
        if self.low >= 0:
            return max(1, int(self.high).bit_length())
        return max(int(max(self.high, 0)).bit_length(), int(-self.low - 1).bit_length()) + 1


@dataclass(frozen=True, eq=False)
class Instruction:
    """Makes the value `out` from the values `args`."""

    out: str
    args: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Gather(Instruction):
    """Copies elements: `out.flat[i] = concatenate(args, flat)[index.flat[i]]`, or `fill.flat[i]` where index is -1.

    A plain reshape has `index` None.
    """

    index: np.ndarray | None = None
    fill: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class MatMul(Instruction):
    """`x @ weight`, or `weight @ x` when `left`; weight int64."""

    weight: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    left: bool = False


@dataclass(frozen=True, eq=False)
class Convolution(Instruction):
    """Convolution without pads; weight (O, C / group, *kernel) int64."""

    weight: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    group: int = 1


@dataclass(frozen=True, eq=False)
class SumLast(Instruction):
    """Sum over the last axis."""


@dataclass(frozen=True, eq=False)
class Shift(Instruction):
    """Adds a clear integer array that broadcasts against the value."""

    amount: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))


@dataclass(frozen=True, eq=False)
class Scale(Instruction):
    """Multiplies by a clear integer array that broadcasts against the value."""

    factor: np.ndarray = field(default_factory=lambda: np.ones((), np.int64))


@dataclass(frozen=True, eq=False)
class Plus(Instruction):
    """`a + b`, or `a - b` when sign is -1."""

    sign: int = 1


@dataclass(frozen=True, eq=False)
class Round(Instruction):
    """Removes low bits, half up, keeping the magnitude: `floor((x + 2^(lsbs-1)) / 2^lsbs) * 2^lsbs`."""

    lsbs: int = 0
    approximate: bool = False


@dataclass(frozen=True, eq=False)
class Lookup(Instruction):
    """A table per group: `table[group, (x >> lsbs) mod 2^bits]`.

    Args:
        table: (G, 2^bits), any integer type.
        group: row of the table for each element, broadcasting against the value.
        lsbs: low bits of x that are zero.
        bits: width of what enters the table, after the removal of low bits.
        origin: what the table computes, for reports: the quantized tensor's name.
        accumulator: for a table on an accumulator, its name.
    """

    table: np.ndarray = field(default_factory=lambda: np.zeros((1, 2), np.int64))
    group: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))
    lsbs: int = 0
    bits: int = 1
    origin: str = ""
    accumulator: str = ""


@dataclass(frozen=True)
class Accumulator:
    """What is known of an accumulator before its table.

    Args:
        worst_bits: width that no input in range can exceed.
        bits: width that sizes the circuit: the accumulator enters its table as an integer from 0 to 2^bits - 1.
        low, high: worst case, the offset included.
        lsbs, approximate: how it is rounded.
        can_wrap: whether some input in range goes beyond the width, and so wraps around.
    """

    worst_bits: int
    bits: int
    low: int
    high: int
    lsbs: int
    approximate: bool
    can_wrap: bool


@dataclass(frozen=True)
class Entry:
    """An input or output of a program.

    Args:
        port: the graph's port.
        value: name of the program's value.
        affine: its quantizer or decoder, `real = scale * (q - zero_point)`; an output's zero_point may be fractional.
        encodes: the model's input of which an input is a further encoding: a model that quantizes an input in several ways
            has an entry for each of them. Empty for others.
        code: what is encrypted of that input, where it is not its integers; None for others.
    """

    port: Port
    value: str
    affine: Affine
    encodes: str = ""
    code: Code | None = None

    @property
    def name(self) -> str:
        """Name in the model."""
        return self.port.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch axis."""
        return self.port.shape

    def encode(self, real: np.ndarray) -> np.ndarray:
        """The integers that are encrypted for an input, from real values in the model's layout."""
        return self.affine.quantize(real) if self.code is None else self.code.encode(real)


@dataclass(frozen=True, eq=False)
class IntProgram:
    """An integer program.

    Args:
        inputs, outputs: in the model's order (codes of an input in its place, further encodings of one after all others);
            outputs are what `client` reads, where there is one.
        instructions: in order of evaluation.
        values: shape and range of every value.
        accumulators: by name, what lowering knows of them.
        client: what the client makes of the decrypted outputs (`fheq.client.outputs`); None where they are the model's.
    """

    inputs: tuple[Entry, ...]
    outputs: tuple[Entry, ...]
    instructions: tuple[Instruction, ...]
    values: dict[str, Value]
    accumulators: dict[str, Accumulator]
    client: Graph | None = None

    @property
    def lookups(self) -> tuple[Lookup, ...]:
        """The tables, in order."""
        return tuple(i for i in self.instructions if isinstance(i, Lookup))

    @property
    def given(self) -> tuple[Port, ...]:
        """The model's inputs."""
        ports = [entry.code.port if entry.code else entry.port for entry in self.inputs if entry.code or not entry.encodes]
        return tuple({port.name: port for port in ports}.values())

    def quantize(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Real inputs, in the model's layout, to the integers of every entry (of a code with the samples first).

        Raises:
            DataError: an array does not fit its input, or holds NaN or infinity.
        """
        parts = check_arrays(self.given, inputs)
        real = {port.name: join(port, part) for port, part in zip(self.given, parts)}
        return tuple(entry.encode(real[entry.encodes or entry.name]) for entry in self.inputs)

    @property
    def results(self) -> tuple[Port, ...]:
        """The model's outputs: those of the program, or what the client makes of them."""
        return self.client.outputs if self.client is not None else tuple(entry.port for entry in self.outputs)

    def dequantize(self, *outputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Integer outputs of the program to the model's outputs, in its layout.

        They are real values (float64), or integers, decisions and labels of the model's own type, strings included. The
        client computes in the model's precision, in which equal scores tie as they do there. A value that leaves the domain
        of its function (the root of a distance a little below 0) gives 0, as in tables.

        Raises:
            DataError: not an array for each of `outputs`.
        """
        if len(outputs) != len(self.outputs):
            names = ", ".join(entry.name for entry in self.outputs)
            hint = "; give each as an argument, as in program.dequantize(*outputs)" if len(outputs) == 1 else ""
            raise DataError(f"{len(outputs)} outputs were given, where the program has {len(self.outputs)} ({names}){hint}")
        real = tuple(_typed(entry, entry.affine.dequantize(np.asarray(q))) for entry, q in zip(self.outputs, outputs))
        if self.client is None:
            return real
        results = evaluate(self.client, *(r.astype(port.type.dtype) for port, r in zip(self.client.inputs, real)))
        arrays = (np.asarray(r) for r in (results if isinstance(results, tuple) else (results,)))
        return tuple(np.where(np.isnan(r), 0, r).astype(np.float64) if is_float(r.dtype) else r for r in arrays)


def _typed(entry: Entry, real: np.ndarray) -> np.ndarray:
    """Decoded values, those of integers and decisions in the model's type."""
    dtype = entry.port.type.dtype
    return np.round(real).astype(dtype) if dtype.kind in "iub" else real
