"""Missing values: the client puts in what the model would, and what cannot be encrypted is refused with a remedy."""

from __future__ import annotations

import numpy as np
import pytest
from build_models import model, node
from onnxruntime_models import session

import fheq
from fheq.errors import DataError, UnsupportedError
from fheq.planning.plan import plan
from fheq.post_training import PostTrainingAffineQuantization

impute = pytest.importorskip("sklearn.impute", reason='needs pip install "fheq[sklearn]"')
pytest.importorskip("skl2onnx", reason='needs pip install "fheq[sklearn]"')
from sklearn.compose import ColumnTransformer  # noqa: E402
from sklearn.linear_model import Ridge  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
RNG = np.random.default_rng(0)
WHOLE = RNG.normal(size=(120, 3)).astype(np.float32)
HOLES = np.where(RNG.random(WHOLE.shape) < 0.1, np.nan, WHOLE).astype(np.float32)
SCALED = ("a", make_pipeline(impute.SimpleImputer(strategy="median"), StandardScaler()), [0, 2])


@pytest.mark.parametrize(
    "first",
    [impute.SimpleImputer(), ColumnTransformer([SCALED, ("b", impute.SimpleImputer(), [1])])],
    ids=["all features", "by column"],
)
def test_imputed_features_are_encrypted_as_scikit_learn_imputes_them(first) -> None:
    regressor = make_pipeline(first, Ridge()).fit(HOLES, WHOLE.sum(axis=1))
    graph = fheq.from_sklearn(regressor, HOLES)
    assert not plan(graph).points  # no table: nothing of it is left to the server
    found = PostTrainingAffineQuantization(10, graph).quantize_module(HOLES)
    np.testing.assert_allclose(np.ravel(fheq.evaluate(graph, HOLES)), regressor.predict(HOLES), atol=1e-4)
    want = regressor.predict(HOLES)
    assert np.max(np.abs(found.forward(HOLES).ravel() - want)) < 0.05 * np.std(want)
    np.testing.assert_array_equal(found.program.quantize(HOLES)[0], found.quantize_input(HOLES))
    got = np.ravel(fheq.fake_quant(graph, found.qparams, HOLES))
    np.testing.assert_allclose(got, found.forward(HOLES).ravel(), atol=1e-4)
    exported = fheq.export_qdq(graph, found.qparams)
    (ran,) = session(exported).run(None, {graph.inputs[0].name: HOLES})
    np.testing.assert_allclose(np.ravel(ran), got, atol=1e-4)
    assert [port.missing for port in fheq.import_onnx(exported).inputs] == [port.missing for port in graph.inputs]


def test_what_is_read_as_it_is_may_not_be_missing() -> None:
    """The first feature is imputed alone, the second read beside that, the third not imputed."""
    fills = {"imputed_value_floats": [1.0, 2.0], "replaced_value_float": float("nan")}
    nodes = [
        node("Gather", ["x", "two"], ["g"], axis=1),
        node("Imputer", ["g"], ["i"], domain="ai.onnx.ml", **fills),
        node("Gather", ["x", "last"], ["l"], axis=1),
        node("Concat", ["i", "l"], ["c"], axis=1),
        node("MatMul", ["c", "w"], ["y"]),
    ]
    known = {"two": np.array([0, 1]), "last": np.array([1, 2]), "w": np.ones((4, 1), np.float32)}
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 3]}, ["y"], known, domains={"ai.onnx.ml": 1}))
    assert graph.inputs[0].missing == (1.0, None, None)
    fheq.calibrate(graph, np.where([True, False, False], np.nan, WHOLE).astype(np.float32))
    with pytest.raises(DataError, match=r"'x' contains NaN.*cannot be encrypted.*impute"):
        fheq.calibrate(graph, HOLES)


def test_neighbours_impute_before_encryption() -> None:
    regressor = make_pipeline(impute.KNNImputer(), Ridge()).fit(HOLES, WHOLE.sum(axis=1))
    with pytest.raises(UnsupportedError, match=r"KNNImputer.*before encryption"):
        fheq.from_sklearn(regressor, HOLES)
