"""Inputs that are a great number plus a little (years, temperatures, pressures): the little is what counts."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from build_models import model, node

import fheq

FORMS = {
    "rows": ([node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["h"])], (5,), (5, 8)),
    "columns": ([node("MatMul", ["w", "x"], ["p"]), node("Add", ["p", "b"], ["h"])], (5, 2), (8, 5)),
    "convolution": ([node("Conv", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["h"])], (2, 5, 5), (4, 2, 3, 3)),
    "groups": ([node("Conv", ["x", "w"], ["p"], group=2), node("Add", ["p", "b"], ["h"])], (2, 5, 5), (4, 1, 3, 3)),
}
OBSERVERS = (fheq.MinMax(), fheq.MeanSquaredError(), fheq.Percentile(99.9), fheq.Entropy())


def layer(form: str, far: float) -> tuple[fheq.Graph, np.ndarray]:
    """A layer of inputs around `far`, which its bias takes back: the same function of the rest wherever that is."""
    nodes, shape, size = FORMS[form]
    rng = np.random.default_rng(0)
    weight = rng.normal(size=size).astype(np.float32)
    x = rng.uniform(-1, 1, (600, *shape)).astype(np.float32)
    moved = -far * weight.sum(axis=-2 if form == "rows" else tuple(range(1, weight.ndim)), dtype=np.float64)
    bias = moved if form == "rows" else moved.reshape(-1, *(1,) * (len(shape) - 1))
    known = {"w": weight, "b": bias.astype(np.float32)}
    graph = fheq.import_onnx(model([*nodes, node("Tanh", ["h"], ["y"])], {"x": ["N", *shape]}, ["y"], known))
    return graph, x + np.float32(far)


def quantized(graph: fheq.Graph, x: np.ndarray, bits: int, observer: fheq.Observer | None = None) -> fheq.QParams:
    chosen = {} if observer is None else {"observer": observer, "input_observer": observer}
    return fheq.fit(graph, fheq.calibrate(graph, x), fheq.Spec(bits, **chosen))


def error(graph: fheq.Graph, x: np.ndarray, qparams: fheq.QParams) -> float:
    program = fheq.lower(graph, qparams)
    (got,) = program.dequantize(fheq.simulate(program, *program.quantize(x)))
    return float(np.sqrt(np.mean((got - fheq.evaluate(graph, x)) ** 2)))


@pytest.mark.parametrize("far", [-40.0, 40.0, 2000.0])
@pytest.mark.parametrize("form", FORMS)
def test_errors_do_not_grow_with_the_distance(form: str, far: float) -> None:
    """float32 leaves 2^-23 of the distance, a thousandth of a step of 6 bits."""
    near, away = (layer(form, at) for at in (0.0, far))
    assert error(*away, quantized(*away, 6)) < 1.25 * error(*near, quantized(*near, 6))


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: type(o).__name__)
def test_observers_resolve_a_range_far_from_0(observer: fheq.Observer) -> None:
    """All of it lies in one bin of a histogram whose resolution is relative; values are even, none is an outlier."""
    graph, x = layer("rows", 1000.0)
    affine = quantized(graph, x, 6, observer).tensors["x"]
    low, high = (affine.scale * (end - affine.zero_point) - 1000 for end in (affine.qmin, affine.qmax))
    np.testing.assert_allclose(low, -1, atol=0.15)
    np.testing.assert_allclose(high, 1, atol=0.15)


@pytest.mark.parametrize("form", FORMS)
def test_exports_take_back_what_rounded_weights_make_of_the_distance(form: str) -> None:
    graph, x = layer(form, 40.0)
    qparams = quantized(graph, x, 4)
    exported = fheq.export_qdq(graph, qparams)
    (got,) = onnxruntime.InferenceSession(exported.SerializeToString()).run(None, {"x": x})
    want = np.asarray(fheq.fake_quant(graph, qparams, x))
    assert np.mean(np.abs(got - want) > 2e-3) < 1e-3  # but where float32 turns a tie


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("gap", [0.0, 0.3, 30.0])
def test_fake_quant_and_programs_correct_alike(sign: int, gap: float) -> None:
    """Ranges that end at 0 do so but for float noise, which is not to decide."""
    rng = np.random.default_rng(0)
    known = {"w": rng.normal(size=(5, 4)).astype(np.float32), "v": rng.normal(size=(4, 3)).astype(np.float32)}
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("LogSoftmax", ["h"], ["s"]), node("MatMul", ["s", "v"], ["y"])]
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 5]}, ["y"], known))
    x = (sign * (gap + rng.exponential(size=(400, 5)))).astype(np.float32)
    for bits in (4, 6):
        qparams = quantized(graph, x, bits)
        program = fheq.lower(graph, qparams)
        (got,) = program.dequantize(fheq.simulate(program, *program.quantize(x)))
        want = np.asarray(fheq.fake_quant(graph, qparams, x))
        assert np.mean(np.abs(got - want) > 1e-3 * np.std(want)) < 0.01  # ties, which float32 turns
