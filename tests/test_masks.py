"""Attention with a mask as input: however a model states it, scores keep their steps and hidden tokens count for nothing."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from build_models import model, node
from model_case import normal, weights
from onnx import TensorProto

import fheq

LENGTH, WIDTH = 4, 4
RNG = np.random.default_rng(5)
X = normal(LENGTH, WIDTH)(RNG, 300)
KEPT = np.arange(LENGTH) < RNG.integers(1, LENGTH + 1, size=300)[:, None]
TRAINING, TEST = slice(0, 200), slice(200, 300)
LOWEST = float(np.finfo(np.float32).min)


def attention(
    mask: list[onnx.NodeProto], scores: str, kind: int, shape: list[int], known: dict[str, np.ndarray]
) -> onnx.ModelProto:
    """Self-attention of one head; `mask` makes `scores` from `s`, the scores without a mask, and from the input m."""
    nodes = [
        *(node("MatMul", ["x", f"w{name}"], [name]) for name in "qkv"),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["s"]),
        *mask,
        node("Softmax", [scores], ["p"], axis=-1),
        node("MatMul", ["p", "v"], ["a"]),
        node("Add", ["a", "x"], ["b"]),
        node("Relu", ["b"], ["r"]),
        node("MatMul", ["r", "wo"], ["y"]),
    ]
    known = {f"w{name}": weights(WIDTH, WIDTH, seed=i) for i, name in enumerate("qkvo")} | known
    return model(nodes, {"x": ["N", LENGTH, WIDTH], "m": ["N", *shape]}, ["y"], known, kinds={"m": kind})


def added(far: float) -> tuple[onnx.ModelProto, np.ndarray]:
    """A float mask of 0 and `far`, which is added."""
    mask = np.where(KEPT, 0, far).astype(np.float32)[:, None]
    return attention([node("Add", ["s", "m"], ["z"])], "z", TensorProto.FLOAT, [1, LENGTH], {}), mask


def numbers(far: float) -> tuple[onnx.ModelProto, np.ndarray]:
    """An integer mask of 1 and 0, of which the model makes 0 and `far`."""
    nodes = [
        node("Unsqueeze", ["m", "axis"], ["u"]),
        node("Cast", ["u"], ["f"], to=TensorProto.FLOAT),
        node("Sub", ["one", "f"], ["hidden"]),
        node("Mul", ["hidden", "far"], ["e"]),
        node("Add", ["s", "e"], ["z"]),
    ]
    known = {"axis": np.array([1]), "one": np.float32(1), "far": np.float32(far)}
    return attention(nodes, "z", TensorProto.INT64, [LENGTH], known), KEPT.astype(np.int64)


def chosen(far: float) -> tuple[onnx.ModelProto, np.ndarray]:
    """A mask of decisions that chooses between the scores and `far`."""
    nodes = [node("Unsqueeze", ["m", "axis"], ["u"]), node("Where", ["u", "s", "far"], ["z"])]
    known = {"axis": np.array([1]), "far": np.float32(far)}
    return attention(nodes, "z", TensorProto.BOOL, [LENGTH], known), KEPT


def chosen_and_added(far: float) -> tuple[onnx.ModelProto, np.ndarray]:
    """Decisions that hide, of which the model makes `far` and 0, as PyTorch's attention does."""
    nodes = [
        node("Where", ["m", "far", "zero"], ["e"]),
        node("Reshape", ["e", "shape"], ["rows"]),
        node("Mul", ["rows", "one"], ["scaled"]),
        node("Add", ["s", "scaled"], ["z"]),
    ]
    known = {"far": np.float32(far), "zero": np.float32(0), "one": np.float32(1), "shape": np.array([-1, 1, LENGTH])}
    return attention(nodes, "z", TensorProto.BOOL, [LENGTH], known), ~KEPT


def with_a_known_one(far: float) -> tuple[onnx.ModelProto, np.ndarray]:
    """After a causal mask that the model knows, one of decisions; the result of an empty row is replaced by 0."""
    causal = np.triu(np.full((LENGTH, LENGTH), far, np.float32), 1)
    nodes = [
        node("Unsqueeze", ["m", "axis"], ["u"]),
        node("Add", ["s", "causal"], ["c"]),
        node("Where", ["u", "c", "far"], ["z"]),
    ]
    known = {"axis": np.array([1]), "far": np.float32(far), "causal": causal}
    return attention(nodes, "z", TensorProto.BOOL, [LENGTH], known), KEPT


FORMS = {
    "added": (added, [-1e4, -1e9, LOWEST]),
    "numbers": (numbers, [-1e4, LOWEST]),
    "chosen": (chosen, [-1e4, LOWEST, -np.inf]),
    "chosen and added": (chosen_and_added, [-1e4, -np.inf]),
    "with a known one": (with_a_known_one, [-1e9, -np.inf]),
}


@pytest.mark.parametrize("form, far", [(form, far) for form, (_, fars) in FORMS.items() for far in fars])
def test_a_mask_leaves_scores_their_steps(form: str, far: float) -> None:
    """8 bits lose one part in two hundred of the variance at the most, as in `tests/test_integer.py`; a quantizer that
    reached down to the mask would leave no step between scores, and an R2 below 0."""
    proto, mask = FORMS[form][0](far)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    want = session.run(None, {"x": X[TEST], "m": mask[TEST]})[0]
    graph = fheq.import_onnx(proto)
    np.testing.assert_allclose(fheq.evaluate(graph, X[TEST], mask[TEST]), want, rtol=0, atol=1e-5)
    stats = fheq.calibrate(graph, X[TRAINING], mask[TRAINING])
    program = fheq.lower(graph, fheq.fit(graph, stats, 8))
    (got,) = program.dequantize(fheq.simulate(program, *program.quantize(X[TEST], mask[TEST])))
    assert 1 - np.sum((got - want) ** 2) / np.sum((want - want.mean(axis=0)) ** 2) > 0.995


@pytest.mark.parametrize("bias", [[-150.0, -120.0, -210.0, -100.5], [-2e4, -2e4 + 60, -2e4 - 30, -2e4 + 40]])
def test_biases_of_scores_hide_nothing(bias: list[float]) -> None:
    """Features that are not scaled give scores of hundreds, which a softmax moves and a layer then reads."""
    nodes = [
        node("MatMul", ["x", "w"], ["s"]),
        node("Add", ["s", "bias"], ["z"]),
        node("Softmax", ["z"], ["p"], axis=-1),
        node("MatMul", ["p", "v"], ["y"]),
    ]
    known = {"w": 100 * weights(WIDTH, 4), "bias": np.float32(bias), "v": weights(4, 2)}
    proto = model(nodes, {"x": ["N", WIDTH]}, ["y"], known)
    x = X[:, 0] + np.float32([1, 0, 0, 0])
    want = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]
    graph = fheq.import_onnx(proto)
    faked = fheq.fake_quant(graph, fheq.fit(graph, fheq.calibrate(graph, x), 14), x)
    assert 1 - np.sum((faked - want) ** 2) / np.sum((want - want.mean(axis=0)) ** 2) > 0.99


def test_what_a_mask_hides_changes_nothing() -> None:
    """Not by a step of the output: other tokens in hidden places give the same result in the places that are kept."""
    proto, mask = chosen(-np.inf)
    graph = fheq.import_onnx(proto)
    qparams = fheq.fit(graph, fheq.calibrate(graph, X[TRAINING], mask[TRAINING]), 6)
    program = fheq.lower(graph, qparams)
    other = np.where(KEPT[:, :, None], X, RNG.permutation(X))
    one, two = (program.dequantize(fheq.simulate(program, *program.quantize(x, mask)))[0] for x in (X, other))
    step = np.max(np.abs(one)) / 2**6
    assert np.max(np.abs(one - two)[KEPT]) <= step
    assert np.max(np.abs(one - two)[~KEPT]) > step
