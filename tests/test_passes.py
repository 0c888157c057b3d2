"""Passes over integer programs: fewer table applications, the same integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from build_models import model, node
from hypothesis import given, settings
from hypothesis import strategies as st
from test_integer import assert_equal, run_program

import fheq
from fheq.affine import Affine
from fheq.emit import Emitter
from fheq.graph import Port, TensorType
from fheq.passes import merge_tables, narrow_wide, read_in_blocks, simplify
from fheq.program import Accumulator, Entry, IntProgram

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
WIDE = {"w": (32, 4), "v": (4, 2)}


def applications(program: IntProgram) -> int:
    return sum(int(np.prod(program.values[lookup.out].shape)) for lookup in program.lookups)


class Drawn:
    """A random program: linear instructions with many zeros, tables with constant stretches, and movement."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.emit = Emitter()

    def program(self) -> IntProgram:
        rng = self.rng
        images = rng.random() < 0.5
        shape = (1, int(rng.integers(2, 5)), *((4, 4) if images else ()))
        x = self.emit.input("x", shape, 7)
        values = [self.table(self.convolution(x) if images else self.matmul(x))]
        for _ in range(int(rng.integers(1, 4))):
            values.append(self.instruction(values[int(rng.integers(len(values)))]))
        ends = [values[-1], *([values[0]] if rng.random() < 0.2 else [])]
        low = rng.integers(0, 3, shape[1])
        high = low + rng.integers(0, 5, shape[1]) * (rng.random(shape[1]) < 0.8)
        affine = Affine(np.ones(shape[1]), low * 0, low, high, low * 0, 1 - len(shape))
        entries = [Entry(Port("x", TensorType(shape, np.dtype(np.float32))), "x", affine)]
        outputs = []
        for end in ends:
            value = self.emit.values[end]
            port = Port(end, TensorType(value.shape, np.dtype(np.float32)))
            zero = np.zeros(())
            outputs.append(Entry(port, end, Affine(zero + 1, zero, zero, zero + value.high, zero)))
        instructions = self.emit.finish([o.value for o in outputs])
        return IntProgram(tuple(entries), tuple(outputs), instructions, self.emit.values, {})

    def instruction(self, x: str) -> str:
        rng, shape = self.rng, self.emit.values[x].shape
        kind = int(rng.integers(6))
        if kind == 0:
            return self.table(self.matmul(x))
        if kind == 1 and len(shape) == 4 and min(shape[2:]) > 1:
            return self.table(self.convolution(x))
        if kind == 2:
            return self.table(self.emit.sum_last(x)) if len(shape) > 2 else self.table(x)
        if kind == 3:
            index = rng.integers(-1, int(np.prod(shape)), shape)
            return self.emit.gather((x,), index, rng.integers(0, 4, shape), shape)
        if kind == 4:
            other = self.emit.scale(self.table(x), rng.integers(0, 2, shape))
            return self.table(self.emit.plus(x, other, int(rng.choice([-1, 1]))))
        return self.emit.tree(x, shape[:-1], shape[-1], int(rng.choice([-1, 1])), "max") if len(shape) > 2 else self.table(x)

    def weight(self, *shape: int) -> np.ndarray:
        weight = self.rng.integers(-2, 3, shape) * (self.rng.random(shape) < 0.8)
        return weight * (self.rng.random(shape[:1]) < 0.85).reshape(-1, *(1,) * (len(shape) - 1))

    def matmul(self, x: str) -> str:
        shape, left = self.emit.values[x].shape, bool(self.rng.random() < 0.4)
        n = int(self.rng.integers(1, 5))
        return self.emit.matmul(x, self.weight(n, shape[-2]) if left else self.weight(shape[-1], n), left)

    def convolution(self, x: str) -> str:
        channels = self.emit.values[x].shape[1]
        group = channels if self.rng.random() < 0.3 else 1
        weight = self.weight(group * int(self.rng.integers(1, 3)), channels // group, 2, 2)
        strides = tuple(int(s) for s in self.rng.integers(1, 3, 2))
        return self.emit.convolution(x, weight, {"strides": strides, "dilations": (1, 1), "group": group})

    def table(self, x: str) -> str:
        """A shift, perhaps one that wraps around, a rounding and tables with constant stretches."""
        rng, value = self.rng, self.emit.values[x]
        bits = int(rng.integers(3, 7))
        shifted = self.emit.shift(x, rng.integers(0, 4, value.shape[-1]) - value.low * rng.integers(0, 2), (1 << bits) - 1)
        lsbs = int(rng.integers(0, 2))
        rounded = self.emit.round(shifted, lsbs, bool(rng.random() < 0.5))
        rows = int(rng.integers(1, 3))
        table = np.minimum(np.maximum(np.arange(1 << (bits - lsbs)) - rng.integers(-2, 6, (rows, 1)), 0), 7)
        return self.emit.lookup(rounded, table, rng.integers(0, rows, value.shape), lsbs, bits - lsbs, "t")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([simplify, merge_tables]))
def test_simplified_programs_compute_the_same_integers(seed: int, improve: Callable[[IntProgram], IntProgram]) -> None:
    """For inputs at the corners of their ranges and inside of them, by the definitions of the instructions alone."""
    program = Drawn(seed).program()
    simple = improve(program)
    assert applications(simple) <= applications(program)
    entry = program.inputs[0]
    affine = entry.affine.expanded(len(entry.port.type.shape))
    low, high = (np.broadcast_to(v, entry.port.type.shape) for v in (affine.qmin, affine.qmax))
    rng = np.random.default_rng(seed)
    for x in (low, high, *(rng.integers(low, high + 1) for _ in range(6))):
        for want, got in zip(run_program(program, x), run_program(simple, x), strict=True):
            np.testing.assert_array_equal(got, want)


def of_one_input(emit: Emitter, shape: tuple[int, ...], high: int, outputs: list[str]) -> IntProgram:
    """A program of the input "x", which goes from 0 to `high`."""
    port = lambda name, shape: Port(name, TensorType(shape, np.dtype(np.float32)))
    affine = lambda top: Affine(np.ones(()), np.zeros(()), np.zeros(()), np.asarray(float(top)), np.zeros(()))
    values = [emit.values[name] for name in outputs]
    ends = tuple(Entry(port(name, v.shape), name, affine(v.high)) for name, v in zip(outputs, values))
    return IntProgram((Entry(port("x", shape), "x", affine(high)),), ends, emit.finish(outputs), emit.values, {})


def test_a_table_of_a_table_is_one_and_one_that_changes_nothing_none() -> None:
    emit, rng = Emitter(), np.random.default_rng(0)
    x = emit.input("x", (1, 3), 7)
    copied = emit.lookup(
        emit.gather((x,), np.array([2, 0, 1]), None, (1, 3)), np.arange(8)[None], np.zeros(3, int), 0, 3, "c"
    )
    total = emit.plus(x, copied, 1)
    first = emit.lookup(total, rng.integers(0, 8, (2, 16)), np.array([0, 1, 1]), 0, 4, "a")
    then = emit.lookup(first, rng.integers(0, 4, (3, 8)), np.array([2, 0, 1]), 0, 3, "b")
    program = of_one_input(emit, (1, 3), 7, [then])
    merged = merge_tables(program)
    assert (applications(program), applications(merged), len(merged.lookups)) == (9, 3, 1)
    for x in np.ndindex(8, 8, 8):
        assert_equal(run_program(merged, np.array([x])), run_program(program, np.array([x])), f"at {x}")
    both = of_one_input(emit, (1, 3), 7, [first, then])  # whoever reads the first table's result still needs it
    assert len(merge_tables(both).lookups) == 2


def test_a_table_beside_a_sum_too_wide_for_tables_reads_its_own_bits() -> None:
    """concrete gives a value and what sums of it reach one width, of which tables read 16 bits at most."""
    emit = Emitter()
    x = emit.input("x", (1, 2), 63)
    wide = emit.scale(x, np.array([1 << 13, 12345]))
    high = emit.lookup(emit.round(wide, 14, True), np.arange(32)[None], np.zeros(2, int), 14, 5, "wide")
    low = emit.lookup(x, (np.arange(64) ** 2 % 61)[None], np.zeros(2, int), 0, 6, "own", "own")
    program = narrow_wide(of_one_input(emit, (1, 2), 63, [high, low]))
    program = replace(program, accumulators={"own": Accumulator(6, 6, 0, 63, 0, approximate=False, can_wrap=False)})
    assert program.lookups[-1].lsbs > 0
    assert [row.share for row in fheq.overflow(program, np.array([[0, 63]])).rows] == [0]
    circuit = fheq.compile(program)
    assert fheq.cost(program).complexity == pytest.approx(circuit.complexity, rel=1e-3)
    for value in (0, 1, 31, 62, 63):
        got = circuit.evaluate(np.full((1, 2), value), quantized=True)
        assert_equal(got, run_program(program, np.full((1, 2), value)), f"at {value}")
        np.testing.assert_array_equal(got[1], np.full((1, 2), value**2 % 61))


def test_exactly_rounded_accumulators_may_be_wider_than_tables() -> None:
    """Of 18 bits, 13 removed: concrete compiles it, at the predicted cost, and computes the same."""
    known = {name: np.random.default_rng(i).normal(size=shape) for i, (name, shape) in enumerate(WIDE.items())}
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["r"]), node("MatMul", ["r", "v"], ["y"])]
    proto = model(nodes, {"x": ["N", 32]}, ["y"], {name: value.astype(np.float32) for name, value in known.items()})
    graph, x = fheq.import_onnx(proto), np.random.default_rng(2).normal(size=(300, 32)).astype(np.float32)
    spec = fheq.Spec(n_bits=8, rounding=fheq.Rounding(5), accumulators=fheq.AccumulatorRange.WORST_CASE)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), spec))
    assert max(accumulator.bits for accumulator in program.accumulators.values()) > 16
    circuit = fheq.compile(program, p_error=0.01)
    assert circuit.complexity == pytest.approx(fheq.cost(program, p_error=0.01).complexity, rel=0.01)
    q = program.quantize(x[:20])
    np.testing.assert_array_equal(circuit.evaluate(*q, quantized=True), fheq.simulate(program, *q))


def test_what_no_parameters_hold_says_so() -> None:
    """A table's noise times 2^17, and a table on every bit of the product: concrete takes none on so many."""
    emit = Emitter()
    x = emit.input("x", (1, 2), 15)
    once = emit.lookup(x, np.arange(16)[None], np.zeros(2, int), 0, 4, "once")
    high = emit.round(emit.scale(once, np.asarray(1 << 17)), 17, False)
    wide = emit.lookup(high, np.arange(16)[None], np.zeros(2, int), 17, 4, "wide")
    program = of_one_input(emit, (1, 2), 15, [wide])
    report = fheq.cost(program)
    assert report.complexity == np.inf and "no parameters hold" in str(report)
    with pytest.raises(fheq.FheqError, match="only up to 16-bit table lookups are supported"):
        fheq.compile(program)


def repeating(rng: np.random.Generator, bits: int, ties: bool) -> IntProgram:
    """Tables whose rows are constant on blocks of their own, but for ties: first integers that go with the block before."""
    emit, rows = Emitter(), int(rng.integers(1, 4))
    x = emit.input("x", (1, rows), (1 << bits) - 1)
    lsbs = rng.integers(4, bits + 1, rows)
    start = rng.integers(0, 1 << lsbs)
    cells, place = np.divmod(np.arange(1 << bits) + start[:, None], 1 << lsbs[:, None])
    cells = np.maximum(cells - (ties & (place == 0) & (cells % 2 == rng.integers(0, 2, (rows, 1)))), 0)
    table = np.take_along_axis(rng.integers(0, 8, (rows, cells.max() + 1)), cells, axis=1)
    y = emit.lookup(x, table, np.arange(rows), 0, bits, "t")
    return of_one_input(emit, (1, rows), (1 << bits) - 1, [y])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(6, 9), st.booleans())
def test_tables_that_repeat_in_blocks_read_fewer_bits(seed: int, bits: int, ties: bool) -> None:
    program = repeating(np.random.default_rng(seed), bits, ties)
    narrow = read_in_blocks(program)
    assert fheq.cost(narrow).complexity <= fheq.cost(program).complexity
    assert bits < 8 or narrow.lookups[0].bits < bits  # a wide table costs more than the removal of 4 bits
    for x in range(1 << bits):
        inputs = np.full(program.inputs[0].port.type.shape, x)
        assert_equal(run_program(narrow, inputs), run_program(program, inputs), f"at {x}")


def test_a_comparison_reads_the_bits_that_decide_it() -> None:
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Greater", ["h", "t"], ["g"]), node("Cast", ["g"], ["y"], to=1)]
    known = {"w": np.array([[0.4, -1.1], [0.7, 0.2]], np.float32), "t": np.array([0.1, -0.2], np.float32)}
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 2]}, ["y"], known))
    x = np.random.default_rng(1).normal(size=(200, 2)).astype(np.float32)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), 6))
    assert program.accumulators["h"].bits > program.lookups[0].bits
    q = program.quantize(x[:50])
    circuit = fheq.compile(program)
    assert circuit.complexity == pytest.approx(fheq.cost(program).complexity, rel=1e-3)
    assert_equal(circuit.evaluate(*q, quantized=True), fheq.simulate(program, *q), "clear evaluation")
    assert all(row.share == 0 for row in fheq.overflow(program, *q).rows)


def pruned_mlp() -> onnx.ModelProto:
    """Nobody reads neuron 1 of the second layer; of the first, that one alone reads neuron 0, and nobody neuron 3."""
    rng = np.random.default_rng(0)
    w1, w2, w3 = (rng.normal(size=s).astype(np.float32) for s in ((4, 5), (5, 3), (3, 2)))
    w2[0, [0, 2]], w2[3], w3[1] = 0, 0, 0
    nodes = [
        node("Gemm", ["x", "w1"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Gemm", ["b", "w2"], ["c"]),
        node("Sigmoid", ["c"], ["d"]),
        node("Gemm", ["d", "w3"], ["y"]),
    ]
    return model(nodes, {"x": ["N", 4]}, ["y"], {"w1": w1, "w2": w2, "w3": w3})


def pruned_cnn() -> onnx.ModelProto:
    """Nobody reads channel 1, and a bias always cuts channel 2 to 0; strides leave out the last row and column."""
    rng = np.random.default_rng(0)
    w1, w2 = rng.normal(size=(3, 1, 2, 2)).astype(np.float32), rng.normal(size=(2, 3, 2, 2)).astype(np.float32)
    w2[:, 1] = 0
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "w2"], ["y"], strides=[2, 2]),
    ]
    known = {"w1": w1, "w2": w2, "b1": np.array([0, 0, -100], np.float32)}
    return model(nodes, {"x": ["N", 1, 6, 6]}, ["y"], known)


def constant_tail() -> onnx.ModelProto:
    """One output is known, and the other one mixes known and computed elements."""
    w = np.array([[0, 1], [0, -1]], np.float32)
    nodes = [
        node("Gemm", ["x", "w"], ["a"]),
        node("Tanh", ["a"], ["y"]),
        node("Mul", ["y", "zero"], ["m"]),
        node("Exp", ["m"], ["z"]),
    ]
    return model(nodes, {"x": ["N", 2]}, ["y", "z"], {"w": w, "zero": np.zeros((), np.float32)})


def twins() -> onnx.ModelProto:
    """Neurons 0 and 2 have equal weights, and the activation is written twice."""
    rng = np.random.default_rng(0)
    w1, w2, w3 = (rng.normal(size=s).astype(np.float32) for s in ((3, 3), (3, 2), (3, 2)))
    w1[:, 2] = w1[:, 0]
    nodes = [
        node("Gemm", ["x", "w1"], ["a"]),
        node("Tanh", ["a"], ["b"]),
        node("Tanh", ["a"], ["c"]),
        node("Gemm", ["b", "w2"], ["y"]),
        node("Gemm", ["c", "w3"], ["z"]),
    ]
    return model(nodes, {"x": ["N", 3]}, ["y", "z"], {"w1": w1, "w2": w2, "w3": w3})


@pytest.mark.parametrize(
    ("build", "tables"),
    [
        (pruned_mlp, 3 + 2),  # neurons 1, 2 and 4 of the first layer, 0 and 2 of the second
        (pruned_cnn, 4 * 4),  # one channel, where the second convolution reads it
        (constant_tail, 1),
        (twins, 2),
    ],
)
def test_what_nobody_needs_or_is_there_already_costs_no_table(build: Callable[[], onnx.ModelProto], tables: int) -> None:
    graph = fheq.import_onnx(build())
    shape = graph.inputs[0].shape
    data = np.random.default_rng(1).normal(size=(200, *shape)).astype(np.float32)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, data), 4))
    assert applications(program) == tables
    q = program.quantize(data[:20])
    circuit = fheq.compile(program, p_error=0.1)
    assert_equal(circuit.evaluate(*q, quantized=True), fheq.simulate(program, *q), "clear evaluation")
