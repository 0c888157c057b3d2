"""Known values beside encrypted ones, beyond their range: pads, tokens of a model's own.

The oracle is the float model: at 8 bits a circuit gives nearly all of what varies.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from build_models import model, node

import fheq

TOKENS, CHANNELS = 3, 4
OWN = np.array([[[8.0, -9.0, 0.1, 5.0]]], np.float32)  # a token of the model's own, beside values of about 1
KNOWN = {
    "own": OWN,
    "around": np.array([0, 1, 0, 0, 0, 0], np.int64),
    "seven": np.float32(7),
    "token": np.array([1], np.int64),
    "first": np.int64(1),
    "w": np.random.default_rng(1).normal(size=(CHANNELS, 3)).astype(np.float32),
    "v": np.random.default_rng(3).choice([-1, 0, 1], size=(2 * CHANNELS, 3)).astype(np.float32),
    "k": np.random.default_rng(2).normal(size=(2, CHANNELS, 3)).astype(np.float32),
    "one": np.float32(1),
    "back": np.array([3, 2, 1, 0], np.int64),
}
BESIDE = {
    "a token before others": [node("Expand", ["own", "shape"], ["o"]), node("Concat", ["o", "r"], ["c"], axis=1)],
    "pads": [node("Pad", ["r", "around", "seven"], ["c"])],
    "a token between two": [
        node("Expand", ["own", "shape"], ["o"]),
        node("Split", ["x"], ["x1", "x2"], axis=1, num_outputs=2),
        node("Tanh", ["x2"], ["h"]),
        node("Split", ["r"], ["r1", "r2"], axis=1, num_outputs=2),
        node("Concat", ["r1", "o", "h"], ["c"], axis=1),
    ],
}
READERS = {
    "a layer": [node("MatMul", ["c", "w"], ["y"])],
    "a convolution": [
        node("Transpose", ["c"], ["t"], perm=[0, 2, 1]),
        node("Conv", ["t", "k"], ["y"], pads=[1, 1]),
    ],
    "a mean added to all": [node("ReduceMean", ["c", "token"], ["m"]), node("Add", ["c", "m"], ["y"])],
    "a running sum added to all": [node("CumSum", ["c", "first"], ["s"]), node("Add", ["c", "s"], ["y"])],
    "a sum with another order": [node("Gather", ["c", "back"], ["b"], axis=1), node("Add", ["c", "b"], ["y"])],
    "a sum that a table reads": [
        node("Gather", ["c", "back"], ["b"], axis=1),
        node("Add", ["c", "b"], ["s"]),
        node("Tanh", ["s"], ["y"]),
    ],
    "a product with another order": [node("Gather", ["c", "back"], ["b"], axis=1), node("Mul", ["c", "b"], ["y"])],
    "products of rows": [node("Transpose", ["c"], ["t"], perm=[0, 2, 1]), node("MatMul", ["c", "t"], ["y"])],
    "a maximum": [node("ReduceMax", ["c", "token"], ["y"])],
    "a minimum of channels": [node("ReduceMin", ["c", "channel"], ["y"])],
    "a maximum of two": [node("Gather", ["c", "back"], ["b"], axis=1), node("Max", ["c", "b"], ["y"])],
    "the greater and the lesser of two": [
        node("Gather", ["c", "back"], ["b"], axis=1),
        node("Max", ["c", "b"], ["most"]),
        node("Min", ["c", "b"], ["least"]),
        node("Concat", ["least", "most"], ["j"], axis=2),
        node("ReduceMean", ["j", "token"], ["m"]),
        node("MatMul", ["m", "v"], ["y"]),
    ],
    "a join": [node("Sin", ["x"], ["d"]), node("Concat", ["c", "d"], ["j"], axis=1), node("MatMul", ["j", "w"], ["y"])],
    "a table": [node("Sub", ["c", "one"], ["s"]), node("Relu", ["s"], ["y"])],
}
PARTS = {"an input": [node("Identity", ["x"], ["r"])], "a table": [node("Tanh", ["x"], ["r"])]}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("part", PARTS)
def test_known_values_beyond_the_range_are_what_they_are(part: str, beside: str, reader: str) -> None:
    nodes = [*PARTS[part], *BESIDE[beside], *READERS[reader]]
    graph, x = built(nodes)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 8)
    program = fheq.lower(graph, qparams)
    got = np.asarray(program.dequantize(fheq.simulate(program, *program.quantize(x))))
    want = np.asarray(fheq.evaluate(graph, x))
    step = (max(want.max(), 1) - min(want.min(), -1)) / 255  # of 8 bits for the known values and the others together
    for found in (got, np.asarray(fheq.fake_quant(graph, qparams, x))):
        assert np.mean((found - want) ** 2, axis=0).max() < 0.01 * np.var(want, axis=0).max() + step**2


@pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")  # a maximum of a 5 and decisions is 5
@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin", "ArgMax"])
@pytest.mark.parametrize("known", [1.0, 0.0, 0.5, 5.0, -3.0])
def test_known_values_beside_decisions(known: float, op: str) -> None:
    """Decisions are not observed; scikit-learn's bins are the place of the greatest of decisions and a one."""
    token = np.full((1, 1, CHANNELS), known, np.float32)
    beside = [node("Expand", ["own", "shape"], ["o"]), node("Concat", ["r", "o"], ["c"], axis=1)]
    reader = {"ArgMax": [node("ArgMax", ["c"], ["y"], axis=1)]}.get(op, [node(op, ["c", "token"], ["y"])])
    decided = [node("Greater", ["x", "one"], ["g"]), node("Cast", ["g"], ["r"], to=1), *beside, *reader]
    graph, x = built(decided, own=token)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), 8))
    (got,) = program.dequantize(fheq.simulate(program, *program.quantize(x)))
    np.testing.assert_allclose(got, fheq.evaluate(graph, x), atol=(max(known, 1) - min(known, 0)) / 255)


@pytest.mark.parametrize("reader", ["a layer", "a sum that a table reads", "a maximum"])
def test_an_exported_model_has_them_too(reader: str) -> None:
    graph, x = built([*PARTS["a table"], *BESIDE["a token before others"], *READERS[reader]])
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 6)
    exported = fheq.export_qdq(graph, qparams)
    (got,) = onnxruntime.InferenceSession(exported.SerializeToString()).run(None, {"x": x})
    want = np.asarray(fheq.fake_quant(graph, qparams, x))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    program, again = fheq.lower(graph, qparams), fheq.import_onnx(exported)
    back = fheq.lower(again, fheq.fit(again, fheq.calibrate(again, x)))
    runs = [p.dequantize(fheq.simulate(p, *p.quantize(x))) for p in (program, back)]
    np.testing.assert_allclose(*runs, atol=1e-4 * np.abs(want).max())


def built(nodes: list[onnx.NodeProto], **other: np.ndarray) -> tuple[fheq.Graph, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(300, TOKENS, CHANNELS)).astype(np.float32)
    used = {name for n in nodes for name in n.input}
    shape = [node("Shape", ["r"], ["size"], start=0, end=1), node("Concat", ["size", "rest"], ["shape"], axis=0)]
    known = {**KNOWN, **other, "channel": np.array([2], np.int64), "rest": np.array([1, CHANNELS], np.int64)}
    if "shape" in used:
        nodes = [nodes[0], *shape, *nodes[1:]]
        used.add("rest")
    given = {name: value for name, value in known.items() if name in used}
    return fheq.import_onnx(model(nodes, {"x": ["N", TOKENS, CHANNELS]}, ["y"], given, opset=18)), x
