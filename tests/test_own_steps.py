"""Weights and activations that are whole multiples of a step of their own are exact, in as few integers as there are."""

from __future__ import annotations

import numpy as np
import pytest
from build_models import model, node
from hypothesis import given, settings
from hypothesis import strategies as st
from models import as_tuple
from onnx.reference import ReferenceEvaluator

import fheq
from fheq.fitting.function_grids import grid_of
from fheq.fitting.weight_quantizers import is_exact, own_steps


@given(st.integers(0, 2**32 - 1), st.integers(1, 127), st.integers(1, 12), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=100)
def test_rows_of_multiples_get_the_largest_step(seed: int, most: int, n: int, step: float) -> None:
    rows = np.random.default_rng(seed).integers(-most, most + 1, (4, n))
    found = own_steps((rows * step).astype(np.float32).astype(np.float64), np.full(4, most))
    np.testing.assert_allclose(found, np.gcd.reduce(np.abs(rows), axis=1) * step, rtol=1e-5)


def test_other_rows_have_none() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 12))
    assert not np.any(own_steps(rows, np.full(50, 127))) and not np.any(is_exact(rows, np.full(50, 0.01)))


def network(activation: list, rng: np.random.Generator):
    """Three layers with weights of few values, on inputs that are -1 or 1; all sums are exact in float32."""
    known = {
        "u": rng.choice([-1, 1], (8, 10)) * rng.choice([0.5, 1, 2], 10),
        "v": rng.choice([-1, 0, 1], (10, 10)) * rng.choice([0.5, 1, 2], 10),
        "w": rng.integers(-3, 4, (10, 3)) * 0.125,
        "low": np.asarray(-2.0),
        "high": np.asarray(3.0),
        "size": np.asarray(0.5),
    }
    nodes = [node("MatMul", ["x", "u"], ["a"])]
    for source, weight, out in (("a", "v", "b"), ("b", "w", "y")):
        for op, *others in activation:
            nodes.append(node(op, [source, *others], [f"{source}_{op}"]))
            source = nodes[-1].output[0]
        nodes.append(node("MatMul", [source, weight], [out]))
    read = {name for n in nodes for name in n.input}
    known = {name: np.asarray(value, np.float32) for name, value in known.items() if name in read}
    return model(nodes, {"x": ["N", 8]}, ["y"], known)


@pytest.mark.parametrize(
    ("activation", "integers"),
    [([("Sign",)], 3), ([("Div", "size"), ("Round",), ("Clip", "low", "high"), ("Mul", "size")], 6)],
    ids=["binary", "rounded in plain operators"],
)
def test_networks_of_few_values_are_exact(activation: list, integers: int) -> None:
    rng = np.random.default_rng(1)
    proto = network(activation, rng)
    graph, x = fheq.import_onnx(proto), rng.choice([-1, 1], (400, 8)).astype(np.float32)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 8)
    program = fheq.lower(graph, qparams)
    got = program.dequantize(fheq.simulate(program, *program.quantize(x)))[0]
    want = ReferenceEvaluator(proto).run(None, {"x": x})[0]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.asarray(fheq.fake_quant(graph, qparams, x)), got)
    activations = [q for name, q in qparams.tensors.items() if name != "x"]
    assert [int(np.max(q.qmax - q.qmin)) + 1 for q in activations] == [integers, integers]
    assert program.lookups[-1].bits <= 6  # ten terms of at most 3 or 6 values, in steps of 1


@pytest.mark.parametrize(
    ("nodes", "want"),
    [
        ([("Sign",)], (1, -1, 1)),
        ([("Floor",), ("Relu",)], (1, 0, np.inf)),
        ([("Round",), ("Clip", "low", "high"), ("Mul", "half"), ("Neg",)], (0.5, -1.5, 1)),
        ([("Sign",), ("Add", "low")], (1, -3, -1)),
        ([("Sign",), ("Add", "half")], None),
        ([("Round",), ("Sigmoid",)], None),
        ([("Relu",)], None),
    ],
)
def test_operators_tell_the_grid(nodes: list, want: tuple | None) -> None:
    made, source = [], "x"
    for i, (op, *others) in enumerate(nodes):
        made.append(node(op, [source, *others], [f"t{i}"]))
        source = f"t{i}"
    known = {"low": -2.0, "high": 3.0, "half": 0.5}
    known = {k: np.asarray(v, np.float32) for k, v in known.items() if any(k in n.input for n in made)}
    found = grid_of(fheq.import_onnx(model(made, {"x": ["N", 2]}, [source], known)), source)
    assert found == want


def test_integers_beside_other_channels_leave_weights_their_bits() -> None:
    """In steps of 1 beside steps of 1/255 an index would have a weight of 255 steps where others have one."""
    nodes = [
        node("ArgMax", ["z"], ["i"], axis=1, keepdims=1),
        node("Cast", ["i"], ["f"], to=1),
        node("Sigmoid", ["x"], ["s"]),
        node("Concat", ["f", "s"], ["c"], axis=1),
        node("MatMul", ["c", "w"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    proto = model(nodes, {"x": ["N", 3], "z": ["N", 4]}, ["y"], {"w": rng.normal(size=(4, 2)).astype(np.float32)})
    graph, x, z = fheq.import_onnx(proto), *(rng.normal(size=(500, n)).astype(np.float32) for n in (3, 4))
    qparams = fheq.fit(graph, fheq.calibrate(graph, x, z), 8)
    program = fheq.lower(graph, qparams)
    got = program.dequantize(fheq.simulate(program, *program.quantize(x, z)))[0]
    want = np.asarray(as_tuple(fheq.evaluate(graph, x, z))[0])
    rounded = qparams.tensors["z"].dequantize(qparams.tensors["z"].quantize(z))
    alike = np.argmax(rounded, axis=1) == np.argmax(z, axis=1)
    assert np.mean(alike) > 0.9
    largest = 3  # of weights and of indices; a step of an activation is at most 1/255
    bound = 3 * largest / 255 / 2 + largest / 127 / 2 * (3 + largest)
    assert np.abs(got - want)[alike].max() < bound
