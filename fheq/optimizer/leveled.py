"""What an integer program is to concrete's optimizer: tables between leveled operations, and the noise that reaches them.

concrete gives every distinct width of a table's input its own parameters (a partition). Values that leveled operations
connect (a block) are encrypted under the parameters of the tables that made them; a table whose result goes to another
partition's block pays a conversion key switch. Sources: `compilers/concrete-optimizer/concrete-optimizer/src/optimization/
dag/multi_parameters/{partition_cut,partitionning,analyze}.rs`, `compilers/concrete-compiler/compiler/lib/Dialect/FHE/
Analysis/ConcreteOptimizer.cpp`, and for widths concrete-python's `assign_bit_widths.py` and `converter.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fheq.compiling.tracing import Tracing
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

WIDEST_CAST = 8  # concrete-python's optimize_tlu_based_on_original_bit_width


@dataclass(frozen=True)
class Node:
    """One operation on a tensor.

    Args:
        kind: "input", "table", "linear" (a weighted sum of independent noises), "max" or "zero" (no noise).
        args: indices of nodes.
        weights: of a linear node, 2-norms.
        bits: width of the value.
        size: number of elements.
        reads: of a table, width of what enters it.
    """

    kind: str
    args: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    bits: int = 0
    size: int = 1
    reads: int = 0


@dataclass
class Leveled:
    """A program as nodes.

    Args:
        outputs: nodes that are decrypted.
        tables: the table node of every lookup, by its value's name; -1 where the table is constant.
        extras: further tables that each lookup needs: those of exact rounding, or of a rounded value that is moved.
        roundings: the tables that make a rounded value: one per bit that exact rounding removes, or the identity by which an
            approximately rounded value is read by anything but a table.
        widths: width of every program value once concrete has made connected values equally wide.
        rounds: whether any value is rounded.
    """

    nodes: list[Node] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    tables: dict[str, int] = field(default_factory=dict)
    extras: dict[str, list[int]] = field(default_factory=dict)
    roundings: dict[str, list[int]] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    rounds: bool = False

    def add(self, node: Node) -> int:
        """Appends a node."""
        self.nodes.append(node)
        return len(self.nodes) - 1


def leveled(program: IntProgram) -> Leveled:
    """The nodes of a program."""
    return _Builder(program).build()


class _Builder:
    def __init__(self, program: IntProgram):
        self.program = program
        self.own = own_widths(program)
        rounds = any(isinstance(instruction, Round) for instruction in program.instructions)
        self.made = Leveled(widths=_widths(program, self.own), rounds=rounds)
        self.at: dict[str, int] = {}
        self.rounds: dict[str, Round] = {}
        self.bare: dict[str, tuple[Round, int]] = {}  # approximate roundings, and their nodes before any table
        self.waiting: dict[str, list[int]] = {}  # tables of a rounding or a move, until a lookup reads the value

    def build(self) -> Leveled:
        for entry in self.program.inputs:
            self.at[entry.value] = self.add("input", entry.value)
        for instruction in self.program.instructions:
            self.at[instruction.out] = self.node(instruction)
        self.made.outputs = [self.output(entry.value) for entry in self.program.outputs]
        return self.made

    def output(self, name: str) -> int:
        """The node that is decrypted: of an approximately rounded value the bits that are left, with no table."""
        if name not in self.bare:
            return self.read(name)
        instruction, node = self.bare[name]
        size = int(np.prod(self.program.values[name].shape))
        return self.made.add(Node("linear", (node,), (1.0,), self.cell(instruction), size, 0))

    def add(self, kind: str, name: str, args: tuple[int, ...] = (), weights: tuple[float, ...] = (), reads: int = 0) -> int:
        size = int(np.prod(self.program.values[name].shape))
        return self.made.add(Node(kind, args, weights, self.made.widths[name], size, reads))

    def scaled(self, name: str, node: int, bits: int) -> int:
        """The node times 2^bits."""
        return self.add("linear", name, (node,), (2.0**bits,)) if bits > 0 else node

    def read(self, name: str) -> int:
        """The node of a value that leveled operations read; a rounded value first passes through an identity table."""
        if name in self.rounds:
            instruction = self.rounds.pop(name)
            if instruction.approximate:
                self.at[name] = self.add("table", name, (self.at[name],), reads=self.cell(instruction))
                self.waiting.setdefault(name, []).append(self.at[name])
                self.made.roundings[name] = [self.at[name]]
        return self.at[name]

    def cell(self, instruction: Round) -> int:
        return self.own[instruction.args[0]] - instruction.lsbs

    def node(self, instruction: Instruction) -> int:
        if isinstance(instruction, Lookup):
            return self.lookup(instruction)
        if isinstance(instruction, Round):
            self.rounds[instruction.out] = instruction
            return self.approximate(instruction) if instruction.approximate else self.truncate(instruction)
        args = tuple(self.read(a) for a in instruction.args)
        for a in instruction.args:
            if a in self.waiting:
                self.waiting.setdefault(instruction.out, []).extend(self.waiting.pop(a))
        if isinstance(instruction, Gather):
            return args[0] if len(args) == 1 else self.add("max", instruction.out, args)
        if isinstance(instruction, Shift):
            return args[0]
        weights = (1.0, 1.0) if isinstance(instruction, Plus) else (norm(instruction, self.program),)
        return self.add("linear", instruction.out, args, weights)

    def approximate(self, instruction: Round) -> int:
        x = instruction.args[0]
        node = self.scaled(x, self.read(x), self.made.widths[x] - self.own[x])
        self.bare[instruction.out] = instruction, node
        return node

    def truncate(self, instruction: Round) -> int:
        """One table per removed bit: it reads the lowest bit at the top, in the place of the padding."""
        x = instruction.args[0]
        node, width = self.read(x), self.made.widths[x]
        for bit in range(instruction.lsbs):
            lowest = self.add("linear", x, (node,), (2.0 ** (width - bit),))
            table = self.add("table", x, (lowest,), reads=0)
            self.waiting.setdefault(instruction.out, []).append(table)
            self.made.roundings.setdefault(instruction.out, []).append(table)
            node = self.add("linear", x, (node, table), (1.0, 1.0))
        return node

    def lookup(self, instruction: Lookup) -> int:
        x = instruction.args[0]
        own, width = self.own[x], self.made.widths[x]
        node = self.at[x]
        if x in self.rounds:
            rounded = self.rounds[x]
            reads = self.cell(rounded)
            if not rounded.approximate:
                node = self.scaled(x, node, width - self.own[rounded.args[0]])
        else:
            cast = width > own and own <= WIDEST_CAST
            reads = own if cast else width
            node = self.scaled(x, node, width - own) if cast else node
        self.made.extras[instruction.out] = self.waiting.pop(x, [])
        rows = instruction.table[np.unique(instruction.group)] if len(instruction.table) > 1 else instruction.table
        if np.all(rows == rows.flat[0]):
            self.made.tables[instruction.out] = -1
            return self.add("zero", instruction.out)
        size_of = x if self.size(x) >= self.size(instruction.out) else instruction.out
        table = self.made.add(Node("table", (node,), (), self.made.widths[instruction.out], self.size(size_of), reads))
        self.made.tables[instruction.out] = table
        return table

    def size(self, name: str) -> int:
        return int(np.prod(self.program.values[name].shape))


def norm(instruction: Instruction, program: IntProgram) -> float:
    """Largest 2-norm of a linear instruction's clear weights, over its outputs."""
    if isinstance(instruction, SumLast):
        return float(np.sqrt(program.values[instruction.args[0]].shape[-1]))
    if isinstance(instruction, Scale):
        return float(np.abs(instruction.factor).max())
    assert isinstance(instruction, MatMul | Convolution)
    weight = instruction.weight.astype(np.float64)
    if isinstance(instruction, Convolution):
        axes: tuple[int, ...] = tuple(range(1, weight.ndim))
    else:
        axes = (-1,) if instruction.left else (max(weight.ndim - 2, 0),)
    return float(np.sqrt((weight**2).sum(axis=axes).max()))


def _constant(instruction: Instruction) -> int:
    """Width of the clear constant that an instruction makes concrete encode beside its operands."""
    if isinstance(instruction, MatMul | Convolution):
        array = instruction.weight
    elif isinstance(instruction, Shift):
        array = instruction.amount
    elif isinstance(instruction, Scale):
        array = instruction.factor
    elif isinstance(instruction, Gather) and instruction.fill is not None:
        array = instruction.fill
    else:
        return 1
    return Value((), int(array.min()), int(array.max())).bits


def own_widths(program: IntProgram) -> dict[str, int]:
    """The width of every value as concrete is told its range."""
    return {name: Value((), *pair).bits for name, pair in Tracing(program, frozenset()).sizes.items()}


def connected_widths(program: IntProgram) -> dict[str, int]:
    """The width of every value once concrete has made connected ones equally wide."""
    return _widths(program, own_widths(program))


def _widths(program: IntProgram, own: dict[str, int]) -> dict[str, int]:
    """Leveled operations and exact rounding tie the widths of operands, constants and result; tables untie them."""
    parent = {name: name for name in own}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    width = dict(own)
    rounded = {i.out for i in program.instructions if isinstance(i, Round) and i.approximate}
    for instruction in program.instructions:
        if isinstance(instruction, Lookup) or (isinstance(instruction, Round) and instruction.approximate):
            continue
        if isinstance(instruction, Gather) and not rounded.isdisjoint(instruction.args):
            continue  # an identity table lies between
        top = root(instruction.out)
        width[top] = max(width[top], _constant(instruction))
        for a in instruction.args:
            other = root(a)
            if other != top:
                parent[other] = top
                width[top] = max(width[top], width[other])
    return {name: width[root(name)] for name in own}
