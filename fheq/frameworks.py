"""Models of other frameworks as graphs: each is exported to ONNX in memory and read by `import_onnx`.

Each needs a package that `pip install "fheq[sklearn]"`, `"fheq[torch]"` or `"fheq[keras]"` installs. JAX functions need no
exporter (see `fheq.jaxpr`), and nor do models of Keras, which run on JAX: Keras' own export to ONNX needs TensorFlow or
releases of jax2onnx that do not go with jax 0.7.1.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fheq.batching import example_arrays
from fheq.errors import DataError, FheqError, UnsupportedError
from fheq.jaxpr import from_jax
from fheq.sklearn_exports import exportable, verify

if TYPE_CHECKING:
    from onnx import ModelProto

    from fheq.graph import Graph

OPSET = 18
DISTANCES = {
    "decomposition": ("KernelPCA",),
    "neighbors": (
        *("KNeighborsClassifier", "KNeighborsRegressor", "KNeighborsTransformer", "LocalOutlierFactor", "NearestNeighbors"),
        *("RadiusNeighborsClassifier", "RadiusNeighborsRegressor"),
    ),
}
"""Estimators of scikit-learn that skl2onnx exports with loops unless told otherwise. Not Gaussian processes, whose loops are
read as distances: told otherwise it gives Matern kernels squared ones."""
PLAIN = (("svm", "LinearSVC"), ("feature_selection", "RFE"), ("feature_selection", "RFECV"))
"""Classifiers for which skl2onnx has no option `zipmap`, though it gives it to every classifier in a pipeline."""


class MissingExtraError(FheqError, ImportError):
    """A package is missing that an extra of fheq installs."""


def from_sklearn(estimator: Any, example: Any) -> Graph:
    """A fitted scikit-learn estimator or pipeline, through skl2onnx.

    Args:
        estimator: fitted; what skl2onnx converts.
        example: rows that it was fitted on, shape (N, features); one will do. float64 is exported as float32. A DataFrame
            whose columns a ColumnTransformer names, or that has columns of strings, makes an input `(N, 1)` of each.

    Returns:
        The graph: of a classifier with the outputs label `(N,)` and probabilities `(N, classes)` (decision scores where the
        estimator has no probabilities). Inputs are one array, or one per column: `frame[[name]].to_numpy()`.

    Raises:
        MissingExtraError: skl2onnx is not installed.
        UnsupportedError: skl2onnx does not convert the estimator.
        ModelError: what it exports is not what the estimator computes, as the example's rows show where it has two or more.
        DataError: the example is no rows of features.
    """
    skl2onnx = _extra("skl2onnx", "sklearn")
    if any(type(part).__name__ == "KNNImputer" for part in _parts(estimator)):
        raise UnsupportedError(
            "KNNImputer finds missing values by which others are there, and NaN cannot be encrypted: impute by its "
            "transform before encryption, and give from_sklearn the steps after it (SimpleImputer may stay)"
        )
    opsets = {"": OPSET, "ai.onnx.ml": 3, "com.microsoft": 1}
    if _in_columns(estimator, example):
        rows, inputs = example, [example[[name]].to_numpy() for name in example.columns]
        given: dict[str, Any] = {"initial_types": [(str(name), _column_type(x)) for name, x in zip(example.columns, inputs)]}
    else:
        (row,) = inputs = example_arrays([example])
        if row.ndim != 2:
            raise DataError(f"example has shape {row.shape}; give rows of features, (N, features)")
        rows, given = row.astype(np.asarray(example).dtype), {"X": row[:1]}
    convert = lambda: skl2onnx.to_onnx(exportable(estimator), target_opset=opsets, options=_options(), **given)
    graph = _read(_exported("skl2onnx", estimator, convert))
    verify(graph, estimator, rows, inputs)
    return graph


def _parts(estimator: Any) -> list[Any]:
    """An estimator and those inside it, among its other parameters."""
    return [estimator, *(estimator.get_params() if hasattr(estimator, "get_params") else {}).values()]


def _in_columns(estimator: Any, example: Any) -> bool:
    """Whether the columns of a DataFrame are to be inputs of their own."""
    if not hasattr(example, "columns"):
        return False
    chosen = [columns for part in _parts(estimator) for _, _, columns in getattr(part, "transformers", ())]
    named = any(isinstance(c, str) or (np.size(c) and isinstance(np.ravel(c)[0], str)) for c in chosen)
    return named or any(np.asarray(example[name]).dtype.kind not in "biuf" for name in example.columns)


def _column_type(values: np.ndarray) -> Any:
    """skl2onnx's type of a column."""
    types = importlib.import_module("skl2onnx.common.data_types")
    kinds = {"b": "BooleanTensorType", "i": "Int64TensorType", "u": "Int64TensorType", "f": "FloatTensorType"}
    return getattr(types, kinds.get(values.dtype.kind, "StringTensorType"))([None, 1])


def _options() -> dict[type, dict[str, str]]:
    """skl2onnx's options: estimators say their distances with one node where a loop over known points is due, and steps of
    pipelines are not given an option that they do not have."""
    named = [(module, kind) for module, kinds in DISTANCES.items() for kind in kinds]
    of = lambda module, kind: getattr(importlib.import_module(f"sklearn.{module}"), kind)
    return {**{of(module, kind): {"optim": "cdist"} for module, kind in named}, **{of(*kind): {} for kind in PLAIN}}


def from_torch(module: Any, *example: Any) -> Graph:
    """A PyTorch module in evaluation mode, through torch's own exporter: by its trace, or where that is refused, and
    onnxscript is installed, by `torch.export`.

    Args:
        module: a `torch.nn.Module`; it is left in the mode it was in.
        example: one array or tensor per argument of `forward`, samples along axis 0.

    Raises:
        MissingExtraError: torch is not installed.
        UnsupportedError: torch does not export the module.
    """
    torch = _extra("torch", "torch")
    rows = [np.repeat(x[:1], 2, axis=0) for x in example_arrays(example)]
    inputs = tuple(torch.as_tensor(x) for x in rows)
    names = [f"x{i}" for i in range(len(inputs))]
    axes = {name: {0: "samples"} for name in names}

    def call(dynamo: bool) -> bytes:
        file = io.BytesIO()
        training = module.training
        module.eval()
        try:
            options = {"opset_version": OPSET, "input_names": names, "dynamic_axes": axes}
            made = torch.onnx.export(module, inputs, None if dynamo else file, dynamo=dynamo, verbose=False, **options)
        finally:
            module.train(training)
        return made.model_proto.SerializeToString() if dynamo else file.getvalue()

    try:
        exported = _exported("torch.onnx", module, lambda: call(dynamo=False))
    except UnsupportedError as refused:
        if importlib.util.find_spec("onnxscript") is None:
            raise
        try:
            exported = _exported("torch.onnx", module, lambda: call(dynamo=True))
        except UnsupportedError:
            raise refused from None
    graph = _read(exported)
    unused = [i for i, name in enumerate(names) if name not in {port.name for port in graph.inputs}]
    if unused:
        warnings.warn(f"the module does not use its arguments {unused}, counted from 0: the graph lacks them", stacklevel=2)
    return graph


def from_keras(model: Any, *example: Any) -> Graph:
    """A Keras model in inference, as `fheq.from_jax` reads what it computes on JAX.

    Args:
        model: a `keras.Model`, built, under Keras' JAX backend. One that was saved elsewhere is loaded with it:
            `KERAS_BACKEND=jax`, set before Keras is imported, and `keras.saving.load_model`.
        example: one array per input, samples along axis 0. A model of several inputs is given them as a list, as Keras does.

    Raises:
        MissingExtraError: Keras is not installed.
        UnsupportedError: Keras runs on another backend, or the model uses a primitive of JAX that has no form here.
    """
    keras = _extra("keras", "keras")
    backend = keras.backend.backend()
    if backend != "jax":
        raise UnsupportedError(
            f"Keras runs on {backend}: set the environment variable KERAS_BACKEND=jax before Keras is imported, and load "
            "the model with keras.saving.load_model"
        )
    return from_jax(lambda *x: model(x[0] if len(x) == 1 else list(x), training=False), *example)


def _extra(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(f'{package} is not installed: pip install "fheq[{extra}]"') from error


def _exported(exporter: str, model: Any, call: Callable[[], Any]) -> Any:
    """What an exporter gives, its refusals as one error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return call()
    except Exception as error:
        origin = error.__cause__ or error
        cause = (str(origin) or type(origin).__name__).strip().splitlines()[0]
        if "Expected an int, got a boolean" in cause:
            cause += ' protobuf 7 refuses it; export with pip install "protobuf<7"'
        name = getattr(model, "__name__", type(model).__name__)
        remedy = "use another in its place, or export the parts before and after it and compute it in the clear"
        raise UnsupportedError(f"{exporter} cannot export {name}: {cause.rstrip('.')}; {remedy}") from error


def _read(model: ModelProto | bytes) -> Graph:
    from fheq.onnx import import_onnx

    return import_onnx(model)
