"""Builds the instructions of an integer program, keeping the shape and range of every value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from hashlib import blake2b
from typing import Any

import numpy as np

from fheq.program import (
    Convolution,
    Gather,
    Instruction,
    Lookup,
    MatMul,
    Plus,
    Round,
    Scale,
    Shift,
    SumLast,
    Value,
)

PARTS = 8  # of a constant, at most: each is an addition


class Emitter:
    """A list of instructions under construction. Methods return the name of the value that they make."""

    def __init__(self) -> None:
        self.values: dict[str, Value] = {}
        self._instructions: list[Instruction] = []
        self._made: dict[tuple[Any, ...], str] = {}

    def finish(self, outputs: Sequence[str]) -> tuple[Instruction, ...]:
        """The instructions that the outputs need, in order; values that nobody needs are dropped."""
        needed = set(outputs)
        kept = []
        for instruction in reversed(self._instructions):
            if instruction.out in needed:
                kept.append(instruction)
                needed.update(instruction.args)
        made = {i.out for i in kept}
        inputs = set(self.values) - {i.out for i in self._instructions}
        self.values = {name: value for name, value in self.values.items() if name in made | inputs}
        return tuple(reversed(kept))

    def input(self, name: str, shape: tuple[int, ...], high: int) -> str:
        """Declares an input in [0, high]."""
        return self._value(name, shape, 0, high)

    def gather(self, args: tuple[str, ...], index: np.ndarray, fill: np.ndarray | None, shape: tuple[int, ...]) -> str:
        """Copies elements of the concatenated arguments; fills where the index is negative."""
        index = np.asarray(index).ravel()
        sources = [self.values[a] for a in args]
        total = sum(int(np.prod(s.shape)) for s in sources)
        low, high = min(s.low for s in sources), max(s.high for s in sources)
        if len(args) == 1 and len(index) == total and np.array_equal(index, np.arange(total)):
            if sources[0].shape == shape:
                return args[0]
            return self._add(Gather(self._name("reshape"), args), shape, low, high)
        hole = index < 0
        if not np.any(hole):
            return self._add(Gather(self._name("gather"), args, index.reshape(shape)), shape, low, high)
        fill = np.zeros(len(index), np.int64) if fill is None else np.asarray(fill, np.int64).ravel()
        low, high = min(low, int(fill[hole].min())), max(high, int(fill[hole].max()))
        made = Gather(self._name("gather"), args, index.reshape(shape), np.where(hole, fill, 0).reshape(shape))
        return self._add(made, shape, low, high)

    def stack_last(self, args: Sequence[str], shape: tuple[int, ...]) -> str:
        """Concatenates values of shapes `(*shape, K_i)` on their last axis."""
        blocks, start = [], 0
        for arg in args:
            size = int(np.prod(self.values[arg].shape))
            blocks.append(np.arange(start, start + size).reshape(*shape, -1))
            start += size
        index = np.concatenate(blocks, axis=-1)
        return self.gather(tuple(args), index, None, index.shape)

    def matmul(self, x: str, weight: np.ndarray, left: bool) -> str:
        """Matrix product with a clear weight."""
        value = self.values[x]
        probe = np.zeros(value.shape, np.int8)
        shape = (np.matmul(weight, probe) if left else np.matmul(probe, weight)).shape
        axis = -1 if left else (-2 if weight.ndim > 1 else 0)
        up, down = np.maximum(weight, 0).sum(axis=axis), np.minimum(weight, 0).sum(axis=axis)
        low, high = _product_range(value, down, up)
        return self._add(MatMul(self._name("matmul"), (x,), weight, left), shape, low, high)

    def bound(self, x: str, low: np.ndarray, high: np.ndarray) -> None:
        """Declares what is known of a value's range beyond its instruction."""
        self.values[x] = Value(self.values[x].shape, int(np.min(low)), int(np.max(high)))

    def convolution(self, x: str, weight: np.ndarray, options: Mapping[str, Any]) -> str:
        """Convolution without pads."""
        value = self.values[x]
        strides, dilations, group = options["strides"], options["dilations"], options["group"]
        spatial = tuple(
            (size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(value.shape[2:], weight.shape[2:], strides, dilations)
        )
        axes = tuple(range(1, weight.ndim))
        low, high = _product_range(value, np.minimum(weight, 0).sum(axis=axes), np.maximum(weight, 0).sum(axis=axes))
        made = Convolution(self._name("conv"), (x,), weight, tuple(strides), tuple(dilations), group)
        return self._add(made, (value.shape[0], weight.shape[0], *spatial), low, high)

    def sum_last(self, x: str) -> str:
        """Sum over the last axis."""
        value = self.values[x]
        n = value.shape[-1]
        return self._add(SumLast(self._name("sum"), (x,)), value.shape[:-1], n * value.low, n * value.high)

    def shift(self, x: str, amount: np.ndarray, top: int | None = None) -> str:
        """Adds a clear integer array; `top` declares the result's range as [0, top], whatever could be reached."""
        value = self.values[x]
        amount = _squeeze(np.asarray(amount, np.int64), value.shape)
        if not np.any(amount) and (top is None or 0 <= value.low <= value.high <= top):
            return x
        low, high = value.low + int(amount.min()), value.high + int(amount.max())
        if top is not None:
            low, high = 0, top
        return self._add(Shift(self._name("shift"), (x,), amount), value.shape, low, high)

    def offset(self, x: str, amount: np.ndarray, bits: int, narrowed: bool) -> str:
        """Adds a clear integer array to what a table of `bits` bits reads.

        A constant wider than the table would widen every value that leveled operations connect, so it is added in parts. A
        table that concrete narrows to its own width reads modulo 2^(bits+1), the bit of padding included; any other reads
        at the width of what is connected.
        """
        amount, most = np.asarray(amount, np.int64), (1 << bits) - 1
        if narrowed:
            amount = amount % (2 << bits)
        half = 1 << bits >> 1
        low, high = (-half, half - 1) if amount.min() < 0 else (0, most)
        if np.any(np.clip(amount, PARTS * low, PARTS * high) != amount):
            return self.shift(x, amount, most)
        while True:
            part = np.clip(amount, low, high)
            x, amount = self.shift(x, part, most), amount - part
            if not np.any(amount):
                return x

    def scale(self, x: str, factor: np.ndarray) -> str:
        """Multiplies by a clear integer array."""
        value = self.values[x]
        factor = _squeeze(np.asarray(factor, np.int64), value.shape)
        if np.all(factor == 1):
            return x
        ends = [int(v) * int(f) for v in (value.low, value.high) for f in (factor.min(), factor.max())]
        return self._add(Scale(self._name("scale"), (x,), factor), value.shape, min(ends), max(ends))

    def plus(self, a: str, b: str, sign: int) -> str:
        """Sum or difference of two values of one shape."""
        x, y = self.values[a], self.values[b]
        low, high = (x.low + y.low, x.high + y.high) if sign > 0 else (x.low - y.high, x.high - y.low)
        return self._add(Plus(self._name("plus"), (a, b), sign), x.shape, low, high)

    def round(self, x: str, lsbs: int, approximate: bool) -> str:
        """Removes low bits."""
        if lsbs == 0:
            return x
        high = self.values[x].high >> lsbs << lsbs
        return self._add(Round(self._name("round"), (x,), lsbs, approximate), self.values[x].shape, 0, high)

    def lookup(
        self, x: str, table: np.ndarray, group: np.ndarray, lsbs: int, bits: int, origin: str, accumulator: str = ""
    ) -> str:
        """A table per group."""
        value = self.values[x]
        group = _squeeze(group, value.shape)
        made = Lookup(self._name("table"), (x,), table, group, lsbs, bits, origin, accumulator)
        return self._add(made, value.shape, int(table.min()), int(table.max()))

    def squares(self, x: str, delta: np.ndarray, origin: str) -> str:
        """`floor((x + delta)^2 / 4)` by tables; delta is clear and broadcasts against x."""
        value = self.values[x]
        deltas, group = np.unique(np.broadcast_to(delta, value.shape), return_inverse=True)
        codes = np.arange(1 << value.bits)
        table = (codes[None, :] + deltas[:, None]) ** 2 // 4
        return self.lookup(x, table, group.reshape(value.shape), 0, value.bits, origin)

    def chosen(self, x: str, bit: str, delta: np.ndarray, raised: np.ndarray, origin: str) -> str:
        """`(x + delta) (bit + raised)` by one table; delta and raised are clear and broadcast against x and bit."""
        size = self.values[x].high + 1
        packed = self.plus(x, self.scale(bit, np.asarray(size)), 1)
        shape, bits = self.values[packed].shape, self.values[packed].bits
        pairs = np.stack([np.broadcast_to(v, shape).ravel() for v in (delta, raised)])
        kinds, group = np.unique(pairs, axis=1, return_inverse=True)
        above, below = np.divmod(np.arange(1 << bits), size)
        table = (below + kinds[0][:, None]) * (np.minimum(above, 1) + kinds[1][:, None])
        return self.lookup(packed, table, group.reshape(shape), 0, bits, origin)

    def tree(self, x: str, shape: tuple[int, ...], width: int, sign: int, origin: str) -> str:
        """Maximum (sign 1) or minimum (-1) over the last axis, by pairs."""
        while width > 1:
            half = width // 2
            a, b = (self._columns(x, shape, width, start, half) for start in (0, half))
            best = self._larger(a, b, sign, origin)
            if width % 2:
                rest = self._columns(x, shape, width, width - 1, 1)
                best = self.stack_last([best, rest], shape)
            x, width = best, half + width % 2
        return self.gather((x,), np.arange(int(np.prod(shape))), None, shape)

    def orient(self, x: str, sign: np.ndarray) -> str:
        """`x` where sign is 1, `high - x` where it is -1, 0 where it is 0."""
        if np.all(sign == 1):
            return x
        top = self.values[x].high
        return self.shift(self.scale(x, sign), np.where(sign < 0, top, 0), top)

    def _larger(self, a: str, b: str, sign: int, origin: str) -> str:
        top = self.values[a].high
        difference = self.shift(self.plus(a, b, -1), np.asarray(top))
        bits = self.values[difference].bits
        table = np.maximum(np.arange(1 << bits) - top, 0)[None, :]
        positive = self.lookup(difference, np.minimum(table, top), np.zeros((), np.int64), 0, bits, origin)
        out = self.plus(positive, b, 1) if sign > 0 else self.plus(a, positive, -1)
        self.values[out] = Value(self.values[out].shape, 0, top)  # one of the two operands
        return out

    def _columns(self, x: str, shape: tuple[int, ...], width: int, start: int, count: int) -> str:
        elements = np.arange(int(np.prod(shape)) * width).reshape(*shape, width)[..., start : start + count]
        return self.gather((x,), elements, None, elements.shape)

    def _name(self, what: str) -> str:
        return f"{what}.{len(self._instructions)}"

    def _value(self, name: str, shape: tuple[int, ...], low: int, high: int) -> str:
        self.values[name] = Value(tuple(int(d) for d in shape), int(low), int(high))
        return name

    def _add(self, instruction: Instruction, shape: tuple[int, ...], low: int, high: int) -> str:
        """Appends an instruction, unless one that makes the same of the same is there already."""
        key = (*_what(instruction), shape, low, high)
        if key in self._made:
            return self._made[key]
        self._made[key] = instruction.out
        self._instructions.append(instruction)
        return self._value(instruction.out, shape, low, high)


def _what(instruction: Instruction) -> tuple[Any, ...]:
    """What an instruction computes, whatever its result and, for a table, what it stands for are called."""
    parts = [getattr(instruction, f.name) for f in fields(instruction) if f.name not in ("out", "origin", "accumulator")]
    return type(instruction), *(_digest(part) if isinstance(part, np.ndarray) else part for part in parts)


def _digest(array: np.ndarray) -> tuple[Any, ...]:
    return array.shape, array.dtype.str, blake2b(array.tobytes()).digest()


def _product_range(value: Value, down: np.ndarray, up: np.ndarray) -> tuple[int, int]:
    low = np.min(up * value.low + down * value.high)
    high = np.max(up * value.high + down * value.low)
    return int(low), int(high)


def _squeeze(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array without the axes along which it is constant (they become 1), leading ones dropped."""
    array = np.broadcast_to(array, shape)
    for axis in range(array.ndim):
        first = array.take([0], axis=axis) if array.shape[axis] else array
        if array.shape[axis] > 1 and np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    while array.ndim and array.shape[0] == 1:
        array = array[0]
    return np.ascontiguousarray(array)
