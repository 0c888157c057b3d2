"""Estimators in forms that skl2onnx takes, and its exports compared with them: some converters write another function."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fheq.errors import FheqError, ModelError
from fheq.evaluate import as_tuple, evaluate
from fheq.graph import Graph

ROWS = 200
ERROR = 0.1  # in standard deviations: float32 where large terms cancel, as in LocalOutlierFactor; wrong exports are far off
TIE = 1e-4  # of the largest score
NUDGE = 1e-6  # of a feature's largest value: what float32 may put on the other side of an edge
SCORES = ("decision_function", "predict_proba")
"""Methods that give a classifier's second output; of others it may be their transform or score_samples as well."""

Outputs = Mapping[str, list[np.ndarray]]


def exportable(estimator: Any) -> Any:
    """The estimator, or where votes are in it a copy: skl2onnx takes weights that are arrays, and transforms that are not
    flattened, on which predictions do not depend."""
    ensemble = importlib.import_module("sklearn.ensemble")
    votes = (ensemble.VotingClassifier, ensemble.VotingRegressor)
    if not any(isinstance(part, votes) for part in _inside(estimator)):
        return estimator
    estimator = copy.deepcopy(estimator)
    for part in _inside(estimator):
        if isinstance(part, votes) and part.weights is not None:
            part.weights = np.asarray(part.weights)
        if isinstance(part, ensemble.VotingClassifier):
            part.flatten_transform = False
    return estimator


def _inside(value: Any) -> Iterator[Any]:
    """An estimator and those that it holds, fitted ones and parameters."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _inside(item)
    elif hasattr(value, "get_params") and not isinstance(value, type):
        yield value
        yield from _inside(list(vars(value).values()))


def verify(graph: Graph, estimator: Any, rows: Any, inputs: list[np.ndarray]) -> None:
    """Compares what a graph computes with what the estimator does, on as many as 200 rows; on two at least.

    Args:
        rows: an array or DataFrame, as the estimator takes it.
        inputs: the same rows, as the graph takes them.

    Raises:
        ModelError: labels differ whose scores are no tie, or values differ by more than the errors of float32.
    """
    kept = np.flatnonzero(_known(graph, inputs))
    if len(kept) < 2:
        return
    kept = kept[np.unique(np.linspace(0, len(kept) - 1, ROWS).astype(int))]
    rows, inputs = rows.iloc[kept] if hasattr(rows, "iloc") else rows[kept], [x[kept] for x in inputs]
    own = _own(estimator, rows)
    try:
        outputs = as_tuple(evaluate(graph, *inputs)) if own else ()
    except FheqError:  # of data, as a category that is unknown
        return
    classes = getattr(estimator, "classes_", None)
    for i, (port, found) in enumerate(zip(graph.outputs, outputs)):
        differ = _differing(i, np.asarray(found), own, classes)
        if np.any(differ):
            differ &= ~_on_edges(estimator, rows, own)
        if np.any(differ):
            raise ModelError(
                f"skl2onnx's export of {type(estimator).__name__} does not compute what the estimator does: output "
                f"{port.name!r} differs in {np.count_nonzero(differ)} of {len(kept)} rows, first in row "
                f"{kept[np.argmax(differ)]} of the example; use another estimator, or export a part that agrees"
            )


def _known(graph: Graph, inputs: list[np.ndarray]) -> np.ndarray:
    """Rows without NaN, but where it is imputed."""
    known = np.ones(len(inputs[0]), bool)
    for port, x in zip(graph.inputs, inputs):
        if port.missing is None and x.dtype.kind == "f":
            known &= ~np.any(np.isnan(x), axis=1)
    return known


def _own(estimator: Any, rows: Any) -> Outputs:
    """What the methods of an estimator give; not those that it lacks or that refuse the rows."""
    names = ["predict", *SCORES, *(() if hasattr(estimator, "classes_") else ("transform", "score_samples"))]
    found = {}
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                given = getattr(estimator, name)(rows)
        except Exception:  # whatever an estimator raises
            continue
        parts = given if isinstance(given, list) else [given]
        found[name] = [np.asarray(part.toarray() if hasattr(part, "toarray") else part) for part in parts]
    return found


def _differing(i: int, found: np.ndarray, own: Outputs, classes: Any) -> np.ndarray:
    """The rows in which output `i` is none of those that it may be; none where it cannot be compared."""
    if i == 0 and "predict" in own:
        return _labels_differ(found, own, classes) if _gives_labels(own, classes) else _apart(found, own["predict"][0])
    differ = [
        _apart(a, b) for name, parts in own.items() if name != "predict" for part in parts for a, b in _pairs(found, part)
    ]
    return min(differ, key=np.count_nonzero, default=np.zeros(1, bool))


def _gives_labels(own: Outputs, classes: Any) -> bool:
    return classes is not None or own["predict"][0].dtype.kind != "f"


def _pairs(found: np.ndarray, want: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Values of the same size; where scikit-learn gives one score, exports give one of each class."""
    if found.size == want.size:
        yield found, want
    elif want.ndim == 1 and found.shape == (len(want), 2):
        yield from ((column, want) for column in found.T)


def _apart(found: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Rows of values that differ by more than the errors of float32."""
    if found.size != want.size or found.dtype.kind not in "biuf":
        return np.zeros(len(want), bool)
    want = want.reshape(len(want), -1).astype(np.float64)
    error = ERROR * np.std(want) + TIE * np.max(np.abs(want))
    return ~np.all(np.abs(found.reshape(want.shape) - want) <= error, axis=1)


def _labels_differ(found: np.ndarray, own: Outputs, classes: Any) -> np.ndarray:
    """Rows of labels that differ and whose scores do too."""
    want = own["predict"][0]
    if found.size != want.size:
        return np.zeros(len(want), bool)
    found, want = found.reshape(len(want), -1), want.reshape(len(want), -1)
    differ = found != want
    scores = next((own[name] for name in (*SCORES, "transform") if name in own), [])
    for column, of in enumerate(scores if len(scores) == differ.shape[1] else ()):
        several = classes[column] if isinstance(classes, list) else classes
        names = np.arange(of.shape[-1]) if several is None else np.asarray(several)
        differ[:, column] &= ~_tied(found[:, column], want[:, column], of.reshape(len(want), -1), names)
    return np.any(differ, axis=1)


def _tied(a: np.ndarray, b: np.ndarray, scores: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Whether two labels have the same score, or where scores are of other things than labels, one of these is nothing."""
    rows, error = np.arange(len(a)), TIE * np.max(np.abs(scores))
    if scores.shape[1] != len(names):
        return np.min(np.abs(scores), axis=1) <= error
    place = {name: i for i, name in enumerate(names.tolist())}
    first, second = ([place.get(v, 0) for v in labels.tolist()] for labels in (a, b))
    return np.abs(scores[rows, first] - scores[rows, second]) <= error


def _on_edges(estimator: Any, rows: Any, own: Outputs) -> np.ndarray:
    """Rows whose results change with the last digits of their features: bins and thresholds, met in float32."""
    found = np.zeros(len(rows), bool)
    if getattr(getattr(rows, "dtype", None), "kind", "") != "f":
        return found
    for step in (NUDGE, -NUDGE):
        nudged = _own(estimator, rows + (step * np.nanmax(np.abs(rows), axis=0)).astype(rows.dtype))
        for name in own.keys() & nudged.keys():
            for a, b in zip(nudged[name], own[name]):
                labels = name == "predict" and _gives_labels(own, getattr(estimator, "classes_", None))
                found |= np.any((a != b).reshape(len(found), -1), axis=1) if labels else _apart(a, b)
    return found
