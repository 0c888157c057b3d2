"""Every kind of estimator that skl2onnx exports, as scikit-learn predicts; benchmarks/ESTIMATORS.md lists them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import fheq
from fheq.errors import UnsupportedError
from fheq.post_training import PostTrainingAffineQuantization
from fheq.rewrites import decompose

cases = pytest.importorskip("benchmarks.estimator_cases", reason='needs pip install "fheq[sklearn]"')
pytest.importorskip("skl2onnx", reason='needs pip install "fheq[sklearn]"')

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning", "ignore::UserWarning", "ignore::FutureWarning")
TABLE = {case.name: case for case in cases.table()}
QUICK = (
    *("LinearSVC after PCA", "SVC, sigmoid", "AdaBoostClassifier", "BaggingClassifier", "VotingClassifier, soft"),
    *("CalibratedClassifierCV", "BernoulliNB", "ComplementNB", "QuadraticDiscriminantAnalysis", "KNeighborsClassifier"),
    *("KNeighborsClassifier, cosine", "ColumnTransformer", "Normalizer", "PowerTransformer", "GaussianMixture, diagonal"),
    *("IsolationForest", "OneClassSVM", "MultiOutputClassifier", "KernelPCA", "OneHotEncoder", "OrdinalEncoder"),
    *("RANSACRegressor", "PoissonRegressor", "AdaBoostRegressor", "PLSRegression", "GaussianProcessRegressor"),
    *("RandomForestRegressor, two targets", "OneVsOneClassifier"),
)
QUANTIZED = ("LinearSVC after PCA", "KNeighborsClassifier", "IsolationForest", "MultiOutputClassifier", "BernoulliNB")
EXACT = ("OneHotEncoder", "OrdinalEncoder")
TIED = ("OrdinalEncoder before a tree",)  # flowers in a leaf with as many of one class as of another


@pytest.mark.parametrize("name", QUICK)
def test_as_scikit_learn_predicts(name: str) -> None:
    found = cases.in_float(TABLE[name])
    assert found.labels in (None, 1.0)
    assert (found.error or 0) < 1e-4  # float32 against float64


@pytest.mark.skipif(not os.environ.get("SLOW_TESTS"), reason="takes minutes; set SLOW_TESTS=1")
@pytest.mark.parametrize("name", [name for name in TABLE if name not in QUICK])
def test_the_others_too(name: str) -> None:
    try:
        cases.imported(TABLE[name])
    except UnsupportedError as error:
        if "protobuf 7" not in str(error):
            raise
        pytest.skip(str(error))
    test_as_scikit_learn_predicts(name)


@pytest.mark.parametrize("name", TIED)
def test_equal_probabilities_give_the_label_that_they_give_in_the_model(name: str) -> None:
    assert cases.quantized(TABLE[name]).labels == 1


@pytest.mark.parametrize("name", QUANTIZED)
def test_labels_at_8_bits(name: str) -> None:
    """Of 150 flowers 4 may change their class, as in the other tests of estimators."""
    found = cases.quantized(TABLE[name])
    assert found.labels is not None and found.labels >= 1 - 4 / 150


@pytest.mark.parametrize("name", EXACT)
def test_categories_are_exact(name: str) -> None:
    assert cases.quantized(TABLE[name]).error == 0


def test_the_page_lists_every_case() -> None:
    lines = cases.PAGE.read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")][1:] == list(TABLE)


def test_what_the_exporter_refuses_is_one_line() -> None:
    from sklearn.dummy import DummyClassifier

    with pytest.raises(UnsupportedError, match="skl2onnx cannot export DummyClassifier") as caught:
        fheq.from_sklearn(DummyClassifier().fit([[0.0], [1.0]], [0, 1]), np.zeros((1, 1), np.float32))
    assert len(str(caught.value).splitlines()) == 1


def test_categories_that_come_as_floats_keep_their_numbers() -> None:
    """In the steps of 8 bits 3 is 2.99, say, which is meant to be category 3."""
    from sklearn.preprocessing import OrdinalEncoder

    x = np.random.default_rng(0).choice([0.0, 1.0, 2.5, 7.0], (60, 3)).astype(np.float32)
    encoder = OrdinalEncoder().fit(x)
    module = _quantized(encoder, x)
    np.testing.assert_allclose(np.round(module.forward(x)), encoder.transform(x))


def _quantized(estimator: Any, x: np.ndarray) -> Any:
    return PostTrainingAffineQuantization(8, fheq.from_sklearn(estimator, x)).quantize_module(x)


# Operators that these models are made of


@pytest.mark.parametrize("known", [True, False], ids=["known points", "two inputs"])
@pytest.mark.parametrize(
    ("metric", "name"),
    [("manhattan", "cityblock"), *((n, n) for n in ("euclidean", "sqeuclidean", "cosine", "chebyshev", "minkowski"))],
)
def test_distances_are_those_of_scipy(metric: str, name: str, known: bool) -> None:
    from scipy.spatial.distance import cdist

    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(1, 4)).astype(np.float32), rng.normal(size=(6, 4)).astype(np.float32)
    attributes: dict[str, Any] = {"p": 3.0} if metric == "minkowski" else {}
    inputs = [helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, 4])]
    inputs += [] if known else [helper.make_tensor_value_info("b", TensorProto.FLOAT, [6, 4])]
    values = [numpy_helper.from_array(b, "b")] if known else []
    made = helper.make_node("CDist", ["a", "b"], ["y"], domain="com.microsoft", metric=metric, **attributes)
    graph = helper.make_graph([made], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6])], values)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    imported = fheq.import_onnx(helper.make_model(graph, opset_imports=opsets))
    want = cdist(a.astype(float), b.astype(float), name, **attributes)
    for found in (imported, decompose(imported)):
        np.testing.assert_allclose(fheq.evaluate(found, *([a] if known else [a, b])), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "count", "largest"), [(9, 1, 1), (20, 2, 1), (25, 3, 0), (6, 4, 0)])
def test_places_of_the_largest_in_simple_operators(size: int, count: int, largest: int) -> None:
    """Of equal values the first comes first, as onnxruntime has it; long axes take another form than short ones."""
    made = helper.make_node("TopK", ["x", "k"], ["v", "y"], axis=-1, largest=largest)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [made],
        "g",
        [info("x", TensorProto.FLOAT, ["N", size])],
        [info("y", TensorProto.INT64, ["N", count])],
        [numpy_helper.from_array(np.array([count]), "k")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    x = np.random.default_rng(2).integers(0, 6, (100, size)).astype(np.float32)
    (want,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})
    simple = decompose(fheq.import_onnx(proto))
    assert not any(node.op == "TopK" for node in simple.nodes)
    np.testing.assert_array_equal(fheq.evaluate(simple, x), want)
