"""Models of frameworks as graphs, against the frameworks' own predictions."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

import fheq
from fheq.errors import DataError, ModelError, UnsupportedError
from fheq.frameworks import MissingExtraError

X = np.random.default_rng(0).normal(size=(20, 5))


def test_sklearn() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    pytest.importorskip("skl2onnx")
    y = np.where(X[:, 0] > 0, "up", "down")
    model = sklearn.LogisticRegression().fit(X, y)
    graph = fheq.from_sklearn(model, X)
    label, probabilities = fheq.evaluate(graph, X.astype(np.float32))
    np.testing.assert_array_equal(label, model.predict(X))
    np.testing.assert_allclose(probabilities, model.predict_proba(X), atol=1e-5)
    assert graph.inputs[0].type.shape == (1, 5) and graph.inputs[0].batch_axis == 0


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    layers = [torch.nn.Conv1d(1, 3, 2), torch.nn.BatchNorm1d(3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Dropout()]
    module = torch.nn.Sequential(*layers, torch.nn.Linear(12, 2))
    x = X[:, None, :].astype(np.float32)
    graph = fheq.from_torch(module, x)
    assert module.training
    with torch.no_grad():
        want = module.eval()(torch.as_tensor(x)).numpy()
    np.testing.assert_allclose(fheq.evaluate(graph, x), want, atol=1e-5)


def test_torch_by_its_second_exporter() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    module = torch.nn.ChannelShuffle(2)  # which its first one has no form for
    x = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(np.float32)
    graph = fheq.from_torch(module, x)
    np.testing.assert_array_equal(fheq.evaluate(graph, x), module(torch.as_tensor(x)).numpy())


def test_torch_with_two_inputs() -> None:
    torch = pytest.importorskip("torch")

    class Scaled(torch.nn.Module):
        def forward(self, a, b):
            return a * torch.sigmoid(b)

    graph = fheq.from_torch(Scaled(), torch.as_tensor(X), X)
    assert [port.type.shape for port in graph.inputs] == [(1, 5), (1, 5)]
    x = X.astype(np.float32)
    np.testing.assert_allclose(fheq.evaluate(graph, x, x), x / (1 + np.exp(-x)), atol=1e-5)


def test_arguments_that_torch_does_not_use_are_named() -> None:
    torch = pytest.importorskip("torch")

    class First(torch.nn.Module):
        def forward(self, a, b):
            return torch.relu(a)

    with pytest.warns(UserWarning, match=r"does not use its arguments \[1\]"):
        graph = fheq.from_torch(First(), X, X)
    assert len(graph.inputs) == 1


@pytest.mark.parametrize("name", ["modified huber", "matern", "votes", "weighed votes"])
def test_exports_compute_what_the_estimator_does_or_are_refused(name: str) -> None:
    pytest.importorskip("skl2onnx")
    from sklearn import ensemble, gaussian_process, linear_model, naive_bayes

    y = np.digitize(X[:, 0] + X[:, 1], [-1, 0, 1])
    parts = [("a", linear_model.LogisticRegression()), ("b", naive_bayes.GaussianNB())]
    model = {
        "modified huber": linear_model.SGDClassifier(loss="modified_huber", random_state=0),
        "matern": gaussian_process.GaussianProcessRegressor(gaussian_process.kernels.Matern(nu=1.5), optimizer=None),
        "votes": ensemble.VotingClassifier(parts, voting="soft"),
        "weighed votes": ensemble.VotingClassifier(parts, voting="soft", weights=[1, 2]),
    }[name].fit(X, y)
    if name == "modified huber":
        with pytest.raises(ModelError, match=r"export of SGDClassifier does not compute.*'output_label'"):
            fheq.from_sklearn(model, X)
        return
    found = fheq.evaluate(fheq.from_sklearn(model, X), X.astype(np.float32))
    np.testing.assert_allclose(np.ravel(found[0] if name != "matern" else found), model.predict(X), atol=1e-4)


KERAS = """
import keras, numpy as np, fheq
keras.utils.set_random_seed(0)
layers = keras.layers
images = keras.Sequential([layers.Input((6, 6, 1)), layers.Conv2D(3, 3, activation="relu", padding="same"),
    layers.BatchNormalization(), layers.MaxPooling2D(2), layers.Flatten(), layers.Dropout(0.5), layers.Dense(3, "softmax")])
series = layers.Input((4, 3))
attended = layers.GlobalAveragePooling1D()(layers.MultiHeadAttention(2, 2)(series, series))
states = layers.Concatenate()([layers.LSTM(3)(series), attended])
sequences = keras.Model(series, layers.LayerNormalization()(layers.Dense(2)(states)))
for model in (images, sequences):
    x = np.random.default_rng(0).normal(size=(9, *model.input_shape[1:])).astype(np.float32)
    graph = fheq.from_keras(model, x)
    assert np.abs(fheq.evaluate(graph, x) - np.asarray(model(x, training=False))).max() < 1e-5
print(sorted({node.op for node in graph.nodes} & {"Softmax", "Sigmoid"}))
"""


@pytest.mark.parametrize(("backend", "printed"), [("jax", "['Sigmoid', 'Softmax']"), ("torch", "KERAS_BACKEND=jax")])
def test_keras(backend: str, printed: str) -> None:
    """In a process of its own: Keras takes its backend when it is imported."""
    if importlib.util.find_spec("keras") is None:
        pytest.skip("Keras is not installed")
    env = os.environ | {"KERAS_BACKEND": backend}
    done = subprocess.run([sys.executable, "-c", KERAS], capture_output=True, text=True, env=env)
    assert done.returncode == (0 if backend == "jax" else 1), done.stderr
    assert printed in done.stdout + done.stderr


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, extra, call in (
        ("skl2onnx", "sklearn", lambda: fheq.from_sklearn(None, X)),
        ("torch", "torch", lambda: fheq.from_torch(None, X)),
        ("keras", "keras", lambda: fheq.from_keras(None, X)),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtraError, match=rf'pip install "fheq\[{extra}\]"'):
            call()


def test_what_cannot_be_exported_is_refused() -> None:
    pytest.importorskip("skl2onnx")
    with pytest.raises(UnsupportedError, match="skl2onnx cannot export object"):
        fheq.from_sklearn(object(), X)
    with pytest.raises(DataError, match="rows of features"):
        fheq.from_sklearn(object(), X[0])
    pytest.importorskip("torch")
    with pytest.raises(DataError, match="example inputs"):
        fheq.from_torch(object())


def test_no_framework_is_imported_unasked() -> None:
    code = "import sys, fheq; print([m for m in ('keras', 'sklearn', 'skl2onnx', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
