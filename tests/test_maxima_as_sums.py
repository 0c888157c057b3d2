"""Maxima of layers' results as sums of accumulators: the same values from fewer tables."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build_models import model, node
from onnx.reference import ReferenceEvaluator
from test_compose import tables
from test_passes import applications

import fheq

SAMPLES = 200
BITS = 10  # a step is a hundredth of what results vary: twenty of them together have a thousandth of its square
CHANNELS = 2


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng([3, *shape]).normal(size=shape).astype(np.float32)


KNOWN = {
    "k": weights(CHANNELS, 1, 3, 3) / 3,
    "k1": weights(CHANNELS, 1, 3) / 2,
    "bias": weights(CHANNELS, 1, 1),
    "w": weights(6, 5) / 2,
    "v": weights(6, 5)[::-1] / 2,
    "scale": np.float32(2),
    "rows": np.array([2, 3]),
    "all": np.array([1]),
}
IMAGE, LINE, ROW = ("N", 1, 8, 8), ("N", 1, 9), ("N", 6)
Case = tuple[list[onnx.NodeProto], tuple[str | int, ...], int]


def conv(*after: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [node("Conv", ["x", "k"], ["a"]), *after]


def pool(x: str = "a", y: str = "y", **options: list[int]) -> onnx.NodeProto:
    return node("MaxPool", [x], [y], **{"kernel_shape": [2, 2], "strides": [2, 2], **options})


# Of 2 channels of 6x6 places: nodes, the input's shape, tables: of comparisons along one axis, then the other, of functions.
CASES: dict[str, Case] = {
    "a pool": (conv(pool()), IMAGE, 2 * (3 * 6 + 3 * 3)),
    "a function before the pool": (
        conv(node("Add", ["a", "bias"], ["b"]), node("Relu", ["b"], ["r"]), pool("r")),
        IMAGE,
        2 * (3 * 6 + 3 * 3 + 3 * 3),
    ),
    "a function after the pool": (
        conv(pool("a", "p"), node("Sigmoid", ["p"], ["s"]), node("Mul", ["s", "scale"], ["y"])),
        IMAGE,
        2 * (3 * 6 + 3 * 3 + 3 * 3),
    ),
    "windows that overlap, with pads and gaps": (
        conv(pool(kernel_shape=[3, 2], strides=[1, 2], pads=[2, 1, 2, 1], dilations=[2, 1])),
        IMAGE,
        2 * (2 * 6 * 6 + 6 * 4),
    ),
    "a ceiling": (
        conv(pool(kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)),
        IMAGE,
        2 * (2 * 3 * 6 + 2 * 3 * 3),
    ),
    "a pool of a line": (
        [node("Conv", ["x", "k1"], ["a"]), node("MaxPool", ["a"], ["y"], kernel_shape=[3], strides=[2])],
        LINE,
        2 * 2 * 3,
    ),
    "all places": (conv(node("Tanh", ["a"], ["t"]), node("GlobalMaxPool", ["t"], ["y"])), IMAGE, 2 * (5 * 6 + 5 + 1)),
    "the least of two axes": (conv(node("ReduceMin", ["a", "rows"], ["y"], keepdims=0)), IMAGE, 2 * (5 * 6 + 5)),
    "the largest class": (
        [node("MatMul", ["x", "w"], ["a"]), node("ReduceMax", ["a", "all"], ["y"], keepdims=0)],
        ROW,
        4,
    ),
    "two layers": (
        [node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["x", "v"], ["b"]), node("Min", ["a", "b"], ["y"])],
        ROW,
        5,
    ),
}
KEPT: dict[str, list[onnx.NodeProto]] = {
    "a function that falls": conv(node("Abs", ["a"], ["b"]), pool("b")),
    "another reader of the layer": conv(node("Relu", ["a"], ["b"]), pool("b"), node("Sigmoid", ["a"], ["z"])),
    "places of an input": [pool("x")],
    "a quantizer of the model's": conv(
        node("QuantizeLinear", ["a", "scale"], ["q"]), node("DequantizeLinear", ["q", "scale"], ["b"]), pool("b")
    ),
}


def built(nodes: list[onnx.NodeProto], shape: tuple[str | int, ...]) -> onnx.ModelProto:
    made = {name for n in nodes for name in n.output} - {name for n in nodes for name in n.input}
    read = {name for n in nodes for name in n.input}
    return model(nodes, {"x": shape}, sorted(made), {name: v for name, v in KNOWN.items() if name in read}, opset=18)


@pytest.mark.parametrize("case", CASES)
def test_same_values_from_fewer_tables(case):
    nodes, shape, count = CASES[case]
    source = built(nodes, shape)
    graph = fheq.import_onnx(source)
    summed = fheq.maxima_as_sums(graph)
    assert tables(summed) == count
    assert fheq.maxima_as_sums(summed) is summed
    x = np.random.default_rng(0).normal(size=(SAMPLES, *shape[1:])).astype(np.float32)
    reference = ReferenceEvaluator(source)
    wanted = np.concatenate([reference.run(None, {"x": x[i : i + 1]})[0] for i in range(SAMPLES)])
    np.testing.assert_allclose(fheq.evaluate(summed, x), wanted, rtol=1e-4, atol=1e-5)
    programs = [fheq.lower(g, fheq.fit(g, fheq.calibrate(g, x), BITS)) for g in (graph, summed)]
    assert applications(programs[1]) < applications(programs[0])
    found = programs[1].dequantize(fheq.simulate(programs[1], *programs[1].quantize(x)))[0]
    assert np.mean((found.reshape(wanted.shape) - wanted) ** 2) < 1e-3 * np.var(wanted)


@pytest.mark.parametrize("case", KEPT)
def test_other_maxima_stay(case):
    graph = fheq.import_onnx(built(KEPT[case], IMAGE))
    assert fheq.maxima_as_sums(graph) is graph
