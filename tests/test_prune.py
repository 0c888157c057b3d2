"""Pruning: what others can stand in for goes, with its tables, and the function stays."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import pytest
from build_models import model, node
from onnx import ModelProto, TensorProto

import fheq
from fheq.digits import load
from fheq.interpret import interpret
from fheq.planning.granularity import channel_axis
from fheq.planning.plan import plan
from fheq.tuning.effects import effects

SPEC = fheq.Spec(5, rounding=fheq.Rounding(5, approximate=True))


def tables(graph: fheq.Graph, x: np.ndarray) -> int:
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), SPEC))
    return sum(row.lookups for row in fheq.cost(program, p_error=0.01).rows)


def redundant_dense(rng: np.random.Generator) -> ModelProto:
    """Six hidden neurons: two are alike, one is the sum of two others, all three always active, and one is never read."""
    first = rng.uniform(-1, 1, (5, 6)).astype(np.float32)
    first[:, 1] = first[:, 0]
    bias = np.zeros(6, np.float32)
    first[:, 4] = first[:, 2] + first[:, 3]
    bias[2:5] = 20  # always active: linear
    second = rng.uniform(-1, 1, (6, 3)).astype(np.float32)
    second[5] = 0
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("Add", ["h", "b"], ["a"]),
        node("Relu", ["a"], ["r"]),
        node("MatMul", ["r", "v"], ["y"]),
    ]
    return model(nodes, {"x": ("N", 5)}, ["y"], {"w": first, "b": bias, "v": second})


def redundant_conv(rng: np.random.Generator) -> ModelProto:
    """Four channels, the last the sum of two others, all three always active."""
    first = rng.uniform(-1, 1, (4, 2, 3, 3)).astype(np.float32)
    first[3] = first[1] + first[2]
    second = rng.uniform(-1, 1, (2, 4, 2, 2)).astype(np.float32)
    nodes = [
        node("Conv", ["x", "w", "b"], ["h"], pads=[1, 1, 1, 1]),
        node("Relu", ["h"], ["r"]),
        node("Conv", ["r", "v", "c"], ["y"]),
    ]
    constants = {"w": first, "b": np.array([0, 40, 40, 40], np.float32), "v": second, "c": np.ones(2, np.float32)}
    return model(nodes, {"x": ("N", 2, 5, 5)}, ["y"], constants)


@pytest.mark.parametrize(("build", "shape", "left"), [(redundant_dense, (5,), 3), (redundant_conv, (2, 5, 5), 3 * 25)])
def test_redundant_channels_cost_nothing_and_change_nothing(build, shape, left):
    rng = np.random.default_rng(0)
    graph = fheq.import_onnx(build(rng))
    x, unseen = (rng.normal(size=(300, *shape)).astype(np.float32) for _ in range(2))
    pruned = fheq.prune(graph, x, tolerance=1e-2)
    exact = np.asarray(fheq.evaluate(graph, unseen))
    error = np.mean((np.asarray(fheq.evaluate(pruned, unseen)) - exact) ** 2) / np.var(exact)
    assert error < 1e-2  # the ridge of least squares is all that keeps the stand-ins from being exact
    assert tables(pruned, x) <= left < tables(graph, x)


def test_a_trained_network_halves_its_tables():
    graph, data = load()
    x = data["x_train"][:400]
    pruned = fheq.prune(graph, x, tolerance=0.25)
    assert tables(pruned, x) < 0.6 * tables(graph, x)
    accuracy = [np.mean(np.argmax(fheq.evaluate(g, data["x_test"]), axis=1) == data["y_test"]) for g in (graph, pruned)]
    spread = np.sqrt(accuracy[0] * (1 - accuracy[0]) / len(data["y_test"]))
    assert accuracy[1] > accuracy[0] - 3 * spread - 0.01


def test_without_tolerance_nothing_that_counts_goes():
    graph, data = load()
    x = data["x_train"][:200]
    same = fheq.prune(graph, x, tolerance=0)
    assert np.allclose(fheq.evaluate(same, x), fheq.evaluate(graph, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tolerance", [-0.1, float("nan")])
def test_bad_tolerance(tolerance):
    graph, data = load()
    with pytest.raises(fheq.FheqError, match="tolerance"):
        fheq.prune(graph, data["x_train"], tolerance=tolerance)


def test_weights_that_the_model_quantized_stay():
    w = np.arange(-4, 5, dtype=np.int8).reshape(3, 3)
    nodes = [
        node("DequantizeLinear", ["w", "s"], ["wf"]),
        node("MatMul", ["x", "wf"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("DequantizeLinear", ["w", "s"], ["vf"]),
        node("MatMul", ["r", "vf"], ["y"]),
    ]
    graph = fheq.import_onnx(model(nodes, {"x": ("N", 3)}, ["y"], {"w": w, "s": np.float32(0.5)}))
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    assert fheq.prune(graph, x, tolerance=1.0) is graph


def test_ranks_above_two():
    rng = np.random.default_rng(1)
    w, v = rng.normal(size=(4, 6)).astype(np.float32), rng.normal(size=(6, 2)).astype(np.float32)
    v[2] *= 0.15
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "v"], ["m"]),
        node("Tanh", ["m"], ["y"]),
    ]
    graph = fheq.import_onnx(model(nodes, {"x": ("N", 3, 4)}, ["y"], {"w": w, "v": v}))
    x = rng.normal(size=(100, 3, 4)).astype(np.float32)
    pruned = fheq.prune(graph, x, tolerance=0.1)
    exact = np.asarray(fheq.evaluate(graph, x))
    assert np.mean((np.asarray(fheq.evaluate(pruned, x)) - exact) ** 2) < 0.1 * np.var(exact)
    assert tables(pruned, x) < tables(graph, x)


CONVOLVED = [
    node("Conv", ["x", "w"], ["h"]),
    node("Tanh", ["h"], ["t"]),
    node("Flatten", ["t"], ["f"]),
    node("MatMul", ["f", "v"], ["a"]),
    node("Relu", ["a"], ["r"]),
    node("MatMul", ["r", "u"], ["y"]),
]


def convolved(nodes: list) -> fheq.Graph:
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 1, 2, 2), "v": (27, 6), "u": (6, 2)}
    return fheq.import_onnx(model(nodes, {"x": ["N", 1, 4, 4]}, ["y"], {k: weights(rng, s) for k, s in shapes.items()}))


def weights(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


@pytest.mark.parametrize("name", ["h", "a"])
def test_effects_are_what_small_errors_add_to_the_outputs(name: str) -> None:
    """Against noise in one channel at a time: both are means over random signs."""
    graph, rng = convolved(CONVOLVED), np.random.default_rng(1)
    x = rng.normal(size=(4096, 1, 1, 4, 4)).astype(np.float32)
    layout, size = plan(graph), 1e-3
    exact = np.asarray(fheq.evaluate(graph, x[:, 0]))
    found = effects(layout, [x])[name]
    axis = channel_axis(layout, name)
    for channel, predicted in enumerate(found):
        place = np.arange(len(found)) == channel
        shape = [1] * len(layout.shape(name))
        shape[axis] = len(found)
        noise = size * rng.choice([-1, 1], (len(x), *layout.shape(name))) * place.reshape(shape)
        disturbed = jax.vmap(lambda x, e: interpret(graph, {"x": x}, tap=lambda n, v: v + e if n == name else v)["y"])
        added = np.asarray(disturbed(x, noise.astype(np.float32))).reshape(exact.shape) - exact
        measured = np.mean(added**2) / np.mean(np.var(exact, axis=0)) / size**2
        assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("op", ["Round", "Sign", "Floor"])
def test_where_derivatives_are_0_effects_are_unknown(op: str) -> None:
    graph = convolved([node(op, n.input, n.output) if n.op_type == "Tanh" else n for n in CONVOLVED])
    assert effects(plan(graph), [np.ones((8, 1, 1, 4, 4), np.float32)]) == {}


def test_decisions_that_are_cast_to_floats_are_convolved() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(4, 2, 3, 3)), rng.normal(size=(2, 4, 2, 2))
    second[:, 3] = 0
    nodes = [
        node("Greater", ["x", "zero"], ["d"]),
        node("Cast", ["d"], ["f"], to=TensorProto.FLOAT),
        node("Conv", ["f", "w"], ["h"]),
        node("Tanh", ["h"], ["r"]),
        node("Conv", ["r", "v"], ["y"]),
    ]
    known = {"zero": 0.0, "w": first, "v": second}
    proto = model(nodes, {"x": ("N", 2, 5, 5)}, ["y"], {n: np.asarray(v, np.float32) for n, v in known.items()})
    graph, x = fheq.import_onnx(proto), rng.normal(size=(200, 2, 5, 5)).astype(np.float32)
    pruned = fheq.prune(graph, x, tolerance=1e-9)
    assert tables(pruned, x) == 3 * 9  # decisions on inputs are made ahead
    np.testing.assert_allclose(fheq.evaluate(pruned, x), fheq.evaluate(graph, x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0, 1 / 3])
def test_layers_whose_inputs_never_change_on_the_data_stay_finite(value: float) -> None:
    """Without a variance of their own, only noise of float sums is left of their covariances."""
    rng = np.random.default_rng(0)
    graph = fheq.import_onnx(redundant_dense(rng))
    x = np.full((160, 5), value, np.float32)
    want = fheq.evaluate(graph, x)
    pruned = fheq.prune(graph, x, tolerance=0.05)
    np.testing.assert_allclose(fheq.evaluate(pruned, x), want, rtol=0, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fheq.CalibrationWarning)
        rounded = fheq.round_weights(graph, fheq.fit(graph, fheq.calibrate(graph, x), 5), x)
    assert np.all(np.isfinite(fheq.evaluate(rounded, rng.normal(size=(20, 5)).astype(np.float32))))
