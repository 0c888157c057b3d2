"""The encrypted forms of composite operators: the same values, exact selection, and how many tables they take."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
from build_models import model, node, reference, tensor
from jax.experimental import enable_x64
from onnx import TensorProto

import fheq
from benchmarks.op_cases import onnx_cases, with_known_inputs
from fheq.errors import UnsupportedError
from fheq.evaluate import evaluate_sample
from fheq.program import MatMul
from fheq.rewrites import decompose

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")

REWRITTEN = [
    "ArgMax",
    "ArgMin",
    "Col2Im",
    "DFT",
    "STFT",
    "CumProd",
    "Einsum",
    "GlobalLpPool",
    "Hardmax",
    "InstanceNormalization",
    "LRN",
    "LayerNormalization",
    "LogSoftmax",
    "LpNormalization",
    "LpPool",
    "Mean",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceProd",
    "ReduceSumSquare",
    "Resize",
    "ScatterElements",
    "ScatterND",
    "Softmax",
    "Sum",
    "TopK",
]
PER_OPERATOR = 4


def _chosen() -> dict[str, Any]:
    """Cases of each rewritten operator, spread over all that it has."""
    chosen = {}
    for op in REWRITTEN:
        cases = [c for c in onnx_cases() if c.node.op == op and not c.node.domain and "bfloat16" not in c.name]
        step = max(1, len(cases) // PER_OPERATOR)
        chosen.update({c.name: c for c in cases[::step][:PER_OPERATOR]})
    return chosen


CHOSEN = _chosen()


@pytest.mark.parametrize("name", CHOSEN)
def test_simple_operators_give_the_values_of_the_composite(name: str) -> None:
    case = CHOSEN[name]
    proto, inputs = with_known_inputs(case)
    graph = fheq.import_onnx(proto)
    simple = decompose(graph)
    with enable_x64():
        results = evaluate_sample(simple, *inputs)
    for got, want in zip(results, case.outputs, strict=True):
        got = np.asarray(got)
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


# Selection


def selecting(nodes: Sequence[onnx.NodeProto], size: int, result: str, known: dict[str, np.ndarray], width: int) -> Any:
    """Integers of an axis of `size` elements to `result`, which a matrix product reads, so that no client can finish it."""
    last = [node("Cast", [result], ["real"], to=TensorProto.FLOAT), node("MatMul", ["real", "eye"], ["y"])]
    known = {**known, "eye": np.eye(width, dtype=np.float32)}
    return model([*nodes, *last], {"x": ["N", size]}, ["y"], known, opset=21, kinds={"x": TensorProto.INT64, "y": 1})


def simulated(proto: onnx.ModelProto, x: np.ndarray) -> tuple[np.ndarray, fheq.IntProgram]:
    graph = fheq.import_onnx(proto)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), 8))
    return program.dequantize(np.asarray(fheq.simulate(program, *program.quantize(x))))[0], program


def all_rows(size: int, top: int) -> np.ndarray:
    """Every row of integers below `top`: all orders and all ties."""
    return np.array(list(product(range(top), repeat=size)), np.int64)


@pytest.mark.parametrize("size", [3, 6])  # by pairs, and by the maximum
@pytest.mark.parametrize("last", [0, 1], ids=["first", "last"])
@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
def test_encrypted_index_of_an_extreme_is_exact(op: str, last: int, size: int) -> None:
    proto = selecting([node(op, ["x"], ["i"], axis=1, keepdims=1, select_last_index=last)], size, "i", {}, 1)
    x = all_rows(size, 3)
    values, _ = simulated(proto, x)
    np.testing.assert_allclose(values, reference(proto, x)[0], atol=1e-6)


def test_encrypted_index_is_exact_for_classes_that_calibration_never_met() -> None:
    """Calibrated on samples whose first element is the largest, it finds all the others."""
    proto = selecting([node("ArgMax", ["x"], ["i"], axis=1, keepdims=1)], 5, "i", {}, 1)
    graph = fheq.import_onnx(proto)
    seen = np.array([[7, 0, 1, 2, 3], [7, 3, 2, 1, 0]], np.int64)
    spec = fheq.Spec(n_bits=8, accumulators=fheq.AccumulatorRange.WORST_CASE)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, seen), spec))
    x = np.random.default_rng(0).integers(0, 8, (200, 5))
    (values,) = program.dequantize(np.asarray(fheq.simulate(program, *program.quantize(x))))
    np.testing.assert_allclose(values, reference(proto, x)[0], atol=1e-6)


def test_encrypted_hardmax_is_exact() -> None:
    nodes = [node("Cast", ["x"], ["f"], to=TensorProto.FLOAT), node("Hardmax", ["f"], ["h"], axis=1)]
    proto = selecting(nodes, 5, "h", {}, 5)
    x = all_rows(5, 3)
    values, _ = simulated(proto, x)
    np.testing.assert_allclose(values, reference(proto, x)[0], atol=1e-6)


@pytest.mark.parametrize("largest", [0, 1], ids=["smallest", "largest"])
@pytest.mark.parametrize(("result", "size", "count"), [("values", 5, 3), ("indices", 5, 3), ("indices", 15, 2)])
def test_encrypted_top_k_is_exact(result: str, size: int, count: int, largest: int) -> None:
    """All short rows of three numbers, and some long ones, whose places are found round by round."""
    known = {"k": np.array([count])}
    nodes = [node("TopK", ["x", "k"], ["values", "indices"], axis=1, largest=largest)]
    proto = selecting(nodes, size, result, known, count)
    x = all_rows(5, 3) if size == 5 else np.random.default_rng(5).integers(0, 8, (200, size))
    values, _ = simulated(proto, x)
    np.testing.assert_allclose(values, reference(proto, x)[0], atol=1e-6)


def classifier(with_labels: bool) -> onnx.ModelProto:
    """Scores, the class, and its label."""
    nodes = [node("MatMul", ["x", "w"], ["scores"]), node("ArgMax", ["scores"], ["class"], axis=1, keepdims=0)]
    nodes += [node("Gather", ["labels", "class"], ["label"])] if with_labels else []
    known = {"w": np.random.default_rng(3).normal(size=(6, 4)).astype(np.float32), "labels": np.array([10, 20, 40, 80])}
    names = ["scores", "label"] if with_labels else ["class"]
    return model(nodes, {"x": ["N", 6]}, names, known, kinds={"class": TensorProto.INT64, "label": TensorProto.INT64})


@pytest.mark.parametrize("with_labels", [False, True], ids=["class", "scores_and_label"])
def test_the_client_takes_the_largest_score_without_a_table(with_labels: bool) -> None:
    proto = classifier(with_labels)
    graph = fheq.import_onnx(proto)
    x = np.random.default_rng(4).normal(size=(60, 6)).astype(np.float32)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 6)
    program = fheq.lower(graph, qparams)
    assert not program.lookups and [entry.name for entry in program.outputs] == ["scores"]
    (q,) = (np.asarray(fheq.simulate(program, *program.quantize(x))),)
    results = program.dequantize(q)
    scores = program.outputs[0].affine.dequantize(q)
    classes = np.argmax(scores, axis=1)
    wanted = (scores, np.array([10, 20, 40, 80])[classes]) if with_labels else (classes,)
    for got, want in zip(results, wanted, strict=True):
        np.testing.assert_array_equal(got, want if want.dtype == np.int64 else np.float32(want))  # the model's precision
    faked = fheq.fake_quant(graph, qparams, x)
    np.testing.assert_array_equal(np.asarray(faked[-1] if with_labels else faked), wanted[-1])
    assert np.mean(wanted[-1] == reference(proto, x)[-1]) > 0.9  # the rest is what 6 bits round away
    assert fheq.check(proto) == []


def test_a_compiled_classifier_gives_classes() -> None:
    graph = fheq.import_onnx(classifier(False))
    x = np.random.default_rng(4).normal(size=(8, 6)).astype(np.float32)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), 4))
    want = program.dequantize(np.asarray(fheq.simulate(program, *program.quantize(x))))[0]
    np.testing.assert_array_equal(fheq.compile(program).evaluate(x), want)


# Tables

ROW = n = 5

# Table applications for rows of quantized inputs.
COUNTS: dict[str, tuple[int, Sequence[onnx.NodeProto], Sequence[str]]] = {
    "sum_of_three": (0, [node("Sum", ["x", "x1", "x2"], ["r"])], ("x", "x1", "x2")),
    "comparison_of_two": (n, [node("Greater", ["x", "x1"], ["r"])], ("x", "x1")),
    "maximum_of_two": (n, [node("Max", ["x", "x1"], ["r"])], ("x", "x1")),
    "product_of_two": (2 * n, [node("Mul", ["x", "x1"], ["r"])], ("x", "x1")),
    "maximum_and_minimum_share_the_comparisons_of_their_first_round": (
        2 * (n - 1) - n // 2,
        [
            node("ReduceMax", ["x"], ["a"], axes=[1], keepdims=1),
            node("ReduceMin", ["x"], ["b"], axes=[1], keepdims=1),
            node("Sub", ["a", "b"], ["r"]),
        ],
        ("x",),
    ),
    # the maximum, exp, the log of the sum, exp
    "softmax": ((n - 1) + n + 1 + n, [node("Softmax", ["x"], ["r"], axis=1)], ("x",)),
    # the maximum, a comparison with it and the sums of hits of all but one element, and what is 0 and 1 exactly
    "hardmax": (3 * (n - 1) + n, [node("Hardmax", ["x"], ["h"], axis=1), node("MatMul", ["h", "w"], ["r"])], ("x",)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_tables_per_row(name: str) -> None:
    count, nodes, names = COUNTS[name]
    kinds = {"r": TensorProto.BOOL if name.startswith("comparison") else TensorProto.FLOAT}
    known = {"w": np.eye(ROW, dtype=np.float32)}
    graph = fheq.import_onnx(model(nodes, {x: ["N", ROW] for x in names}, ["r"], known, opset=17, kinds=kinds))
    data = [np.random.default_rng(i).normal(size=(80, ROW)).astype(np.float32) for i in range(len(names))]
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, *data), 4))
    assert sum(int(np.prod(program.values[table.out].shape)) for table in program.lookups) == count


@pytest.mark.parametrize("classes", [3, 5])
def test_the_place_of_a_maximum_holds_for_samples_beyond_calibration(classes: int) -> None:
    """What is compared is sized for every input, and of a maximum and its elements in no more bits than theirs; ties fall as
    in fake quantization."""
    rng = np.random.default_rng(classes)
    known = {"w": rng.normal(size=(4, classes)), "e": rng.normal(size=(classes, 3)), "v": rng.normal(size=(3, 2))}
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("ArgMax", ["h"], ["i"], axis=1, keepdims=0),
        node("Gather", ["e", "i"], ["g"]),
        node("MatMul", ["g", "v"], ["y"]),
    ]
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 4]}, ["y"], {k: np.float32(v) for k, v in known.items()}))
    x = rng.normal(size=(400, 4)).astype(np.float32)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 6)
    program = fheq.lower(graph, qparams)
    assert not any(a.can_wrap for name, a in program.accumulators.items() if name != "h")
    (got,) = program.dequantize(fheq.simulate(program, *program.quantize(3 * x)))
    np.testing.assert_allclose(got, fheq.fake_quant(graph, qparams, 3 * x), atol=1e-5)


@pytest.mark.parametrize("indices", [(3,), (2, 3)])
@pytest.mark.parametrize("columns", [0, 1])
def test_known_numbers_by_index_are_one_table_each(indices: tuple[int, ...], columns: int) -> None:
    """Of numbers in a row, or in rows of one; indices count from the end where they are negative."""
    values = tensor(7, *([1] * columns))
    nodes = [node("Gather", ["e", "x"], ["g"]), node("Tanh", ["g"], ["y"])]
    proto = model(
        nodes, {"x": ["N", *indices]}, ["y"], {"e": values}, kinds={"x": TensorProto.INT64, "y": TensorProto.FLOAT}
    )
    graph, x = fheq.import_onnx(proto), np.random.default_rng(0).integers(-7, 7, (200, *indices))
    want = reference(proto, x)[0]
    np.testing.assert_allclose(fheq.evaluate(graph, x), want, rtol=1e-6)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 8)
    program = fheq.lower(graph, qparams)
    assert sum(int(np.prod(program.values[table.out].shape)) for table in program.lookups) == int(np.prod(indices))
    got = program.dequantize(fheq.simulate(program, *program.quantize(x)))[0]
    np.testing.assert_allclose(got, want, atol=np.max(qparams.tensors["y"].scale) / 2 * (1 + 1e-6))


@pytest.mark.parametrize("flat", [False, True])
def test_rows_of_a_table_reach_no_further_than_their_largest_numbers(flat: bool) -> None:
    """A product with one-hot rows: the range of its accumulator is what all choices of rows make of it."""
    count, size = 9, 3
    nodes = [node("Gather", ["e", "x"], ["g"])]
    nodes += [node("Reshape", ["g", "shape"], ["f"])] if flat else []
    nodes += [node("MatMul", [nodes[-1].output[0], "w"], ["h"]), node("Relu", ["h"], ["y"])]
    known = {"e": tensor(count, 4), "w": tensor(8 if flat else 4, size, low=-2.0)}
    known |= {"shape": np.array([-1, 8])} if flat else {}
    proto = model(nodes, {"x": ["N", 2]}, ["y"], known, kinds={"x": TensorProto.INT64, "y": TensorProto.FLOAT})
    graph, x = fheq.import_onnx(proto), np.stack(np.mgrid[:count, :count], axis=-1).reshape(-1, 2)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), 6))
    (made,) = (i for i in program.instructions if isinstance(i, MatMul))
    chosen = made.weight.reshape(-1, count, made.weight.shape[1])  # a block of rows for each index
    ends = [end(chosen, axis=1).sum(axis=0) for end in (np.min, np.max)]
    (accumulator,) = program.accumulators.values()
    assert accumulator.high - accumulator.low == np.max(ends[1] - ends[0]) and not accumulator.can_wrap
    want = reference(proto, x)[0]
    got = program.dequantize(fheq.simulate(program, *program.quantize(x)))[0]
    step = np.max(program.outputs[0].affine.scale)
    np.testing.assert_allclose(got, want, atol=step / 2 + len(chosen) * np.abs(want).max() / 2**5)


def test_indices_that_nobody_reads_are_no_part_of_a_pool():
    made = node("MaxPool", ["x"], ["y", "places"], kernel_shape=[2, 2])
    proto = model([made], {"x": ["N", 1, 4, 4]}, ["y"])
    x = tensor(60, 1, 4, 4)
    np.testing.assert_allclose(fheq.evaluate(fheq.import_onnx(proto), x), reference(proto, x)[0])


@pytest.mark.parametrize("others", [[], ["m"]])
def test_an_output_without_elements_is_refused_by_name(others):
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Slice", ["m", "one", "one", "one"], ["y"])]
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 4]}, ["y", *others], {"w": tensor(4, 3), "one": np.array([1])}))
    (found,) = fheq.check(graph)
    assert "output 'y' has no elements" in found.cause
    with pytest.raises(UnsupportedError, match=r"output 'y' has no elements.*drop it"):
        fheq.calibrate(graph, tensor(60, 4))


def of_version(opset: int, *nodes: onnx.NodeProto) -> onnx.ModelProto:
    known = {"w": np.ones((4, 2), np.float32), "one": np.ones(1, np.float32)}
    made = model([*nodes, node("MatMul", ["h", "w"], ["y"])], {"x": ["N", 4]}, ["y"], known)
    made.opset_import[0].version = opset
    return made


@pytest.mark.parametrize(
    "proto",
    [
        of_version(9, node("Pad", ["x"], ["h"], pads=[0, 1, 0, -1], value=0.5, mode="constant")),
        of_version(15, node("CastLike", ["one", "x"], ["c"]), node("Mul", ["c", "x"], ["h"])),
    ],
    ids=["Pad's value as an attribute", "CastLike of what is known"],
)
def test_forms_of_other_versions_are_those_of_today(proto: onnx.ModelProto) -> None:
    assert fheq.check(proto) == []
    graph, x = fheq.import_onnx(proto), np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 8)
    program = fheq.lower(graph, qparams)
    got = program.dequantize(fheq.simulate(program, *program.quantize(x)))[0]
    np.testing.assert_allclose(got, fheq.fake_quant(graph, qparams, x), atol=1e-5)
    step = float(np.max(program.inputs[0].affine.scale))
    np.testing.assert_allclose(got, reference(proto, x)[0], atol=4 * step / 2)  # half a step for each summand
