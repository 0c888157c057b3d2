"""Dead element elimination: a program that computes only the elements that its outputs depend on.

An element is dead when no output depends on it, because every weight that reads it is zero or because no Gather copies it.
An element whose integer is known, whatever the inputs are, is not computed either: it enters what reads it as a constant,
for a linear instruction through the Shift after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fheq.emit import Emitter
from fheq.passes.layout import DEAD, FIXED, Address, address, kept, layout_of
from fheq.passes.linear_maps import apply_weight
from fheq.passes.liveness import reads
from fheq.passes.moduli import read_modulo
from fheq.program import (
    Convolution,
    Gather,
    Instruction,
    IntProgram,
    Lookup,
    MatMul,
    Plus,
    Round,
    Scale,
    Shift,
    SumLast,
    Value,
)

Masks = Mapping[str, np.ndarray]


def without_dead_elements(program: IntProgram, live: Masks, known: Masks, integers: Masks, first: Masks) -> IntProgram:
    """The program without what need not be computed; inputs and outputs keep their shapes and integers.

    Args:
        live, known, first: see `fheq.passes.liveness`.
        integers: the integers of the known elements.
    """
    return _Rebuilding(program, live, known, integers, first).program()


class _Rebuilding:
    """Emits the live elements of each value; `at` tells where the elements of the old values are in the new program."""

    def __init__(self, old: IntProgram, live: Masks, known: Masks, integers: Masks, first: Masks):
        self.old, self.live, self.known, self.integers, self.first = old, live, known, integers, first
        self.emit = Emitter()
        self.at: dict[str, Address] = {}
        self.rounds: dict[str, Round] = {}
        self.modulo = read_modulo(old)

    def program(self) -> IntProgram:
        for entry in self.old.inputs:
            value = self.old.values[entry.value]
            self.emit.input(entry.value, value.shape, value.high)
            everything = self.everything(entry.value)
            self.at[entry.value] = self.shared(entry.value, address(entry.value, everything, None, everything.size))
        for instruction in self.old.instructions:
            self.instruction(instruction)
        whole = ((entry, self.take(entry.value, self.everything(entry.value))) for entry in self.old.outputs)
        outputs = tuple(replace(entry, value=value) for entry, value in whole)
        emitted = self.emit.finish([entry.value for entry in outputs])
        return IntProgram(self.old.inputs, outputs, emitted, self.emit.values, self.old.accumulators, self.old.client)

    def everything(self, name: str) -> np.ndarray:
        shape = self.old.values[name].shape
        return np.arange(int(np.prod(shape))).reshape(shape)

    # Where elements are

    def record(self, name: str, elements: np.ndarray, new: str, pending: np.ndarray | None = None) -> None:
        """Notes that flat elements of an old value are those of a new one, to which `pending` is still to be added."""
        made = address(new, elements, pending, self.live[name].size)
        source = np.where(self.live[name].ravel(), made.source, DEAD)
        self.at[name] = self.shared(name, replace(made, source=source))

    def shared(self, name: str, at: Address) -> Address:
        """An address with the known integers, and with one element for all that are equal."""
        known, at = self.known[name].ravel(), at.gather(self.first[name], None)
        source, place = np.where(known, FIXED, at.source), np.where(known, self.integers[name].ravel(), at.place)
        return Address(at.names, source, place, np.where(known, 0, at.pending))

    def raw(self, name: str, elements: np.ndarray) -> tuple[str, np.ndarray]:
        """The new value of elements of an old one, and what is still to be added to it."""
        at = self.at[name].read(elements.ravel())
        args = at.names or (self.old.inputs[0].value,)  # a Gather needs an argument, though it copies nothing of it
        starts = np.cumsum([0, *(int(np.prod(self.emit.values[a].shape)) for a in args)])
        fixed = at.source == FIXED
        index = np.where(fixed, -1, starts[at.source] + at.place)
        return self.emit.gather(args, index, np.where(fixed, at.place, 0), elements.shape), at.pending.reshape(
            elements.shape
        )

    def take(self, name: str, elements: np.ndarray) -> str:
        """The new value of elements of an old one, in the shape of `elements`."""
        return self.emit.shift(*self.raw(name, elements))

    # Instructions

    def instruction(self, i: Instruction) -> None:
        if isinstance(i, Gather):
            joined = Address.join([self.at[a] for a in i.args])
            moved = joined if i.index is None else joined.gather(i.index.ravel(), i.fill)
            self.at[i.out] = self.shared(i.out, moved)
        elif not self.live[i.out].any():
            self.record(i.out, np.zeros(0, np.int64), "")
        elif isinstance(i, MatMul):
            self.matmul(i)
        elif isinstance(i, Convolution):
            self.convolution(i)
        elif isinstance(i, SumLast):
            self.sum_last(i)
        else:
            elements = layout_of(self.live[i.out])
            self.record(i.out, elements, self.elementwise(i, elements))

    def elementwise(self, i: Instruction, elements: np.ndarray) -> str:
        name, old = i.args[0], self.old.values[i.out]
        own = lambda array: np.broadcast_to(array, old.shape).ravel()[elements]
        if isinstance(i, Shift):
            return self.shift(i, elements, own(i.amount), old)
        if isinstance(i, Scale):
            return self.emit.scale(self.take(name, elements), own(i.factor))
        if isinstance(i, Plus):
            new = self.plus(i, elements)
            found = self.emit.values[new]
            self.emit.values[new] = Value(found.shape, max(found.low, old.low), min(found.high, old.high))
            return new
        if isinstance(i, Round):
            self.rounds[i.out] = i
            return self.emit.round(self.take(name, elements), i.lsbs, i.approximate)
        assert isinstance(i, Lookup)
        return self.lookup(i, elements, own(i.group))

    def shift(self, i: Shift, elements: np.ndarray, amount: np.ndarray, old: Value) -> str:
        value, pending = self.raw(i.args[0], elements)
        total = amount + pending
        if np.any(pending) and i.out in self.modulo:  # a wide constant would widen every value of its block
            total = total % self.modulo[i.out]
        return self.emit.shift(value, total, old.high if old.low == 0 else None)

    def plus(self, i: Plus, elements: np.ndarray) -> str:
        a, b = (self.take(arg, elements) for arg in i.args)
        return self.emit.plus(a, b, i.sign)

    def lookup(self, i: Lookup, elements: np.ndarray, group: np.ndarray) -> str:
        rounding = self.rounds.get(i.args[0])
        x = self.take(rounding.args[0] if rounding else i.args[0], elements)
        if rounding:  # after the movement: concrete pays for a table between a rounding and an index
            x = self.emit.round(x, rounding.lsbs, rounding.approximate)
        rows, group = np.unique(group, return_inverse=True)
        return self.emit.lookup(x, i.table[rows], group.reshape(elements.shape), i.lsbs, i.bits, i.origin, i.accumulator)

    # Sums of inputs

    def matmul(self, i: MatMul) -> None:
        """Keeps the features that are read and unknown somewhere, and the results that are live somewhere."""
        x, y = self.everything(i.args[0]), self.everything(i.out)
        axis = -2 if i.left and x.ndim > 1 else -1  # of features in x, and of results in y
        features = kept(self.needed(i))[axis]
        indices = list(kept(self.live[i.out]))
        columns, results = list(indices), indices[axis]
        if i.weight.ndim > 2:  # one matrix per leading index
            indices, columns = ([np.arange(n) for n in v.shape] for v in (y, x))
            indices[axis] = results
        columns[axis] = features
        weight = i.weight[..., results[:, None], features] if i.left else i.weight[..., features[:, None], results]
        new = self.emit.matmul(self.take(i.args[0], x[np.ix_(*columns)]), np.ascontiguousarray(weight), i.left)
        dropped = np.ones(x.shape, bool)
        np.moveaxis(dropped, axis, -1)[..., features] = False
        grid = np.ix_(*indices)
        self.record(i.out, y[grid], new, self.constant_part(i, dropped)[grid])

    def convolution(self, i: Convolution) -> None:
        """Keeps the groups that are live somewhere, and of those the channels that are live in any group."""
        x, y = self.everything(i.args[0]), self.everything(i.out)
        by_group = lambda mask: np.moveaxis(mask, 1, 0).reshape(i.group, mask.shape[1] // i.group, -1).any(axis=2)
        inputs, outputs = by_group(self.needed(i)), by_group(self.live[i.out])
        groups = np.flatnonzero(outputs.any(axis=1))
        ins, outs = (np.flatnonzero(mask[groups].any(axis=0)) for mask in (inputs, outputs))
        channels = (groups[:, None] * inputs.shape[1] + ins).ravel()
        results = (groups[:, None] * outputs.shape[1] + outs).ravel()
        options = {"strides": i.strides, "dilations": i.dilations, "group": len(groups)}
        weight = np.ascontiguousarray(i.weight[results][:, ins])
        new = self.emit.convolution(self.take(i.args[0], x[:, channels]), weight, options)
        dropped = np.ones(x.shape, bool)
        dropped[:, channels] = False
        self.record(i.out, y[:, results], new, self.constant_part(i, dropped)[:, results])

    def sum_last(self, i: SumLast) -> None:
        elements = layout_of(self.live[i.out])
        width = self.old.values[i.args[0]].shape[-1]
        self.record(
            i.out, elements, self.emit.sum_last(self.take(i.args[0], elements[..., None] * width + np.arange(width)))
        )

    def needed(self, i: Instruction) -> np.ndarray:
        """The elements of the argument that are read and unknown."""
        name = i.args[0]
        return reads(i, self.live[i.out], [self.old.values[name].shape])[0] & ~self.known[name]

    def constant_part(self, i: MatMul | Convolution, dropped: np.ndarray) -> np.ndarray:
        """What the known elements among those dropped contribute to the result."""
        known = np.where(dropped & self.known[i.args[0]], self.integers[i.args[0]], 0)
        if not np.any(known):
            return np.zeros(self.old.values[i.out].shape, np.int64)
        return apply_weight(i, known, i.weight).astype(np.int64)
