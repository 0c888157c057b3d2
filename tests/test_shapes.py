"""Batch axes of inputs that differ in rank, symbols and type."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build_models import model, node, reference, tensor
from models import as_tuple
from onnx import TensorProto

import fheq
from fheq.errors import DataError

INT64, BOOL = TensorProto.INT64, TensorProto.BOOL
INDICES = np.array([[0, 2], [1, 1], [2, 0]])
FLAGS = np.array([[True, False], [False, False], [True, True]])
FORMS = {
    "ranks 1 to 5": (
        model(
            [node("Mul", ["a", "b"], ["y"]), node("Relu", ["e"], ["z"])],
            {"a": ["N"], "b": ["N"], "e": ["N", 1, 2, 1, 2]},
            ["y", "z"],
        ),
        [tensor(3), tensor(3), tensor(3, 1, 2, 1, 2)],
        [0, 0, 0],
    ),
    "a symbol of its own for each input": (
        model([node("Add", ["a", "b"], ["y"])], {"a": ["n", 2], "b": ["m", 2]}, ["y"]),
        [tensor(3, 2), tensor(3, 2)],
        [0, 0],
    ),
    "axes that differ": (
        model(
            [node("Transpose", ["b"], ["t"], perm=[1, 0]), node("Add", ["a", "t"], ["y"])],
            {"a": ["N", 2], "b": [2, "N"]},
            ["y"],
        ),
        [tensor(3, 2), tensor(2, 3)],
        [0, 1],
    ),
    "indices and a mask of the samples": (
        model(
            [
                node("Gather", ["table", "i"], ["g"]),
                node("Cast", ["m"], ["f"], to=TensorProto.FLOAT),
                node("Unsqueeze", ["f", "last"], ["u"]),
                node("Mul", ["g", "u"], ["y"]),
            ],
            {"i": ["N", 2], "m": ["N", 2]},
            ["y"],
            {"table": tensor(3, 4), "last": np.array([2])},
            kinds={"i": INT64, "m": BOOL},
        ),
        [INDICES, FLAGS],
        [0, 0],
    ),
    "an image beside a vector": (
        model(
            [
                node("GlobalAveragePool", ["x"], ["p"]),
                node("Flatten", ["p"], ["f"]),
                node("Concat", ["f", "v"], ["y"], axis=1),
            ],
            {"x": ["N", 2, 3, 3], "v": ["N", 4]},
            ["y"],
        ),
        [tensor(3, 2, 3, 3), tensor(3, 4)],
        [0, 0],
    ),
}


MOVED = {"from": np.array([1]), "to": np.array([1]), "axis": np.array([1])}
EMPTY = node("Slice", ["x", "from", "to", "axis"], ["e"])
CIRCUITS = {
    "the batch last": (
        model([node("MatMul", ["w", "x"], ["m"]), node("Relu", ["m"], ["y"])], {"x": [3, "N"]}, ["y"], {"w": tensor(2, 3)}),
        [tensor(3, 4)],
    ),
    "the batch in the middle of five axes": (
        model(
            [node("Relu", ["x"], ["r"]), node("ReduceMean", ["r"], ["y"], axes=[0, 4], keepdims=0)],
            {"x": [2, 1, "N", 2, 2]},
            ["y"],
        ),
        [tensor(2, 1, 4, 2, 2)],
    ),
    "a matrix for all samples": (
        model([node("MatMul", ["x", "c"], ["y"])], {"x": ["N", 2], "c": [2, 2]}, ["y"]),
        [tensor(4, 2), tensor(2, 2)],
    ),
    "a scalar for all samples": (
        model([node("Mul", ["x", "s"], ["y"])], {"x": ["N", 3], "s": []}, ["y"]),
        [tensor(4, 3), tensor()],
    ),
    "places for all samples": (
        model([node("Gather", ["x", "i"], ["y"], axis=1)], {"x": ["N", 3, 1], "i": [2]}, ["y"], kinds={"i": INT64}),
        [tensor(4, 3, 1), np.array([2, 0])],
    ),
    "a mask that chooses": (
        model(
            [node("Where", ["m", "x", "z"], ["y"])],
            {"x": ["N", 2, 2], "z": ["N", 2, 2], "m": ["N", 1, 2]},
            ["y"],
            kinds={"m": BOOL},
        ),
        [tensor(4, 2, 2), tensor(4, 2, 2), FLAGS[[0, 1, 2, 0], None]],
    ),
    "a known mask that chooses": (
        model(
            [node("Relu", ["x"], ["r"]), node("Where", ["m", "r", "z"], ["y"])],
            {"x": ["N", 2, 1], "z": ["N", 1, 3]},
            ["y"],
            {"m": np.array([[True, False, True], [False, True, False]])},
        ),
        [tensor(4, 2, 1), tensor(4, 1, 3)],
    ),
    "a column times a row": (
        model([node("Mul", ["a", "b"], ["y"])], {"a": ["N", 2, 1], "b": ["N", 1, 2]}, ["y"]),
        [tensor(4, 2, 1), tensor(4, 1, 2)],
    ),
    "a known tensor of more axes": (
        model([node("Max", ["x", "k"], ["y"])], {"x": ["N", 2]}, ["y"], {"k": tensor(2, 1, 2)}),
        [tensor(4, 2)],
    ),
    "samples that are scalars": (
        model(
            [node("ReduceSum", ["x", "axis"], ["s"], keepdims=0), node("Relu", ["s"], ["y"])], {"x": ["N", 3]}, ["y"], MOVED
        ),
        [tensor(4, 3)],
    ),
    "six axes inside": (
        model(
            [
                node("Reshape", ["x", "a"], ["r"]),
                node("Transpose", ["r"], ["t"], perm=[0, 1, 4, 2, 5, 3]),
                node("Reshape", ["t", "b"], ["f"]),
                node("Relu", ["f"], ["y"]),
            ],
            {"x": ["N", 4, 1, 2]},
            ["y"],
            {"a": np.array([-1, 1, 2, 2, 1, 2]), "b": np.array([-1, 1, 2, 4])},
        ),
        [tensor(4, 4, 1, 2)],
    ),
    "nothing beside something": (
        model([EMPTY, node("Concat", ["e", "x"], ["c"], axis=1), node("Relu", ["c"], ["y"])], {"x": ["N", 2]}, ["y"], MOVED),
        [tensor(4, 2)],
    ),
    "nothing before a layer": (
        model(
            [node("Concat", ["x", "none"], ["c"], axis=1), node("MatMul", ["c", "w"], ["y"])],
            {"x": [1, 2]},
            ["y"],
            {"none": np.zeros((1, 0), np.float32), "w": tensor(2, 2)},
        ),
        [tensor(1, 2)],
    ),
    "a product over nothing": (
        model(
            [EMPTY, node("MatMul", ["e", "w"], ["p"]), node("Add", ["p", "x"], ["a"]), node("Relu", ["a"], ["y"])],
            {"x": ["N", 2]},
            ["y"],
            {**MOVED, "w": np.zeros((0, 2), np.float32)},
        ),
        [tensor(4, 2)],
    ),
}


@pytest.mark.parametrize("name", CIRCUITS)
def test_corner_cases_of_shapes_run_as_circuits(name: str) -> None:
    """Floats as in onnxruntime; integers of the simulation as those of the circuit evaluated in the clear."""
    proto, arrays = CIRCUITS[name]
    graph = fheq.import_onnx(proto)
    for got, want in zip(as_tuple(fheq.evaluate(graph, *arrays)), reference(proto, *arrays), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert fheq.check(graph) == []
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, *arrays), 3))
    integers = program.quantize(*arrays)
    simulated, clear = fheq.simulate(program, *integers), fheq.compile(program).evaluate(*integers, quantized=True)
    np.testing.assert_array_equal(simulated, clear)
    assert program.dequantize(simulated)[0].shape == reference(proto, *arrays)[0].shape


def test_a_vector_without_samples_gives_a_scalar_in_a_circuit() -> None:
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["r"]), node("MatMul", ["r", "v"], ["y"])]
    graph = fheq.import_onnx(model(nodes, {"x": [4]}, ["y"], {"w": tensor(4, 3), "v": tensor(3)}))
    x = tensor(60, 4)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), 3))
    want = program.dequantize(fheq.simulate(program, *program.quantize(x[:4])))[0]
    assert want.shape == (4,)
    np.testing.assert_array_equal(fheq.compile(program).evaluate(x[:4]), want)


@pytest.mark.parametrize("name", FORMS)
def test_batches_of_several_inputs(name: str) -> None:
    """As onnxruntime on the whole batch; and `check` finds a form for encrypted data."""
    proto, arrays, axes = FORMS[name]
    graph = fheq.import_onnx(proto)
    assert [port.batch_axis for port in graph.inputs] == axes
    for got, want in zip(as_tuple(fheq.evaluate(graph, *arrays)), reference(proto, *arrays), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert fheq.check(graph) == []


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_is_taken_as_it_is(batch: int) -> None:
    """One sample is a batch of one, which may grow; three are the shape of one encrypted run."""
    nodes = [node("Gemm", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])]
    proto = model(nodes, {"x": [batch, 4]}, ["y"], {"w": tensor(4, 2)})
    graph, x = fheq.import_onnx(proto), tensor(batch, 4)
    np.testing.assert_allclose(fheq.evaluate(graph, x), reference(proto, x)[0], rtol=1e-5, atol=1e-6)
    assert graph.inputs[0].batch_axis == (0 if batch == 1 else None)


def test_what_is_given_once_holds_for_every_sample() -> None:
    """An input without a batch axis; it may also be given for each sample."""
    graph = fheq.import_onnx(model([node("Add", ["x", "c"], ["y"])], {"x": ["N", 2], "c": [2]}, ["y"]))
    x, c = tensor(3, 2), tensor(2)
    np.testing.assert_array_equal(fheq.evaluate(graph, x, c), fheq.evaluate(graph, x, np.stack([c, c, c])))
    with pytest.raises(DataError, match=r"'x': 3, 'c': 2"):
        fheq.evaluate(graph, x, np.stack([c, c]))


def test_the_output_has_a_symbol_of_its_own() -> None:
    proto = model([node("Relu", ["x"], ["y"])], {"x": ["rows", 2]}, ["y"])
    proto.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, ["other", 2]))
    assert fheq.import_onnx(proto).outputs[0].batch_axis == 0


def test_scalars_are_batched_along_a_new_axis() -> None:
    graph = fheq.import_onnx(model([node("Tanh", ["x"], ["y"])], {"x": []}, ["y"]))
    np.testing.assert_allclose(fheq.evaluate(graph, np.float32([0.5, 1.0])), np.tanh([0.5, 1.0]), rtol=1e-5)
