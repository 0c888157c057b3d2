"""The cost report: its numbers, its cost model against compiled circuits, its errors."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import fheq
from fheq.cost import cost
from fheq.optimizer import noise
from fheq.optimizer.leveled import leveled
from fheq.optimizer.parameters import search
from fheq.optimizer.partition import Constraint, Problem
from fheq.program import Value

TOLERANCE = 0.05  # of compiled complexities; nearly all agree to the last digit

KINDS = ("mlp", "deep", "residual", "average", "max", "moved", "product")
NARROW = fheq.Rounding(4, approximate=True)
ROUNDINGS: dict[str, dict[str, fheq.Rounding]] = {
    "none": {},
    "exact": {"rounding": fheq.Rounding(4)},
    "approximate": {"rounding": NARROW},
    "wide": {"rounding": fheq.Rounding(5, approximate=True)},
    "outputs": {"rounding": NARROW, "output_rounding": NARROW},
}


def nodes_of(kind: str, rng: np.random.Generator) -> tuple[list, dict[str, np.ndarray], tuple[int, ...]]:
    def dense(a: int, b: int) -> np.ndarray:
        return (rng.normal(size=(a, b)) / np.sqrt(a)).astype(np.float32)

    node = helper.make_node
    first = [node("MatMul", ["x", "w1"], ["m1"]), node("Relu", ["m1"], ["r1"])]
    last = node("MatMul", ["h", "w3"], ["y"])
    if kind in ("average", "max"):
        known = {"k": rng.normal(size=(2, 1, 2, 2)).astype(np.float32), "w3": dense(8, 2)}
        pool = node({"average": "AveragePool", "max": "MaxPool"}[kind], ["r1"], ["p"], kernel_shape=[2, 2], strides=[2, 2])
        head = [node("Conv", ["x", "k"], ["m1"]), node("Relu", ["m1"], ["r1"])]
        return [*head, pool, node("Flatten", ["p"], ["h"]), last], known, (1, 5, 5)
    known = {"w1": dense(4, 6), "w2": dense(6, 6), "w3": dense(6, 3)}
    if kind == "mlp":
        return [*first, node("Identity", ["r1"], ["h"]), last], {k: known[k] for k in ("w1", "w3")}, (4,)
    if kind == "product":
        product = [node("Transpose", ["r1"], ["t"], perm=[0, 2, 1]), node("MatMul", ["r1", "t"], ["p"])]
        return [*first, *product, node("Relu", ["p"], ["h"]), last], {"w1": dense(4, 3), "w3": dense(2, 2)}, (2, 4)
    if kind == "moved":
        swap = [node("Transpose", ["m1"], ["t"], perm=[0, 2, 1]), node("Sigmoid", ["t"], ["h"]), last]
        return [first[0], *swap], {"w1": dense(4, 6), "w3": dense(3, 2)}, (3, 4)
    middle = [node("MatMul", ["r1", "w2"], ["m2"]), node("Tanh", ["m2"], ["r2"])]
    if kind == "residual":
        return [*first, *middle, node("Add", ["r1", "r2"], ["s"]), node("Relu", ["s"], ["h"]), last], known, (4,)
    again = [node("MatMul", ["r2", "w2"], ["m3"]), node("Relu", ["m3"], ["h"])]
    return [*first, *middle, *again, last], known, (4,)


@lru_cache
def calibrated(kind: str) -> tuple[fheq.Graph, Any]:
    nodes, known, shape = nodes_of(kind, np.random.default_rng(KINDS.index(kind)))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in known.items()],
    )
    imported = fheq.import_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    x = np.random.default_rng(9).normal(size=(100, *shape)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return imported, fheq.calibrate(imported, x)


@lru_cache
def program(kind: str, rounding: str, n_bits: int = 3) -> fheq.IntProgram:
    graph, stats = calibrated(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fheq.lower(graph, fheq.fit(graph, stats, fheq.Spec(n_bits, **ROUNDINGS[rounding])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", ["exact", "approximate"])
def test_totals_are_sums(kind: str, rounding: str):
    built = program(kind, rounding)
    report = cost(built)
    assert len(report.rows) == len(built.lookups)
    assert report.bootstraps == sum(r.bootstraps for r in report.rows) == sum(report.bootstraps_by_width.values())
    assert report.complexity == pytest.approx(sum(r.cost for r in report.rows))
    assert all(r.cost == pytest.approx(r.lookups * r.lookup_cost) for r in report.rows)
    assert all(r.bits <= report.max_bits and r.bits - r.removed <= r.bits for r in report.rows)
    if rounding == "exact" and kind != "moved":
        assert all(r.bootstraps == r.lookups * (1 + r.removed) for r in report.rows)
    json.dumps(report.as_dict(), allow_nan=False)
    assert max(map(len, str(report).splitlines())) <= 130


@pytest.mark.parametrize(
    "kind, rounding, p_error",
    [
        ("mlp", "approximate", 1e-3),
        ("mlp", "wide", 1e-5),
        ("deep", "approximate", 1e-2),
        ("deep", "outputs", 0.1),
        ("residual", "outputs", 1e-3),
        ("residual", "approximate", 2.0**-40),
        ("residual", "exact", 1e-4),
        ("average", "approximate", 1e-5),
        ("max", "exact", 1e-3),
        ("max", "none", 1e-5),
        ("moved", "approximate", 1e-5),
    ],
)
def test_compiled_circuits(kind: str, rounding: str, p_error: float):
    built = program(kind, rounding)
    report = cost(built, p_error=p_error)
    circuit = fheq.compile(built, p_error=p_error)
    assert report.bootstraps == circuit.bootstraps
    assert report.complexity == pytest.approx(circuit.complexity, rel=TOLERANCE)
    assert report.max_bits == circuit.concrete.graph.maximum_integer_bit_width()


@pytest.mark.parametrize("kind", ["deep", "residual", "product"])
def test_8_bits_compile_without_rounding(kind: str):
    """concrete evaluates tables of up to 16 bits on residues, in programs that round nothing."""
    built = program(kind, "none", 8)
    circuit = fheq.compile(built, p_error=1e-5)
    assert cost(built, p_error=1e-5).complexity == pytest.approx(circuit.complexity, rel=TOLERANCE)
    x = np.random.default_rng(7).normal(size=(20, *built.inputs[0].port.type.shape[1:])).astype(np.float32)
    integers = built.quantize(x)
    np.testing.assert_array_equal(circuit.evaluate(*integers, quantized=True), fheq.simulate(built, *integers))


def test_a_compiled_circuit_with_a_global_p_error():
    built = program("deep", "approximate")
    report = cost(built, global_p_error=1e-2)
    circuit = fheq.compile(built, global_p_error=1e-2)
    assert report.complexity == pytest.approx(circuit.complexity, rel=TOLERANCE)
    assert report.p_error < 1e-2
    assert report.global_p_error <= 1e-2


def one_table(bits: int, norm2: float) -> Problem:
    """A chain of equal layers."""
    constraint = Constraint((0.0,), (norm2**2,), (), (0, 0), bits)
    return Problem((1,), (((0, 0), 1),), (), (constraint,))


def test_cost_grows_with_precision_norm_and_certainty():
    kappas = [noise.quantile(p) for p in (1e-1, 1e-3, 1e-5, 2.0**-40)]
    for grid in (
        [search(one_table(bits, 64.0), kappas[1]).total for bits in range(1, 9)],
        [search(one_table(5, norm2), kappas[1]).total for norm2 in (1.0, 8.0, 64.0, 512.0, 4096.0)],
        [search(one_table(5, 64.0), kappa).total for kappa in kappas],
    ):
        assert all(a <= b for a, b in pairwise(grid))
        assert grid[0] < grid[-1]


def test_cost_of_a_program_grows_with_smaller_p_error():
    totals = [cost(program("residual", "exact"), p_error=p).complexity for p in (1e-1, 1e-3, 1e-6, 1e-12)]
    assert totals == sorted(totals)


def test_noise_formulas():
    assert noise.quantile(0.05) == pytest.approx(1.959964, abs=1e-6)
    bound = noise.variance_bound(4, 3.0)
    assert noise.failure(bound, bound, noise.quantile(1e-3)) == pytest.approx(1e-3)
    assert noise.secure_variance(100) > 1


def test_impossible_noise_is_infinitely_dear():
    assert search(one_table(16, 1e9), noise.quantile(1e-12)).total == np.inf


def test_ranges_and_wraps():
    built = program("mlp", "approximate")
    report = cost(built)
    row = report.rows[0]
    known = built.accumulators[row.accumulator]
    assert (row.worst_bits, row.bits, row.low, row.high) == (known.worst_bits, known.bits, known.low, known.high)
    assert row.rounding == "approximate" and row.table_bits == row.bits - row.removed
    assert {w.accumulator for w in report.wraps} == {n for n, a in built.accumulators.items() if a.can_wrap}
    assert report.outputs[0].name == "y" and report.outputs[0].leveled


def test_tables_beyond_native_parameters():
    built = program("mlp", "none", 6)
    report = cost(built, p_error=1e-5)
    circuit = fheq.compile(built, p_error=1e-5)
    assert report.max_bits >= 12
    assert report.bootstraps == circuit.bootstraps
    assert report.complexity == pytest.approx(circuit.complexity, rel=0.1)
    assert np.isfinite(cost(built, global_p_error=1e-3).complexity)


def test_a_program_without_tables():
    built = program("mlp", "none")
    bare = replace(
        built, instructions=built.instructions[:2], outputs=(replace(built.outputs[0], value=built.instructions[1].out),)
    )
    report = cost(bare)
    assert report.rows == () and report.bootstraps == 0
    assert 512 <= report.complexity < 2048
    assert "no tables" in str(report)


def test_widths_are_those_of_connected_values():
    flat = leveled(program("mlp", "none"))
    built = program("mlp", "none")
    assert flat.widths[built.inputs[0].value] == flat.widths[built.instructions[1].out]


@given(st.lists(st.integers(-(2**20), 2**20) | st.sampled_from([s * 2**n for s in (-1, 1) for n in range(21)]), min_size=1))
def test_a_value_is_as_wide_as_concrete_counts_it(found: list[int]) -> None:
    from concrete.fhe.dtypes import Integer

    assert Value((), min(found), max(found)).bits == Integer.that_can_represent(found).bit_width


@pytest.mark.parametrize(
    "options",
    [
        {"p_error": 0.0},
        {"p_error": 1.0},
        {"p_error": float("nan")},
        {"p_error": "a"},
        {"global_p_error": -1.0},
        {"p_error": 0.1, "global_p_error": 0.1},
    ],
)
def test_bad_probabilities(options: dict[str, float]):
    """Errors of fheq and of Python alike."""
    for find in (cost, fheq.noise):
        with pytest.raises(ValueError, match="p_error") as caught:
            find(program("mlp", "none"), **options)
        assert isinstance(caught.value, fheq.FheqError)


def test_no_compiler_is_loaded():
    code = "import sys, fheq.cost; print([m for m in ('concrete', 'torch', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
