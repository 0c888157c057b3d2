"""Inputs of strings: the client numbers categories before encryption, as it names labels after decryption."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from build_models import model, node
from onnx import TensorProto

import fheq
from fheq.errors import DataError, UnsupportedError
from fheq.post_training import PostTrainingAffineQuantization
from fheq.saving import program_as_dict

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
ML = "ai.onnx.ml"
RNG = np.random.default_rng(0)
CITIES = np.array(["Bern", "Oslo", "Rome"], object)


def encoded() -> Any:
    """Prices by city, with one of their own for cities that are not known, times a weight."""
    prices = {"keys_strings": ["Rome", "Bern", "Oslo"], "values_floats": [2.5, 4.0, -1.0], "default_float": 7.0}
    nodes = [node("LabelEncoder", ["x"], ["p"], domain=ML, **prices), node("MatMul", ["p", "w"], ["y"])]
    w = np.array([[1.0], [0.5]], np.float32)
    return model(nodes, {"x": ["N", 2]}, ["y"], {"w": w}, kinds={"x": TensorProto.STRING}, domains={ML: 2})


def test_strings_are_looked_up_as_onnxruntime_does() -> None:
    """Known and unknown ones, those that calibration does not have among them."""
    graph = fheq.import_onnx(encoded())
    assert graph.inputs[0].labels == ("Bern", "Oslo", "Rome")
    seen = CITIES[RNG.integers(0, 2, (50, 2))]
    found = PostTrainingAffineQuantization(8, graph).quantize_module(seen)
    rows = np.array([["Bern", "Rome"], ["Oslo", "Paris"], ["", "Aachen"], ["Zug", "Oslo"]], object)
    (want,) = onnxruntime.InferenceSession(encoded().SerializeToString()).run(None, {"x": rows})
    np.testing.assert_allclose(fheq.evaluate(graph, rows), want)
    np.testing.assert_array_equal(found.quantize_input(rows), [[0, 2], [1, 3], [3, 3], [3, 1]])
    np.testing.assert_array_equal(found.program.quantize(rows)[0], found.quantize_input(rows))
    known = rows[:1]
    error = np.abs(found.forward(known) - fheq.evaluate(graph, known))
    assert np.max(error) < 8 / 255 * 1.5  # a step of prices, for either of two


def test_strings_that_are_encrypted_one_hot_are_saved_with_their_numbers() -> None:
    categories = {"cats_strings": CITIES.tolist(), "zeros": 1}
    nodes = [node("OneHotEncoder", ["x"], ["o"], domain=ML, **categories), node("MatMul", ["o", "w"], ["y"])]
    known, kinds = {"w": np.float32([[1.0], [0.5], [-2.0]])}, {"x": TensorProto.STRING}
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 1]}, ["y"], known, kinds=kinds, domains={ML: 1}))
    rows = CITIES[RNG.integers(0, 3, (50, 1))]
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, rows), 6))
    (saved,) = program_as_dict(program)["inputs"]
    assert saved["encodes"] == "x" and list(saved["labels"]) == CITIES.tolist() and not program.lookups
    np.testing.assert_array_equal(program.quantize(rows)[0].reshape(50, 3), rows == CITIES)


@pytest.mark.parametrize(
    ("nodes", "cause"),
    [
        ([node("Relu", ["x"], ["y"])], "Relu"),
        ([node("Identity", ["x"], ["h"]), node("Cast", ["h"], ["y"], to=1)], "casts them to numbers"),
    ],
)
def test_strings_that_are_computed_with_are_refused(nodes: list, cause: str) -> None:
    with pytest.raises(UnsupportedError, match=f"holds strings.*{cause}.*give the model numbers"):
        fheq.import_onnx(model(nodes, {"x": ["N", 2]}, ["y"], kinds={"x": TensorProto.STRING}))


def test_numbers_are_no_strings() -> None:
    with pytest.raises(DataError, match="'x' has dtype float"):
        PostTrainingAffineQuantization(8, encoded()).quantize_module(np.zeros((4, 2), np.float32))


@pytest.mark.parametrize("unknown", ["error", "ignore"])
def test_one_hot_categories_of_scikit_learn(unknown: str) -> None:
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    pytest.importorskip("skl2onnx")
    x = np.stack([CITIES[RNG.integers(0, 3, 80)], np.array(["no", "yes"], object)[RNG.integers(0, 2, 80)]], axis=1)
    encoder = preprocessing.OneHotEncoder(handle_unknown=unknown, sparse_output=False).fit(x)
    found = PostTrainingAffineQuantization(8, fheq.from_sklearn(encoder, x)).quantize_module(x[:40])
    rows = x if unknown == "error" else np.append(x, [["Paris", "yes"], ["Rome", "perhaps"]], axis=0)
    np.testing.assert_array_equal(found.forward(rows), encoder.transform(rows))


def test_columns_of_a_table_are_inputs_of_their_own() -> None:
    """Numbers and strings, as a ColumnTransformer chooses them by name; scikit-learn's labels are the oracle."""
    pandas = pytest.importorskip("pandas")
    compose, linear_model = pytest.importorskip("sklearn.compose"), pytest.importorskip("sklearn.linear_model")
    pytest.importorskip("skl2onnx")
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    columns = {"age": RNG.integers(18, 80, 120), "income": RNG.normal(50, 10, 120), "city": CITIES[RNG.integers(0, 3, 120)]}
    frame = pandas.DataFrame(columns)
    numbers, names = ("numbers", StandardScaler(), ["age", "income"]), ("names", OneHotEncoder(), ["city"])
    classifier = make_pipeline(compose.ColumnTransformer([numbers, names]), linear_model.LogisticRegression())
    classifier.fit(frame, (frame["age"] > 40) & (frame["city"] != "Rome"))
    graph = fheq.from_sklearn(classifier, frame)
    assert [(port.name, port.type.dtype.kind, port.shape) for port in graph.inputs] == [
        ("age", "i", (1,)),
        ("income", "f", (1,)),
        ("city", "i", (1,)),
    ]
    data = [frame[[name]].to_numpy() for name in frame]
    labels, _ = fheq.evaluate(graph, *data)
    np.testing.assert_array_equal(labels, classifier.predict(frame))
    quantized, _ = PostTrainingAffineQuantization(8, graph).quantize_module(*data).forward(*data)
    assert np.mean(quantized == labels) >= 1 - 4 / 120
