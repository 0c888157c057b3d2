"""Inputs that a model compares with known numbers: the client encrypts the answers, which take no tables."""

from __future__ import annotations

import json

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from build_models import model, node, tensor

import fheq
from fheq.saving import program_as_dict

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")

RNG = np.random.default_rng(0)
IDS, NUMBERS = RNG.integers(0, 6, (80, 3)), RNG.normal(size=(80, 3)).astype(np.float32)
KINDS = {"ids": onnx.TensorProto.INT64}


def embedding() -> onnx.ModelProto:
    """Ids that are looked up, beside an input of numbers that comes first."""
    nodes = [
        node("Gather", ["table", "ids"], ["e"]),
        node("Flatten", ["e"], ["f"]),
        node("Concat", ["x", "f"], ["j"], axis=1),
        node("MatMul", ["j", "w"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "v"], ["y"]),
    ]
    known = {"table": tensor(6, 2), "w": tensor(9, 4), "v": tensor(4, 2)}
    return model(nodes, {"ids": ["N", 3], "x": ["N", 3]}, ["y"], known, kinds=KINDS)


def category_and_number() -> onnx.ModelProto:
    """Ids that are categories and numbers as well."""
    nodes = [
        node("OneHot", ["ids", "depth", "ends"], ["o"]),
        node("Flatten", ["o"], ["f"]),
        node("Cast", ["ids"], ["c"], to=onnx.TensorProto.FLOAT),
        node("Concat", ["x", "f", "c"], ["j"], axis=1),
        node("MatMul", ["j", "w"], ["y"]),
    ]
    known = {"depth": np.array([6]), "ends": np.float32([0, 1]), "w": tensor(24, 2)}
    return model(nodes, {"ids": ["N", 3], "x": ["N", 3]}, ["y"], known, kinds=KINDS)


MODELS = {"embedding": (embedding(), 4, ["x"]), "category and number": (category_and_number(), 0, ["ids", "x"])}


@pytest.mark.parametrize("name", MODELS)
def test_the_client_encrypts_rows_of_one_hot_ids(name: str) -> None:
    proto, tables, plain = MODELS[name]
    graph = fheq.import_onnx(proto)
    qparams = fheq.fit(graph, fheq.calibrate(graph, IDS, NUMBERS), 6)
    program = fheq.lower(graph, qparams)
    assert [port.name for port in program.given] == ["ids", "x"]
    assert [entry.name for entry in program.inputs if entry.code is None] == plain
    assert sum(int(np.prod(program.values[table.out].shape)) for table in program.lookups) == tables
    integers = program.quantize(IDS, NUMBERS)
    (rows,) = (q for q, entry in zip(integers, program.inputs) if entry.code is not None)
    np.testing.assert_array_equal(rows.reshape(80, 3, 6), IDS[..., None] == np.arange(6))
    got = program.dequantize(fheq.simulate(program, *integers))[0]
    np.testing.assert_allclose(got, fheq.fake_quant(graph, qparams, IDS, NUMBERS), atol=1e-5)
    want = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"ids": IDS, "x": NUMBERS})[0]
    assert np.mean((got - want) ** 2) < 0.01 * np.var(want)


@pytest.mark.parametrize("name", MODELS)
def test_pruned_and_reconstructed_models_lower(name: str) -> None:
    graph = fheq.import_onnx(MODELS[name][0])
    pruned = fheq.prune(graph, IDS, NUMBERS, tolerance=0.1)
    qparams = fheq.fit(pruned, fheq.calibrate(pruned, IDS, NUMBERS), 4)
    training = fheq.Training(steps=5)
    tuned, learned = fheq.reconstruct(pruned, qparams, IDS, NUMBERS, key=jax.random.key(0), training=training)
    program = fheq.lower(tuned, learned)
    got = program.dequantize(fheq.simulate(program, *program.quantize(IDS, NUMBERS)))[0]
    np.testing.assert_allclose(got, fheq.fake_quant(tuned, learned, IDS, NUMBERS), atol=1e-5)


def test_what_is_saved_for_the_client_says_how_to_encode() -> None:
    graph = fheq.import_onnx(embedding())
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, IDS, NUMBERS), 6))
    saved = json.loads(json.dumps(program_as_dict(program)))["inputs"]
    (at,) = (i for i, entry in enumerate(saved) if "code" in entry)
    code, quantizer = saved[at]["code"], saved[at]["code"]["quantizer"]
    assert saved[at]["encodes"] == "ids"
    q = np.round(IDS / quantizer["scale"] + quantizer["zero_point"]).astype(int)
    rows = [np.asarray(code["table"])[code["group"], sample.ravel()[code["elements"]]] for sample in q]
    np.testing.assert_array_equal(rows, program.quantize(IDS, NUMBERS)[at])


@pytest.mark.encrypted
@pytest.mark.parametrize("clear", [(), ("ids",)])
def test_encrypted_rows_give_what_the_simulation_does(clear: tuple[str, ...]) -> None:
    graph = fheq.import_onnx(embedding())
    bits = {"op_inputs": 2, "op_weights": 3, "model_inputs": 2, "model_outputs": 3}
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, IDS, NUMBERS), bits))
    circuit = fheq.compile(program, clear=clear)
    want = program.dequantize(fheq.simulate(program, *program.quantize(IDS[:2], NUMBERS[:2])))[0]
    np.testing.assert_array_equal(circuit(IDS[:2], NUMBERS[:2]), want)
