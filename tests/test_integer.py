"""The integer program: three readers of it agree, and what it computes is near the float model.

The readers are `fheq.simulate`, concrete's clear evaluation of the compiled circuit, and `run_program` below, which knows
nothing but the definitions in `fheq/program.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
from build_models import reference
from models import CASES, as_tuple, prepared

import fheq
from fheq.program import Convolution, Entry, Gather, Lookup, MatMul, Plus, Round, Scale, Shift, SumLast

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
SAMPLES = 6  # per way of choosing inputs: concrete evaluates its graph one sample at a time


# A second oracle


def convolution(i: Convolution, x: np.ndarray) -> np.ndarray:
    """Convolution by its definition: a loop over the places of the kernel."""
    rank, weight = x.ndim - 2, i.weight
    kernel = weight.shape[2:]
    reach = [(k - 1) * d for k, d in zip(kernel, i.dilations)]
    out = [(size - r - 1) // s + 1 for size, r, s in zip(x.shape[2:], reach, i.strides)]
    y = np.zeros((x.shape[0], weight.shape[0], *out), np.int64)
    inputs, outputs = x.shape[1] // i.group, weight.shape[0] // i.group
    for g in range(i.group):
        rows = slice(g * outputs, (g + 1) * outputs)
        for place in product(*map(range, kernel)):
            starts = [p * d for p, d in zip(place, i.dilations)]
            window = tuple(slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, out, i.strides))
            block = x[(slice(None), slice(g * inputs, (g + 1) * inputs), *window)]
            y[:, rows] += np.moveaxis(np.tensordot(weight[(rows, slice(None), *place)], block, (1, 1)), 0, 1)
    assert rank == len(kernel)
    return y


def run_instruction(i: Any, args: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """One instruction on int64 arrays, by its docstring."""
    x = args[0]
    match i:
        case Gather(index=None):
            return x.reshape(shape)
        case Gather():
            flat = np.concatenate([a.ravel() for a in args])
            filler = np.zeros(shape, np.int64) if i.fill is None else i.fill
            return np.where(i.index == -1, filler, flat[i.index])
        case MatMul():
            return i.weight @ x if i.left else x @ i.weight
        case Convolution():
            return convolution(i, x)
        case SumLast():
            return x.sum(axis=-1)
        case Shift():
            return x + i.amount
        case Scale():
            return x * i.factor
        case Plus():
            return args[0] + i.sign * args[1]
        case Round():
            cell = 2**i.lsbs
            return np.floor((x + cell // 2) / cell).astype(np.int64) * cell
        case Lookup():
            column = (x // 2**i.lsbs) % 2**i.bits
            return i.table.astype(np.int64)[np.broadcast_to(i.group, x.shape), column]
    raise AssertionError(f"unknown instruction {i}")


def run_program(program: fheq.IntProgram, *samples: np.ndarray) -> tuple[np.ndarray, ...]:
    """Runs a program on one sample, in each port's own shape, and checks the range of every proved or wrapped value."""
    env = {entry.value: np.asarray(x, np.int64).reshape(entry.port.type.shape) for entry, x in zip(program.inputs, samples)}
    wrapped: set[str] = set()
    for i in program.instructions:
        value = program.values[i.out]
        result = run_instruction(i, [env[a] for a in i.args], value.shape)
        assert result.shape == value.shape, i
        if result.min() < value.low or result.max() > value.high:
            proved = isinstance(i, (Lookup, MatMul, Convolution, SumLast, Scale))
            assert not proved or (isinstance(i, Scale) and i.args[0] in wrapped), i
            wrapped.add(i.out)
        env[i.out] = result
    return tuple(env[entry.value] for entry in program.outputs)


def one_by_one(program: fheq.IntProgram, inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """`run_program` over a batch; all cases have the batch on axis 0."""
    rows = [run_program(program, *(x[i : i + 1] for x in inputs)) for i in range(len(inputs[0]))]
    return tuple(np.concatenate(column) for column in zip(*rows))


# Inputs


def integer_inputs(program: fheq.IntProgram, data: tuple[np.ndarray, ...], n: int) -> dict[str, tuple[np.ndarray, ...]]:
    """n samples of calibration data, n uniform over [qmin, qmax], n of corners (the first two: all low, all high)."""
    rng = np.random.default_rng(5)
    seen = program.quantize(*(x[:n] for x in data))

    def drawn(entry: Entry, q: np.ndarray, draw: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        shape = q.shape if entry.code is None else (n, *entry.code.port.type.shape[1:])
        affine = (entry if entry.code is None else entry.code).affine.expanded(len(shape))
        integers = draw(*(np.broadcast_to(v, shape).astype(np.int64) for v in (affine.qmin, affine.qmax)))
        return integers if entry.code is None else entry.code.encode(affine.dequantize(integers))

    def corner(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        which = rng.random(low.shape) < 0.5
        which[0], which[1] = False, True
        return np.where(which, high, low)

    draws = {"uniform": lambda low, high: rng.integers(low, high + 1), "corners": corner}
    return {"calibration": seen} | {
        how: tuple(drawn(entry, q, draw) for entry, q in zip(program.inputs, seen)) for how, draw in draws.items()
    }


def assert_equal(left: Any, right: Any, what: str) -> None:
    for a, b in zip(as_tuple(left), as_tuple(right), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=what)


@cache
def program_of(name: str, n_bits: int, rounding: fheq.Rounding | None = None) -> fheq.IntProgram:
    found = prepared(name)
    spec = fheq.Spec(n_bits=n_bits, rounding=rounding)
    return fheq.lower(found.graph, fheq.fit(found.graph, found.stats, spec))


# Laws


@pytest.mark.parametrize("name", CASES)
def test_float_model_is_what_the_oracle_says(name: str) -> None:
    """Without this, nearness to `fheq.evaluate` would prove nothing. Batch-1 exports run sample by sample in the oracle."""
    found = prepared(name)
    parts = found.case.data(5, seed=2)
    fixed = any(port.type.shape and port.type.shape[0] == 1 for port in found.graph.inputs) and name in BATCH_ONE
    batches = [tuple(x[i : i + 1] for x in parts) for i in range(5)] if fixed else [parts]
    want = [np.concatenate(column) for column in zip(*(reference(found.proto, *batch) for batch in batches))]
    for a, b in zip(as_tuple(fheq.evaluate(found.graph, *parts)), want, strict=True):
        # Sums of fewer than 100 float32 products of size 1: noise below 100 * 2^-24, taken up by 1e-5 in all.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


BATCH_ONE = (
    "exported_with_a_batch_of_one",
    "concat_of_different_scales",
    "contraction_with_known_elements",
    "known_channels_beside_an_input",
)


@pytest.mark.parametrize("name", CASES)
def test_simulation_equals_the_definition_of_the_program(name: str) -> None:
    """At 8 bits, where accumulators are widest and no circuit would compile quickly."""
    found = prepared(name)
    program = program_of(name, 8)
    for how, inputs in integer_inputs(program, found.data, 3).items():
        assert_equal(fheq.simulate(program, *inputs), one_by_one(program, inputs), f"{name}: {how}")


@pytest.mark.parametrize("name", CASES)
def test_simulation_equals_the_circuit(name: str) -> None:
    """Integer for integer, also where accumulators wrap around."""
    found = prepared(name)
    program = program_of(name, found.case.bits)
    circuit = fheq.compile(program)
    for how, inputs in integer_inputs(program, found.data, SAMPLES).items():
        simulated = fheq.simulate(program, *inputs)
        assert_equal(simulated, circuit.evaluate(*inputs, quantized=True), f"{name}: {how}")
        assert_equal(simulated, one_by_one(program, inputs), f"{name}: {how}")


ROUNDED = (
    "conv2d_group_stride_dilation_uneven_pad",
    "batch_norm_before_and_after_and_bias_and_clip",
    "max_and_min_of_two",
    "products_with_vectors",
)


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("approximate", [False, True], ids=["exact", "approximate"])
def test_simulation_equals_the_circuit_with_rounding(name: str, approximate: bool) -> None:
    found = prepared(name)
    program = program_of(name, 4, fheq.Rounding(3, approximate))
    assert any(isinstance(i, Round) and i.approximate is approximate for i in program.instructions)
    circuit = fheq.compile(program)
    for how, inputs in integer_inputs(program, found.data, SAMPLES).items():
        simulated = fheq.simulate(program, *inputs)
        assert_equal(simulated, circuit.evaluate(*inputs, quantized=True), f"{name}: {how}")
        assert_equal(simulated, one_by_one(program, inputs), f"{name}: {how}")


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("ranges", list(fheq.AccumulatorRange))
def test_simulation_equals_the_definition_with_rounding(name: str, ranges: fheq.AccumulatorRange) -> None:
    found = prepared(name)
    spec = fheq.Spec(n_bits=7, rounding=fheq.Rounding(5), accumulators=ranges)
    program = fheq.lower(found.graph, fheq.fit(found.graph, found.stats, spec))
    for how, inputs in integer_inputs(program, found.data, 3).items():
        assert_equal(fheq.simulate(program, *inputs), one_by_one(program, inputs), f"{name}: {how}")


@pytest.mark.parametrize("name", CASES)
def test_eight_bits_are_near_the_float_model(name: str) -> None:
    """A tensor of range R on 255 steps has noise R^2 / (12 * 255^2). Values of standard deviation R / 6 (a normal sample)
    thus lose 36 / (12 * 255^2) < 5e-5 of their variance per quantized tensor on the way, weights as much again. With at most
    10 of them and a gain of at most 4 per layer, 10 * 2 * 4 * 5e-5 < 0.005. Cases with another bound say so in the table.
    """
    found = prepared(name)
    program = program_of(name, 8)
    test = found.case.data(200, seed=1)
    real = program.dequantize(*as_tuple(fheq.simulate(program, *program.quantize(*test))))
    for got, want in zip(real, as_tuple(fheq.evaluate(found.graph, *test)), strict=True):
        error = np.sum((got - want) ** 2) / np.sum((want - want.mean(axis=0)) ** 2)
        assert 1 - error > found.case.r2


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.lookups is not None])
def test_everything_between_two_linear_ops_is_one_table(name: str) -> None:
    """One table instruction, and each element of it looked up once."""
    program = program_of(name, 4)
    assert len(program.lookups) == CASES[name].lookups


@pytest.mark.parametrize("name", ["activation_with_branches", "batch_norm_before_and_after_and_bias_and_clip"])
def test_one_bootstrap_per_element(name: str) -> None:
    """The circuit has as many bootstraps as the tensor between its two linear ops has elements."""
    program = program_of(name, CASES[name].bits)
    (table,) = program.lookups
    assert fheq.compile(program).bootstraps == np.prod(program.values[table.out].shape)


@pytest.mark.parametrize("name", CASES)
def test_no_input_of_a_sized_circuit_wraps_with_worst_case_ranges(name: str) -> None:
    """With worst-case accumulators, every value stays within the range that the program declares, at the corners too."""
    found = prepared(name)
    spec = fheq.Spec(n_bits=4, accumulators=fheq.AccumulatorRange.WORST_CASE)
    program = fheq.lower(found.graph, fheq.fit(found.graph, found.stats, spec))
    assert not any(a.can_wrap for a in program.accumulators.values())
    for inputs in integer_inputs(program, found.data, 3).values():
        for i in range(3):
            env = {e.value: x[i : i + 1].reshape(e.port.type.shape) for e, x in zip(program.inputs, inputs)}
            for instruction in program.instructions:
                value = program.values[instruction.out]
                result = run_instruction(instruction, [env[a] for a in instruction.args], value.shape)
                assert value.low <= result.min() and result.max() <= value.high, instruction
                env[instruction.out] = result


def test_numbers_of_samples_and_a_permutation_of_them_change_nothing() -> None:
    program = program_of("conv1d_group_stride_dilation_pad", 6)
    (q,) = program.quantize(*prepared("conv1d_group_stride_dilation_pad").data)
    whole = fheq.simulate(program, q)
    order = np.random.default_rng(0).permutation(len(q))
    np.testing.assert_array_equal(fheq.simulate(program, q[order]), whole[order])
    np.testing.assert_array_equal(fheq.simulate(program, q[7:8]), whole[7:8])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda q: q.astype(np.float32), "expected integers"),
        (lambda q: q + 1000, "outside"),
        (lambda q: q - 1000, "outside"),
        (lambda q: q[:, :2], "has shape"),
    ],
)
def test_wrong_integers_are_refused_with_the_name_of_the_input(bad: Any, words: str) -> None:
    program = program_of("output_without_table", 4)
    (q,) = program.quantize(*prepared("output_without_table").data)
    with pytest.raises(fheq.FheqError, match=f"'x'.*{words}"):
        fheq.simulate(program, bad(q))


def test_a_wrong_number_of_inputs_is_refused() -> None:
    program = program_of("product_of_two_inputs", 4)
    q = program.quantize(*prepared("product_of_two_inputs").data)
    with pytest.raises(fheq.FheqError, match="takes 2 inputs"):
        fheq.simulate(program, q[0])


def test_onnx_knows_the_models() -> None:
    """The table holds models that onnx itself accepts."""
    for name in CASES:
        onnx.shape_inference.infer_shapes(prepared(name).proto, check_type=True, strict_mode=True)
