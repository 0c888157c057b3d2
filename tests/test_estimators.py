"""Models of scikit-learn: as onnxruntime evaluates them, exact trees, and labels that the client computes.

The oracle is scikit-learn itself, or onnxruntime on what skl2onnx exports.
"""

from __future__ import annotations

import pickle
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import pytest
from jax.experimental import enable_x64
from models import as_tuple

import fheq
from fheq.client.outputs import split
from fheq.post_training import PostTrainingAffineQuantization

sklearn = pytest.importorskip("sklearn", reason='needs pip install "fheq[sklearn]"')
skl2onnx = pytest.importorskip("skl2onnx", reason='needs pip install "fheq[sklearn]"')

from sklearn import cluster, datasets, decomposition, ensemble, linear_model, naive_bayes, neural_network, svm, tree  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import QuantileTransformer, StandardScaler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning", "ignore::sklearn.exceptions.ConvergenceWarning")
X, NUMBERS = (np.asarray(v) for v in datasets.load_iris(return_X_y=True))
X = X.astype(np.float32)
NAMES = np.array(["setosa", "versicolor", "virginica"])[NUMBERS]

CLASSIFIERS: dict[str, Any] = {
    "logistic": make_pipeline(StandardScaler(), linear_model.LogisticRegression()),
    "linear svc": svm.LinearSVC(random_state=0),
    "svc": make_pipeline(StandardScaler(), svm.SVC(kernel="poly", degree=2)),
    "svc with probabilities": make_pipeline(StandardScaler(), svm.SVC(kernel="linear", probability=True, random_state=0)),
    "tree": tree.DecisionTreeClassifier(max_depth=3, random_state=0),
    "forest": make_pipeline(decomposition.PCA(3), ensemble.RandomForestClassifier(4, max_depth=3, random_state=0)),
    "boosting": ensemble.GradientBoostingClassifier(n_estimators=3, max_depth=2, random_state=0),
    "network": make_pipeline(StandardScaler(), neural_network.MLPClassifier((8,), max_iter=300, random_state=0)),
    "naive bayes": naive_bayes.GaussianNB(),
    "binarized": naive_bayes.BernoulliNB(binarize=1.5),
}
REGRESSORS: dict[str, Any] = {
    "ridge": linear_model.Ridge(),
    "svr": make_pipeline(StandardScaler(), svm.SVR(kernel="rbf", C=0.1, epsilon=0.5)),
    "extra trees": ensemble.ExtraTreesRegressor(3, max_depth=3, random_state=0),
    "stumps": ensemble.GradientBoostingRegressor(n_estimators=8, max_depth=1, random_state=0),
}


@cache
def fitted(name: str) -> Any:
    return CLASSIFIERS[name].fit(X, NAMES) if name in CLASSIFIERS else REGRESSORS[name].fit(X[:, :3], X[:, 3])


@cache
def exported(name: str) -> Any:
    """With ZipMap, as skl2onnx exports by default."""
    data = X if name in CLASSIFIERS else X[:, :3]
    return skl2onnx.to_onnx(fitted(name), data[:1], target_opset={"": 18, "ai.onnx.ml": 3})


@cache
def module(name: str, n_bits: int = 8) -> Any:
    data = X if name in CLASSIFIERS else X[:, :3]
    return PostTrainingAffineQuantization(n_bits, exported(name)).quantize_module(data)


def runtime(name: str, data: np.ndarray) -> list[np.ndarray]:
    """onnxruntime's outputs, the maps of ZipMap as columns."""
    outputs = onnxruntime.InferenceSession(exported(name).SerializeToString()).run(None, {"X": data})
    as_columns = lambda maps: np.array([list(row.values()) for row in maps], np.float32)
    return [as_columns(out) if isinstance(out, list) else out for out in outputs]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_give_the_labels_and_scores_of_onnxruntime(name: str) -> None:
    graph = fheq.import_onnx(exported(name))
    labels, scores = fheq.evaluate(graph, X)
    want_labels, want_scores = runtime(name, X)
    assert labels.dtype == object and set(labels) <= set(NAMES)
    np.testing.assert_array_equal(labels, want_labels)
    np.testing.assert_allclose(scores, want_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear svc", "tree", "forest", "network"])
def test_quantized_classifiers_keep_their_labels(name: str) -> None:
    """Of 150 flowers at 8 bits, 4 may change their class: those between two classes."""
    assert fheq.check(exported(name)) == []
    labels, scores = module(name).forward(X)
    assert labels.shape == (150,) and len(scores) == 150
    assert np.mean(labels == fitted(name).predict(X)) >= 1 - 4 / 150


def test_a_piecewise_linear_transform_takes_one_table_per_feature() -> None:
    """skl2onnx writes QuantileTransformer as a search among known numbers by computed indices. Between two of its quantiles,
    the steps of which are at least as far apart as those of 10 bits, the result moves by no more than its own step."""
    x = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    transformer = QuantileTransformer(n_quantiles=20).fit(x)
    graph = fheq.from_sklearn(transformer, x)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), 10))
    assert sum(int(np.prod(program.values[table.out].shape)) for table in program.lookups) == 3
    got = program.dequantize(fheq.simulate(program, *program.quantize(x)))[0]
    steepest = 1 / 19 / np.min(np.diff(transformer.quantiles_, axis=0))
    bound = steepest * np.max(program.inputs[0].affine.scale) / 2 + 1 / 2**10
    assert np.abs(got - transformer.transform(x)).max() < bound


@pytest.mark.parametrize("name", REGRESSORS)
def test_regressors(name: str) -> None:
    graph = fheq.import_onnx(exported(name))
    np.testing.assert_allclose(np.ravel(fheq.evaluate(graph, X[:, :3])), fitted(name).predict(X[:, :3]), atol=1e-4)
    got, want = module(name).forward(X[:, :3]).ravel(), fitted(name).predict(X[:, :3])
    assert 1 - np.sum((got - want) ** 2) / np.sum((want - want.mean()) ** 2) > 0.99


@pytest.mark.parametrize("n_bits", [2, 4, 6])
def test_trees_decide_exactly_as_on_dequantized_features(n_bits: int) -> None:
    """Whatever the bits, and far from the calibration data; a pure leaf's value is exact too, so nothing differs."""
    model = tree.DecisionTreeClassifier(random_state=0).fit(X, NAMES)
    bits = {"op_inputs": n_bits, "op_weights": n_bits, "model_inputs": n_bits, "model_outputs": n_bits}
    found = PostTrainingAffineQuantization(bits, fheq.from_sklearn(model, X)).quantize_module(X[:60])
    (entry,) = found.program.inputs
    q = np.random.default_rng(n_bits).integers(0, 2**n_bits, (500, 4))
    q = np.minimum(q, np.broadcast_to(entry.affine.qmax, q.shape).astype(int))
    labels, probabilities = found.dequantize_output(*as_tuple(found.quantized_forward(q)))
    real = entry.affine.dequantize(q)
    np.testing.assert_array_equal(labels, model.classes_[np.argmax(_float64_tree(model, real), axis=1)])
    np.testing.assert_allclose(probabilities, _float64_tree(model, real), atol=1e-6)


def _float64_tree(model: Any, x: np.ndarray) -> np.ndarray:
    """The tree walked in float64; scikit-learn rounds features to float32 first, which may cross a threshold."""
    t, at = model.tree_, np.zeros(len(x), int)
    while np.any(t.feature[at] >= 0):
        inner = t.feature[at] >= 0
        below = x[np.arange(len(x)), np.maximum(t.feature[at], 0)] <= t.threshold[at]
        at = np.where(inner, np.where(below, t.children_left[at], t.children_right[at]), at)
    return t.value[at][:, 0]


def test_forests_sum_their_quantized_leaves_exactly() -> None:
    """Every tree of a forest reaches the leaf that it reaches on the dequantized features, unseen ones included."""
    model = ensemble.RandomForestRegressor(5, max_depth=4, random_state=0).fit(X[:, :3], X[:, 3])
    found = PostTrainingAffineQuantization(
        {"op_inputs": 3, "op_weights": 14, "model_inputs": 3}, fheq.from_sklearn(model, X[:, :3])
    )
    found = found.quantize_module(X[:50, :3])
    (entry,) = found.program.inputs
    q = np.stack(np.meshgrid(*[np.arange(int(top) + 1) for top in entry.affine.qmax]), -1).reshape(-1, 3)
    got = found.dequantize_output(found.quantized_forward(q)).ravel()
    real = entry.affine.dequantize(q)
    want = np.mean([_float64_tree(t, real).ravel() for t in model.estimators_], axis=0)
    bound = 5 * 16 * np.ptp(X[:, 3]) / 5 / 2**14  # half a step of 14 bits for each leaf that differs from the one left out
    np.testing.assert_allclose(got, want, atol=bound)


def test_rounding_leaves_decisions_exact() -> None:
    found = PostTrainingAffineQuantization(8, exported("tree"), 2).quantize_module(X)
    np.testing.assert_array_equal(found.forward(X)[0], module("tree").forward(X)[0])


@pytest.mark.parametrize("name", ["ridge", "extra trees"])
def test_a_model_of_ai_onnx_ml_alone_need_not_say_an_opset_of_ai_onnx(name: str) -> None:
    """onnxmltools says none."""
    proto = type(exported(name)).FromString(exported(name).SerializeToString())
    assert {node.domain for node in proto.graph.node} == {"ai.onnx.ml"}
    imports = [entry for entry in proto.opset_import if entry.domain]
    del proto.opset_import[:]
    proto.opset_import.extend(imports)
    assert fheq.check(proto) == []
    np.testing.assert_allclose(fheq.evaluate(fheq.import_onnx(proto), X[:, :3]), runtime(name, X[:, :3])[0], rtol=1e-5)


# What the client computes


def test_the_end_of_a_classifier_costs_no_tables() -> None:
    """Scores of a linear model are decrypted; softmax and labels are the client's."""
    program = module("logistic").program
    assert len(program.lookups) == 0
    assert [port.name for port in program.results] == ["output_label", "output_probability"]
    assert [entry.shape for entry in program.outputs] == [(3,)]


@pytest.mark.parametrize("name", ["network", "forest"])
def test_all_ways_to_the_outputs_agree(name: str) -> None:
    found = module(name)
    labels, scores = found.forward(X)
    program = found.program
    q = as_tuple(fheq.simulate(program, *program.quantize(X)))
    again = pickle.loads(pickle.dumps(program)).dequantize(*q)
    np.testing.assert_array_equal(labels, again[0])
    np.testing.assert_array_equal(scores, again[1])
    with enable_x64():  # as lowering computes: in single precision leaf values that lie between two steps may go either way
        numbers, faked = map(np.asarray, fheq.fake_quant(found.graph, found.qparams, X))
    np.testing.assert_allclose(faked, scores, atol=1e-5)
    label = found.graph.outputs[0]
    assert np.mean(np.asarray(label.labels, object)[numbers] == labels) > 0.99


def test_weights_stay_with_the_server() -> None:
    for name in (*CLASSIFIERS, *REGRESSORS):
        graph = fheq.import_onnx(exported(name))
        server, client = split(graph)
        known = (
            []
            if client is None
            else [client.constants[n] for node in client.nodes for n in node.inputs if n in client.constants]
        )
        assert all(value.ndim < 2 or value.dtype.kind in "iu" or value.size <= 6 for value in known), name
        assert server.nodes or name == "ridge"


def test_a_model_without_labels_is_as_before() -> None:
    graph = fheq.import_onnx(exported("ridge"))
    assert split(graph) == (graph, None)


def test_clusters() -> None:
    model = make_pipeline(StandardScaler(), cluster.KMeans(3, n_init=1, random_state=0)).fit(X)
    found = PostTrainingAffineQuantization(8, fheq.from_sklearn(model, X)).quantize_module(X)
    labels, distances = found.forward(X)
    assert labels.dtype == np.int64 and np.mean(labels == model.predict(X)) > 0.97
    want = model.transform(X)
    assert 1 - np.sum((distances - want) ** 2) / np.sum((want - want.mean()) ** 2) > 0.99


def test_the_circuit_gives_labels() -> None:
    """In the clear evaluation of the compiled circuit; encrypted runs are in test_encrypted.py."""
    found = module("tree")
    circuit = fheq.compile(found.program)
    for got, want in zip(circuit.evaluate(X[::15]), found.forward(X[::15]), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["tree", "boosting", "network", "svc with probabilities", "binarized"])
def test_an_exported_estimator_decides_and_comes_back_as_the_quantized_one(name: str) -> None:
    """Thresholds lie on the edges of quantizers whose zero points are fractional, labels come of ai.onnx.ml."""
    graph = fheq.import_onnx(exported(name))
    qparams = fheq.fit(graph, fheq.calibrate(graph, X), 8)
    proto = fheq.export_qdq(graph, qparams)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    rows = [session.run(None, {session.get_inputs()[0].name: row[None]}) for row in X[::10]]
    for got, want in zip(zip(*rows), as_tuple(fheq.fake_quant(graph, qparams, X[::10])), strict=True):
        np.testing.assert_allclose(np.concatenate(got), want, atol=1e-4)
    again = fheq.import_onnx(proto)
    programs = [fheq.lower(graph, qparams), fheq.lower(again, fheq.fit(again, fheq.calibrate(again, X[:5]), 3))]
    results = [p.dequantize(*as_tuple(fheq.simulate(p, *p.quantize(X)))) for p in programs]
    names = [port.labels for port in programs[0].results]
    for a, b, labels in zip(*results, names, strict=True):
        if labels is None:
            np.testing.assert_allclose(a, b, atol=1e-6)
