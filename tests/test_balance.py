"""Balanced models compute the same, and lose less where all channels share a scale."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build_models import model, node, reference, tensor

import fheq
from fheq import Granularity, Spec

RNG = np.random.default_rng(5)
SPREAD = np.float32(10.0) ** np.float32([-2, -1, 0, 1, 0, -1])


def two_layers(activation: str, **attrs: float) -> onnx.ModelProto:
    known = {"w": tensor(5, 6) * SPREAD, "b": tensor(6) * SPREAD, "v": tensor(6, 3) / SPREAD[:, None]}
    nodes = [node("Gemm", ["x", "w", "b"], ["h"]), node(activation, ["h"], ["a"], **attrs)]
    return model([*nodes, node("MatMul", ["a", "v"], ["y"])], {"x": ["N", 5]}, ["y"], known)


def convolutions() -> onnx.ModelProto:
    kernel, spread = tensor(6, 1, 3, 3), SPREAD.reshape(-1, 1, 1, 1)
    known = {"w": kernel * spread, "b": tensor(6) * SPREAD, "u": tensor(4, 6, 2, 2) / SPREAD.reshape(1, -1, 1, 1)}
    nodes = [
        *(node("Conv", ["x", "w", "b"], ["h"], pads=[1, 1, 1, 1]), node("Relu", ["h"], ["a"])),
        *(node("Conv", ["a", "u"], ["g"]), node("Relu", ["g"], ["r"]), node("Flatten", ["r"], ["f"])),
        node("MatMul", ["f", "v"], ["y"]),
    ]
    return model(nodes, {"x": ["N", 1, 5, 5]}, ["y"], {**known, "v": tensor(64, 3)})


def r2(graph: fheq.Graph, x: np.ndarray, granularity: Granularity) -> float:
    spec = Spec({"op_inputs": 4, "op_weights": 8, "model_inputs": 8, "model_outputs": 8}, activations=granularity)
    exact = np.asarray(fheq.evaluate(graph, x))
    found = np.asarray(fheq.fake_quant(graph, fheq.fit(graph, fheq.calibrate(graph, x), spec), x))
    return float(1 - np.mean((found - exact) ** 2) / np.var(exact))


@pytest.mark.parametrize(
    "made, shape",
    [(two_layers("Relu"), (5,)), (two_layers("LeakyRelu", alpha=0.2), (5,)), (convolutions(), (1, 5, 5))],
    ids=["relu", "leaky relu", "convolutions"],
)
def test_one_scale_serves_balanced_channels_as_own_scales_serve_the_others(made: onnx.ModelProto, shape: tuple) -> None:
    x = RNG.normal(size=(200, *shape)).astype(np.float32)
    graph = fheq.import_onnx(made)
    balanced = fheq.balance(graph, fheq.calibrate(graph, x))
    exact = reference(made, x)[0]
    np.testing.assert_allclose(fheq.evaluate(balanced, x), exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())
    one, own = r2(graph, x, Granularity.PER_TENSOR), r2(graph, x, Granularity.PER_CHANNEL)
    assert r2(balanced, x, Granularity.PER_TENSOR) > max(0.97, one) and own > one


@pytest.mark.parametrize("activation", ["Sigmoid", "Softplus"])
def test_what_has_no_unit_stays(activation: str) -> None:
    x = RNG.normal(size=(100, 5)).astype(np.float32)
    graph = fheq.import_onnx(two_layers(activation))
    assert fheq.balance(graph, fheq.calibrate(graph, x)) is graph


def test_statistics_of_another_graph_are_refused() -> None:
    graph = fheq.import_onnx(two_layers("Relu"))
    x = RNG.normal(size=(100, 5)).astype(np.float32)
    wider = model(
        [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["a"])], {"x": ["N", 5]}, ["a"], {"w": tensor(5, 7)}
    )
    stats = fheq.calibrate(graph, x)
    for other, message in (
        ({}, "lack tensor 'x'"),
        ({**stats, **fheq.calibrate(fheq.import_onnx(wider), x)}, "have 7 channels, where it has 6"),
    ):
        for use in (fheq.balance, fheq.fit):
            with pytest.raises(fheq.FheqError, match=message):
                use(graph, other)
