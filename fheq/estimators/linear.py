"""Linear estimators and support vector machines: linear layers with a table per support vector between them."""

from __future__ import annotations

import numpy as np

from fheq.errors import ModelError, UnsupportedError
from fheq.estimators.outputs import (
    class_labels,
    constant_like,
    linear,
    own,
    real_input,
    transformed,
    two_columns,
    write_label,
)
from fheq.graph import Node, describe
from fheq.rewriting.distances import squared_distances
from fheq.rewriting.edit import Draft


def linear_classifier(draft: Draft, node: Node) -> None:
    """ai.onnx.ml LinearClassifier."""
    x, labels = real_input(draft, node), class_labels(node)
    weight = matrix(node, "coefficients", draft.types[x].shape[-1]).T
    scores = linear(draft, node, x, weight, vector(node, "intercepts", weight.shape[1]))
    transform = node.attrs["post_transform"]
    label, probabilities = node.outputs[0], node.outputs[1] if len(node.outputs) > 1 else ""
    if weight.shape[1] == 1 and len(labels) == 2:
        scores = two_columns(draft, node, scores, complement=False)
    elif weight.shape[1] == 1:
        _threshold_label(draft, node, scores, labels, label)
        label = ""
    if label:
        write_label(draft, node, scores, labels if len(labels) else np.arange(weight.shape[1]), label)
    if probabilities:
        transformed(draft, node, scores, transform, probabilities)


def _threshold_label(draft: Draft, node: Node, score: str, labels: np.ndarray, out: str) -> None:
    """The label of a classifier with one score: its only class, or 0 where the score is below the threshold."""
    if not out:
        return
    seen = transformed(draft, node, score, node.attrs["post_transform"])
    limit = 0.0 if node.attrs["post_transform"] == "NONE" else 0.5
    above = draft.apply(node, "GreaterOrEqual", seen, constant_like(draft, node, "limit", limit, seen))
    named = [
        draft.constant(f"{out}/{k}", v, np.dtype(np.int64)) for k, v in (("on", labels[0] if len(labels) else 1), ("off", 0))
    ]
    flat = draft.constant(f"{out}/shape", np.array([-1]), np.dtype(np.int64))
    draft.apply(node, "Reshape", draft.apply(node, "Where", above, *named), flat, out=out, allowzero=0)


def linear_regressor(draft: Draft, node: Node) -> None:
    """ai.onnx.ml LinearRegressor."""
    x, targets = real_input(draft, node), node.attrs["targets"]
    weight = matrix(node, "coefficients", draft.types[x].shape[-1]).T
    if weight.shape[1] != targets:
        raise ModelError(f"{describe(node)}: {weight.shape[1]} rows of coefficients for {targets} targets; export it again")
    scores = linear(draft, node, x, weight, vector(node, "intercepts", targets))
    transformed(draft, node, scores, node.attrs["post_transform"], node.outputs[0])


def matrix(node: Node, name: str, columns: int) -> np.ndarray:
    """An attribute as rows of so many columns, float64."""
    values = np.asarray(node.attrs.get(name, ()), np.float64)
    if not len(values) or len(values) % columns:
        raise ModelError(f"{describe(node)}: {len(values)} {name} do not fit {columns} columns; export the model again")
    return values.reshape(-1, columns)


def vector(node: Node, name: str, size: int) -> np.ndarray:
    """An attribute as so many numbers, float64; zeros where it is absent."""
    values = np.asarray(node.attrs.get(name) or np.zeros(size), np.float64)
    if len(values) != size:
        raise ModelError(f"{describe(node)}: {len(values)} {name} where {size} are due; export the model again")
    return values


# Support vector machines


def kernel_products(draft: Draft, node: Node, x: str, vectors: np.ndarray, mix: np.ndarray, bias: np.ndarray) -> str:
    """`kernel(x, vectors) @ mix + bias`; vectors `(S, F)`, mix `(S, P)`.

    The linear kernel folds into one product. The others are a product with the vectors, a table for each and a product with
    `mix`; the squared distance of RBF takes a table per feature, since `|x - v|^2 = |x|^2 - 2 x v + |v|^2`.
    """
    kind = node.attrs["kernel_type"]
    gamma, offset, degree = [*map(float, node.attrs.get("kernel_params") or ()), 1.0, 0.0, 3.0][:3]
    if kind == "LINEAR":
        return linear(draft, node, x, vectors.T @ mix, bias)
    if kind == "RBF":
        inner = squared_distances(draft, node, x, vectors, -gamma)
        values = draft.apply(node, "Exp", inner)
    elif kind in ("POLY", "SIGMOID"):
        inner = linear(draft, node, x, gamma * vectors.T, np.full(len(vectors), offset))
        if kind == "POLY":
            values = draft.apply(node, "Pow", inner, constant_like(draft, node, "degree", degree, inner))
        else:
            values = draft.apply(node, "Tanh", inner)
    else:
        raise UnsupportedError(f"{describe(node)}: unknown kernel_type {kind!r}; use LINEAR, POLY, RBF or SIGMOID")
    return linear(draft, node, values, mix, bias)


def svm_regressor(draft: Draft, node: Node) -> None:
    """ai.onnx.ml SVMRegressor."""
    x = real_input(draft, node)
    features, supports = draft.types[x].shape[-1], node.attrs["n_supports"]
    rho = np.asarray(node.attrs["rho"], np.float64)[:1]
    if supports > 0:
        vectors = matrix(node, "support_vectors", features)
        scores = kernel_products(draft, node, x, vectors, matrix(node, "coefficients", len(vectors)).T[:, :1], rho)
    else:
        scores = kernel_products(draft, node, x, matrix(node, "coefficients", features)[:1], np.ones((1, 1)), rho)
    if node.attrs["one_class"]:
        above = draft.apply(node, "Greater", scores, constant_like(draft, node, "zero", 0, scores))
        signs = [constant_like(draft, node, k, v, scores) for k, v in (("inlier", 1), ("outlier", -1))]
        draft.apply(node, "Where", above, *signs, out=node.outputs[0])
        return
    transformed(draft, node, scores, node.attrs["post_transform"], node.outputs[0])


def svm_classifier(draft: Draft, node: Node) -> None:
    """ai.onnx.ml SVMClassifier: one against one with votes, or one linear score per class."""
    x, labels = real_input(draft, node), class_labels(node)
    features, counts = draft.types[x].shape[-1], node.attrs.get("vectors_per_class") or ()
    rho = np.asarray(node.attrs.get("rho") or (0.0,), np.float64)
    label, output = node.outputs[0], node.outputs[1] if len(node.outputs) > 1 else ""
    transform, classes = node.attrs["post_transform"], max(len(labels), len(counts), 1)
    if not sum(counts):
        weight = matrix(node, "coefficients", features).T
        scores = votes = linear(draft, node, x, weight, np.full(weight.shape[1], rho[0]))
        pairs = classes
    else:
        mix = _pair_weights(node, counts)
        pairs = mix.shape[1]
        vectors = matrix(node, "support_vectors", features)
        scores = kernel_products(draft, node, x, vectors, mix, vector(node, "rho", pairs))
        votes = _votes(draft, node, scores, classes)
    if label:
        write_label(draft, node, votes, labels if len(labels) else np.arange(classes), label)
    if not output:
        return
    if node.attrs.get("prob_a"):
        slope, offset = (constant_like(draft, node, n, vector(node, n, pairs), scores) for n in ("prob_a", "prob_b"))
        power = draft.apply(node, "Neg", draft.apply(node, "Add", draft.apply(node, "Mul", scores, slope), offset))
        scores = own(draft, node, "PairwiseCoupling", (draft.apply(node, "Sigmoid", power),))
    elif pairs == 1:
        scores = two_columns(draft, node, scores, complement=False)
    transformed(draft, node, scores, transform, output)


def _pair_weights(node: Node, counts: tuple[int, ...]) -> np.ndarray:
    """Weight of each support vector in the score of each pair of classes, `(S, C (C - 1) / 2)`."""
    total, starts = sum(counts), np.concatenate([[0], np.cumsum(counts)])
    coefficients = matrix(node, "coefficients", total)
    columns = []
    for i in range(len(counts)):
        for j in range(i + 1, len(counts)):
            column = np.zeros(total)
            mine, theirs = slice(starts[i], starts[i + 1]), slice(starts[j], starts[j + 1])
            column[mine], column[theirs] = coefficients[j - 1, mine], coefficients[i, theirs]
            columns.append(column)
    return np.stack(columns, axis=1)


def _votes(draft: Draft, node: Node, scores: str, classes: int) -> str:
    """Votes `(N, C)` of the pairs, in whole numbers."""
    first, second = np.triu_indices(classes, 1)
    won = draft.apply(node, "Greater", scores, constant_like(draft, node, "zero", 0, scores))
    table = np.zeros((len(first), classes), np.int64)
    table[np.arange(len(first)), first], table[np.arange(len(first)), second] = 1, -1
    counted = draft.apply(
        node, "MatMul", draft.apply(node, "Cast", won, to=7), draft.constant(f"{node.outputs[0]}/votes", table)
    )
    return draft.apply(
        node, "Add", counted, draft.constant(f"{node.outputs[0]}/losses", np.bincount(second, minlength=classes))
    )
