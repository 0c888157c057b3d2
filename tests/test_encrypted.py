"""Real encrypted runs of tiny programs: keys, ciphertexts and all.

A table fails with probability 1e-6 (1e-5 for all of a run in one test) and a test applies fewer than 100: the chance that
any test sees a wrong result is below 1e-3. Results are compared with simulation integer for integer.

One test makes tables fail often, and compares how often with simulated noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import onnx
import pytest
from build_models import model, node
from models import as_tuple

import fheq
from fheq import Rounding, Spec

pytestmark = [pytest.mark.encrypted, pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")]
P_ERROR = 1e-6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(80, 2)).astype(np.float32)
Z = RNG.normal(size=(80, 2)).astype(np.float32)
W = np.float32([[0.5, -1.0], [1.0, 0.75]])
SMALL = {"op_inputs": 2, "op_weights": 2, "model_inputs": 2, "model_outputs": 3}


def lowered(
    nodes: list, inputs: tuple[str, ...], outputs: tuple[str, ...], spec: Spec, rows: tuple[int, ...] = ()
) -> fheq.IntProgram:
    known = {"w": W, "v": np.float32([[1.0], [-0.5]])}
    used = {name for n in nodes for name in n.input}
    proto = model(nodes, {name: ["N", *rows, 2] for name in inputs}, outputs, {k: v for k, v in known.items() if k in used})
    graph = fheq.import_onnx(proto)
    data = [v.reshape(-1, *rows, 2) for v in (X, Z)[: len(inputs)]]
    return fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, *data), spec))


def assert_encrypted_is_simulated(program: fheq.IntProgram, circuit: fheq.Circuit, *inputs: np.ndarray) -> None:
    """Step by step, on real values: what a user calls."""
    circuit.keygen()
    decrypted = circuit.decrypt(circuit.run(circuit.encrypt(*inputs), progress=False))
    simulated = program.dequantize(*as_tuple(fheq.simulate(program, *program.quantize(*inputs))))
    for got, want in zip(as_tuple(decrypted), simulated, strict=True):
        np.testing.assert_array_equal(got, want)


def test_two_layers() -> None:
    nodes = [node("Gemm", ["x", "w"], ["h"]), node("Relu", ["h"], ["r"]), node("Gemm", ["r", "v"], ["y"])]
    program = lowered(nodes, ("x",), ("y",), Spec(SMALL))
    circuit = fheq.compile(program, p_error=P_ERROR)
    assert circuit.p_error == P_ERROR and circuit.bootstraps == 2
    assert_encrypted_is_simulated(program, circuit, X[:3])
    (q,) = program.quantize(X[:2])
    np.testing.assert_array_equal(circuit(q, quantized=True, progress=False), fheq.simulate(program, q))


def test_two_inputs_two_outputs_and_a_product() -> None:
    nodes = [node("Mul", ["x", "z"], ["p"]), node("Add", ["x", "z"], ["s"])]
    program = lowered(nodes, ("x", "z"), ("p", "s"), Spec(SMALL))
    assert_encrypted_is_simulated(program, fheq.compile(program, p_error=P_ERROR), X[:2], Z[:2])


def test_a_clear_input() -> None:
    nodes = [node("Add", ["x", "z"], ["s"]), node("Tanh", ["s"], ["t"]), node("Gemm", ["t", "v"], ["y"])]
    program = lowered(nodes, ("x", "z"), ("y",), Spec(SMALL))
    circuit = fheq.compile(program, global_p_error=1e-5, clear=("z",))
    assert circuit.global_p_error == 1e-5 and circuit.p_error is None
    assert_encrypted_is_simulated(program, circuit, X[:2], Z[:2])


def test_an_input_that_nothing_reads() -> None:
    program = lowered([node("Gemm", ["x", "w"], ["y"])], ("x", "z"), ("y",), Spec(SMALL))
    assert_encrypted_is_simulated(program, fheq.compile(program, p_error=P_ERROR), X[:1], Z[:1])


def test_approximate_rounding_is_within_a_cell() -> None:
    """Rounded to 3 bits: an accumulator may fall into a neighbouring cell, so the table's result into the next entry."""
    nodes = [node("Gemm", ["x", "w"], ["h"]), node("Identity", ["h"], ["i"]), node("Relu", ["i"], ["y"])]
    program = lowered(nodes, ("x",), ("y",), Spec(4, rounding=Rounding(3, approximate=True)))
    (table,) = program.lookups
    step = int(np.max(np.abs(np.diff(table.table.astype(int), axis=1))))
    (q,) = program.quantize(X[:4])
    circuit = fheq.compile(program, p_error=P_ERROR)
    encrypted = circuit(q, quantized=True, progress=False)
    assert np.max(np.abs(encrypted - fheq.simulate(program, q))) <= step


def exported() -> onnx.ModelProto:
    """What `export_qdq` writes of two layers that were quantized: a QDQ model."""
    nodes = [node("Gemm", ["x", "w"], ["h"]), node("Relu", ["h"], ["r"]), node("Gemm", ["r", "v"], ["y"])]
    known = {"w": W, "v": np.float32([[1.0], [-0.5]])}
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 2]}, ["y"], known))
    return fheq.export_qdq(graph, fheq.fit(graph, fheq.calibrate(graph, X), SMALL))


def qonnx() -> onnx.ModelProto:
    """Quant nodes of two modes of rounding, and signs."""
    domain = "qonnx.custom_op.general"
    quant = lambda x, y, **how: node("Quant", [x, "s", "z", "bits"], [y], domain=domain, signed=1, narrow=1, **how)
    nodes = [
        quant("x", "q", rounding_mode="FLOOR"),
        quant("w", "u", rounding_mode="ROUND"),
        node("MatMul", ["q", "u"], ["h"]),
        node("BipolarQuant", ["h", "s"], ["b"], domain=domain),
        node("MatMul", ["b", "u"], ["y"]),
    ]
    known = {"w": W, "s": np.float32(0.5), "z": np.float32(0), "bits": np.float32(2)}
    return model(nodes, {"x": ["N", 2]}, ["y"], known, domains={domain: 1})


def gru() -> onnx.ModelProto:
    """One unit over two time steps."""
    known = {"w": np.float32([[[0.5], [1.0], [-1.0]]]), "r": np.float32([[[0.5], [-0.5], [1.0]]])}
    known |= {"shape": np.int64([2, 1, 1])}
    nodes = [node("Reshape", ["x", "shape"], ["t"]), node("GRU", ["t", "w", "r"], ["", "h"], hidden_size=1)]
    return model([*nodes, node("Reshape", ["h", "flat"], ["y"])], {"x": [1, 2]}, ["y"], known | {"flat": np.int64([1, 1])})


def attention() -> onnx.ModelProto:
    """Products of encrypted matrices around a softmax, for two tokens of one channel."""
    nodes = [
        node("Reshape", ["x", "column"], ["k"]),
        node("Reshape", ["x", "row"], ["q"]),
        node("MatMul", ["k", "q"], ["s"]),
        node("Softmax", ["s"], ["p"], axis=-1),
        node("MatMul", ["p", "k"], ["a"]),
        node("MatMul", ["a", "u"], ["y"]),
    ]
    known = {"column": np.int64([1, 2, 1]), "row": np.int64([1, 1, 2]), "u": np.float32([[1.0]])}
    return model(nodes, {"x": [1, 2]}, ["y"], known)


@pytest.mark.parametrize("kind", [exported, qonnx, gru, attention], ids=lambda kind: kind.__name__)
def test_models_of_each_kind(kind) -> None:
    graph = fheq.import_onnx(kind())
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, X), SMALL))
    circuit = fheq.compile(program, p_error=P_ERROR)
    assert 0 < circuit.bootstraps < 100
    assert_encrypted_is_simulated(program, circuit, X[:1])


def forest() -> Any:
    """11 tables for a sample."""
    return pytest.importorskip("sklearn.ensemble").RandomForestClassifier(2, max_depth=2, random_state=0)


def radial_svc() -> Any:
    """Exponentials of the squared distances to the 5 support vectors of 20 rows: 8 tables."""
    return pytest.importorskip("sklearn.svm").SVC(kernel="rbf", C=10, gamma=0.5)


@pytest.mark.parametrize(("make", "rows"), [(forest, 80), (radial_svc, 20)], ids=["forest", "radial_svc"])
def test_estimators_with_tables(make: Callable[[], Any], rows: int) -> None:
    """And the string labels that the client names after decryption."""
    estimator = make()
    pytest.importorskip("skl2onnx")
    names = np.where(X[:, 0] + X[:, 1] > 0, "above", "below")
    graph = fheq.from_sklearn(estimator.fit(X[:rows], names[:rows]), X)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, X), SMALL | {"op_weights": 3}))
    circuit = fheq.compile(program, p_error=P_ERROR)
    assert 0 < circuit.bootstraps < 100
    assert_encrypted_is_simulated(program, circuit, X[:3])
    labels, _ = circuit(X[:3], progress=False)
    assert set(labels) <= {"above", "below"}


def test_a_linear_classifier_names_its_labels() -> None:
    logistic = pytest.importorskip("sklearn.linear_model").LogisticRegression
    pytest.importorskip("skl2onnx")
    model = logistic().fit(X, np.where(X[:, 0] + X[:, 1] > 0, "above", "below"))
    graph = fheq.from_sklearn(model, X)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, X), 4))
    assert not program.lookups
    circuit = fheq.compile(program, p_error=P_ERROR)
    assert_encrypted_is_simulated(program, circuit, X[:10])
    labels, probabilities = circuit(X[:10], progress=False)
    assert np.mean(labels == model.predict(X[:10])) >= 0.8 and probabilities.shape == (10, 2)


def test_tables_fail_as_often_as_simulated() -> None:
    """Rows are independent: shares of wrong ones differ by less than 5 standard deviations of the binomial, which a right
    program exceeds once in a million times."""
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])]
    program = lowered(nodes, ("x",), ("y",), Spec(SMALL), rows=(16,))
    noise = fheq.noise(program, p_error=0.3)
    (q,) = program.quantize(np.random.default_rng(1).normal(size=(500, 16, 2)).astype(np.float32))
    exact = fheq.simulate(program, q)
    expected = np.mean(np.any(fheq.simulate(program, q, noise=noise, key=jax.random.key(0)) != exact, axis=-1))
    encrypted = fheq.compile(program, p_error=0.3)(q[:8], quantized=True, progress=False)
    wrong = np.any(encrypted != exact[:8], axis=-1)
    assert 0.2 < expected < 0.6
    assert abs(np.mean(wrong) - expected) < 5 * np.sqrt(expected * (1 - expected) * (1 / wrong.size + 1 / 8000))
