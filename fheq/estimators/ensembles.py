"""Tree ensembles in simple operators: comparisons, counts of decisions, leaf values.

There is no branching on encrypted data, so every test of every tree is made: one table per test `x <= threshold`, which is
exact on the integers of a quantized feature. A leaf is reached when all tests on its path turn out right, so the number of
right ones, a sum of bits, equals the path's length: a small table per leaf. What is left is a product with the leaf values.
Of each tree one leaf is left out: the others' values are relative to it, and it is reached when they are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fheq.affine import Affine
from fheq.errors import ModelError, UnsupportedError
from fheq.estimators.outputs import (
    TRANSFORMS,
    class_labels,
    constant_like,
    linear,
    real_input,
    transformed,
    two_columns,
    write_label,
)
from fheq.estimators.trees import Leaf, Test, Tree, number, trees_of
from fheq.graph import Node, describe
from fheq.rewriting.edit import CODES, Draft

MAX_ENTRIES = 2**27  # of the matrices from tests to leaves, all trees together
AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")


@dataclass(frozen=True)
class Indicators:
    """The leaves whose values are counted, by column.

    Args:
        leaves: all of them; those of one test come last.
        tree: the tree of each.
        constant: `(trees, targets)`, the values of the leaves that were left out.
        weights: `(leaves, targets)`, relative to them.
    """

    leaves: tuple[Leaf, ...]
    tree: np.ndarray
    constant: np.ndarray
    weights: np.ndarray


def indicators(trees: Sequence[Tree], targets: int) -> Indicators:
    """Chooses the leaf of each tree that is left out: the deepest, whose table would be the widest."""
    constant = np.zeros((len(trees), targets))
    columns: list[tuple[Leaf, int, np.ndarray]] = []
    for t, leaves in enumerate(trees):
        rest = max(range(len(leaves)), key=lambda i: (len(leaves[i].path), i))
        constant[t] = _values(leaves[rest], targets)
        for i, leaf in enumerate(leaves):
            weights = _values(leaf, targets) - constant[t]
            if i != rest and np.any(weights):
                columns.append((leaf, t, weights))
    columns.sort(key=lambda c: len(c[0].path) == 1)
    weights = np.array([w for _, _, w in columns]).reshape(len(columns), targets)
    return Indicators(tuple(c[0] for c in columns), np.array([c[1] for c in columns], np.int64), constant, weights)


def _values(leaf: Leaf, targets: int) -> np.ndarray:
    values = np.zeros(targets)
    for target, weight in leaf.weights:
        values[target] += weight
    return values


def ensemble_scores(draft: Draft, node: Node, trees: Sequence[Tree], targets: int, aggregate: str, base: np.ndarray) -> str:
    """Scores `(N, targets)` of an ensemble, base values added."""
    x = real_input(draft, node)
    found = indicators(trees, targets)
    if aggregate in ("MIN", "MAX"):
        count = len(trees)
        spread = np.zeros((len(found.leaves), count, targets))
        spread[np.arange(len(found.leaves)), found.tree] = found.weights
        each = _leaf_sums(draft, node, x, found, spread.reshape(-1, count * targets), found.constant.ravel())
        shape = draft.constant(f"{node.outputs[-1]}/trees", np.array([0, count, targets]))
        each = draft.apply(node, "Reshape", each, shape, allowzero=0)
        axes = draft.constant(f"{node.outputs[-1]}/axes", np.array([1]))
        best = draft.apply(node, f"Reduce{aggregate.title()}", each, axes, keepdims=0, noop_with_empty_axes=0)
        return draft.apply(node, "Add", best, constant_like(draft, node, "base", base, best)) if np.any(base) else best
    share = 1 / len(trees) if aggregate == "AVERAGE" else 1.0
    return _leaf_sums(draft, node, x, found, share * found.weights, share * found.constant.sum(axis=0) + base)


def _leaf_sums(draft: Draft, node: Node, x: str, found: Indicators, weights: np.ndarray, bias: np.ndarray) -> str:
    """`indicators @ weights + bias`."""
    if not found.leaves:  # every tree is one leaf
        x = draft.apply(node, "Gather", x, draft.constant(f"{x}/first", np.array([0])), axis=1)
        return linear(draft, node, x, np.zeros((1, len(bias))), bias)
    tests = list(dict.fromkeys(test for leaf in found.leaves for test, _ in leaf.path))
    bits = _decisions(draft, node, x, tests)
    deep, groups = sum(len(leaf.path) > 1 for leaf in found.leaves), found.tree
    parts = [_reached(draft, node, bits, tests, found, deep)] if deep else []
    if deep < len(found.leaves):  # leaves of one test: its result, or what is missing to 1
        single = [leaf.path[0] for leaf in found.leaves[deep:]]
        places = draft.constant(f"{node.outputs[-1]}/single", np.array([tests.index(test) for test, _ in single]))
        parts.append(draft.apply(node, "Gather", bits, places, axis=1))
        against = np.array([not result for _, result in single])
        bias = bias + weights[deep:][against].sum(axis=0)
        groups = np.concatenate([groups[:deep], np.where(against, groups.max() + 1 + np.arange(len(single)), groups[deep:])])
        weights = np.concatenate([weights[:deep], np.where(against[:, None], -weights[deep:], weights[deep:])])
    columns = parts[0] if len(parts) == 1 else draft.apply(node, "Concat", *parts, axis=1)
    return linear(draft, node, columns, weights, bias, exclusive=groups)


def _decisions(draft: Draft, node: Node, x: str, tests: Sequence[Test]) -> str:
    """The results of tests, `(N, tests)`, as 0 and 1 of the features' type."""
    order, parts = [], []
    for mode, op in (("LEQ", "LessOrEqual"), ("LT", "Less"), ("EQ", "Equal")):
        chosen = [i for i, test in enumerate(tests) if test.mode == mode]
        if not chosen:
            continue
        order += chosen
        features = draft.constant(f"{node.outputs[-1]}/features", np.array([tests[i].feature for i in chosen]))
        value = draft.apply(node, "Gather", x, features, axis=1)
        part = ""
        for k in range(max(len(tests[i].values) for i in chosen)):
            level = [tests[i].values[min(k, len(tests[i].values) - 1)] if tests[i].values else np.inf for i in chosen]
            same = draft.apply(node, op, value, constant_like(draft, node, "thresholds", level, value))
            part = draft.apply(node, "Or", part, same) if part else same
        missing = np.array([tests[i].missing for i in chosen])
        if np.any(missing):
            unknown = draft.apply(
                node, "And", draft.apply(node, "IsNaN", value), draft.constant(f"{value}/missing", missing)
            )
            part = draft.apply(node, "Or", part, unknown)
        parts.append(draft.apply(node, "Cast", part, to=CODES[draft.types[x].dtype]))
    bits = parts[0] if len(parts) == 1 else draft.apply(node, "Concat", *parts, axis=1)
    if order == sorted(order):
        return bits
    return draft.apply(node, "Gather", bits, draft.constant(f"{bits}/order", np.argsort(order)), axis=1)


def _reached(draft: Draft, node: Node, bits: str, tests: Sequence[Test], found: Indicators, deep: int) -> str:
    """Whether each of the first `deep` leaves is reached, `(N, deep)`, as 0 and 1.

    Trees are padded to one size and stacked, so that each test meets the leaves of its own tree only.
    """
    number_of = {test: i for i, test in enumerate(tests)}
    members = [np.flatnonzero(found.tree[:deep] == t) for t in np.unique(found.tree[:deep])]
    own = [list(dict.fromkeys(test for i in rows for test, _ in found.leaves[i].path)) for rows in members]
    width, height = max(map(len, own)), max(map(len, members))
    if len(members) * width * height > MAX_ENTRIES:
        raise UnsupportedError(
            f"{describe(node)}: {len(members)} trees of up to {height} leaves are too large; train with a lower max_depth"
        )
    places = np.zeros((len(members), width), np.int64)
    paths = np.zeros((len(members), width, height))
    columns, level = np.zeros(deep, np.int64), np.zeros(deep)
    for t, (rows, mine) in enumerate(zip(members, own)):
        local = {test: i for i, test in enumerate(mine)}
        places[t, : len(mine)] = [number_of[test] for test in mine]
        for j, i in enumerate(rows):
            columns[i] = t * height + j
            level[i] = sum(result for _, result in found.leaves[i].path) - 0.5
            for test, result in found.leaves[i].path:
                paths[t, local[test], j] = 1 if result else -1
    base = node.outputs[-1]
    taken = draft.apply(node, "Gather", bits, draft.constant(f"{base}/places", places.ravel()), axis=1)
    stacked = draft.constant(f"{base}/stacked", np.array([-1, len(members), 1, width]))
    weight = constant_like(draft, node, "paths", paths, taken)
    unit = np.asarray(1.0)
    draft.pinned[weight] = Affine(unit, 0 * unit, -unit, unit, 0 * unit, signed=True)
    right = draft.apply(node, "MatMul", draft.apply(node, "Reshape", taken, stacked, allowzero=0), weight, exact=True)
    flat = draft.constant(f"{base}/flat", np.array([-1, len(members) * height]))
    counts = draft.apply(node, "Reshape", right, flat, allowzero=0)
    counts = draft.apply(node, "Gather", counts, draft.constant(f"{base}/leaves", columns), axis=1)
    all_right = draft.apply(node, "Greater", counts, constant_like(draft, node, "level", level, counts))
    return draft.apply(node, "Cast", all_right, to=CODES[draft.types[counts].dtype])


# Operators


def tree_ensemble(draft: Draft, node: Node) -> None:
    """ai.onnx.ml TreeEnsemble."""
    targets = node.attrs["n_targets"]
    aggregate = AGGREGATES[node.attrs["aggregate_function"]]
    scores = ensemble_scores(draft, node, trees_of(node), targets, aggregate, np.zeros(targets))
    transformed(draft, node, scores, TRANSFORMS[node.attrs["post_transform"]], node.outputs[0])


def tree_regressor(draft: Draft, node: Node) -> None:
    """ai.onnx.ml TreeEnsembleRegressor."""
    targets, trees, base = node.attrs.get("n_targets") or 1, trees_of(node), _base(node, node.attrs.get("n_targets") or 1)
    scores = ensemble_scores(draft, node, trees, targets, node.attrs["aggregate_function"], base)
    transformed(draft, node, _single(draft, node, scores), node.attrs["post_transform"], node.outputs[0])
    readers = draft.graph.consumers().get(node.outputs[0], [])
    if readers and len(trees) == 1 and not np.any(base) and all(_makes_integers(reader) for reader in readers):
        _pin_numbers(draft, node, trees[0])


def _makes_integers(node: Node) -> bool:
    return node.op == "Cast" and node.attrs["to"] in (CODES[np.dtype(kind)] for kind in (np.int32, np.int64))


def _pin_numbers(draft: Draft, node: Node, leaves: Tree) -> None:
    """A tree that gives the numbers of its leaves, which an IsolationForest reads, has integers for results and weights."""
    values = np.array([weight for leaf in leaves for _, weight in leaf.weights])
    if not np.all(values == np.round(values)) or np.any(values < 0):
        return
    zero = np.zeros(())
    draft.pinned[node.outputs[0]] = Affine(zero + 1, zero, zero, zero + max(values.max(), 1), zero)
    weight = draft.constants.get(f"{node.outputs[0]}/weight")
    if weight is not None:
        most = zero + max(np.abs(weight).max(), 1)
        draft.pinned[f"{node.outputs[0]}/weight"] = Affine(zero + 1, zero, -most, most, zero, signed=True)


def tree_classifier(draft: Draft, node: Node) -> None:
    """ai.onnx.ml TreeEnsembleClassifier.

    Where all leaf values are for one of two classes, they score the positive one, as shares of 1 if none is negative. What
    the scores of both are then, ONNX leaves open: it is what onnxruntime makes of them.
    """
    labels, transform, trees = class_labels(node), node.attrs["post_transform"], trees_of(node)
    targets = {target for leaves in trees for leaf in leaves for target, _ in leaf.weights}
    label, output = node.outputs[0], node.outputs[1] if len(node.outputs) > 1 else ""
    count = max(len(labels), max(targets, default=0) + 1)
    if len(labels) == 2 and len(targets) == 1:
        positive = tuple(tuple(Leaf(f.path, tuple((0, w) for _, w in f.weights)) for f in leaves) for leaves in trees)
        base = number(node, "base_values")
        score = ensemble_scores(draft, node, positive, 1, "SUM", base[-1:] if len(base) else np.zeros(1))
        score = _single(draft, node, score)
        shares = all(w >= 0 for leaves in trees for leaf in leaves for _, w in leaf.weights)
        ranked = scores = two_columns(draft, node, score, complement=shares)
        if targets == {1}:
            nothing = draft.apply(node, "Mul", score, constant_like(draft, node, "nothing", 0, score))
            scores = draft.apply(node, "Concat", nothing, score, axis=1)
        elif shares or transform != "LOGISTIC":
            transform = "NONE"
    else:
        scores = ranked = _single(draft, node, ensemble_scores(draft, node, trees, count, "SUM", _base(node, count)))
    if label:
        write_label(draft, node, ranked, labels if len(labels) else np.arange(count), label)
    if output:
        transformed(draft, node, scores, transform, output)


def _single(draft: Draft, node: Node, scores: str) -> str:
    """Scores as float32, which these operators give of float64 features too."""
    return scores if draft.types[scores].dtype == np.float32 else draft.apply(node, "Cast", scores, to=1)


def _base(node: Node, targets: int) -> np.ndarray:
    base = number(node, "base_values")
    if len(base) not in (0, 1, targets):
        raise ModelError(f"{describe(node)}: {len(base)} base values for {targets} targets; export the model again")
    return np.broadcast_to(base if len(base) else np.zeros(1), (targets,)).copy()
