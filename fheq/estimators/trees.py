"""Tree ensembles as a model states them, whatever the operator, in one form: tests, paths and leaf values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fheq.errors import ModelError, UnsupportedError
from fheq.graph import Node, describe

MODES = ("LEQ", "LT", "GTE", "GT", "EQ", "NEQ", "MEMBER")
"""Comparisons by their numbers in TreeEnsemble; the other operators call them BRANCH_LEQ and so on."""
NEGATED = {"GT": "LEQ", "GTE": "LT", "NEQ": "EQ"}
MAX_DEPTH = 10_000


@dataclass(frozen=True)
class Test:
    """A comparison of one feature: `x <= value` (LEQ), `x < value` (LT) or x among `values` (EQ); NaN gives `missing`."""

    feature: int
    mode: str
    values: tuple[float, ...]
    missing: bool


@dataclass(frozen=True)
class Leaf:
    """A leaf: the tests on the way to it with the results that lead there, and its weight per target."""

    path: tuple[tuple[Test, bool], ...]
    weights: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Branch:
    """A node as stated: its test, whether the test is negated, and what follows if it holds and if not."""

    test: Test
    negated: bool
    then: Any
    otherwise: Any


Tree = tuple[Leaf, ...]


def trees_of(node: Node) -> tuple[Tree, ...]:
    """The trees of a TreeEnsemble, TreeEnsembleClassifier or TreeEnsembleRegressor.

    Raises:
        ModelError: attributes that do not fit together, or a tree with a cycle.
    """
    try:
        return _from_lists(node) if node.op == "TreeEnsemble" else _from_ids(node)
    except (IndexError, KeyError, TypeError) as error:
        raise ModelError(f"{describe(node)}: its trees are malformed ({error}); export the model again") from error


def number(node: Node, name: str) -> np.ndarray:
    """A list of numbers, or the tensor that newer opsets take instead, float64; empty where absent."""
    tensor = node.attrs.get(f"{name}_as_tensor")
    value = tensor if tensor is not None and np.size(tensor) else node.attrs.get(name)
    return np.asarray(() if value is None else value, np.float64).ravel()


def _branch(feature: int, mode: str, values: Sequence[float], missing: bool, then: Any, otherwise: Any) -> Branch:
    negated = mode in NEGATED
    kind = NEGATED.get(mode, mode)
    test = Test(feature, "EQ" if kind == "MEMBER" else kind, tuple(values), missing != negated)
    return Branch(test, negated, then, otherwise)


def _from_ids(node: Node) -> tuple[Tree, ...]:
    """Nodes by tree and node number (TreeEnsembleClassifier, TreeEnsembleRegressor)."""
    a = node.attrs
    part = "class" if node.op == "TreeEnsembleClassifier" else "target"
    weights: dict[tuple[int, int], list[tuple[int, float]]] = {}
    stated = zip(a[f"{part}_treeids"], a[f"{part}_nodeids"], a[f"{part}_ids"], number(node, f"{part}_weights"), strict=False)
    for tree, at, target, weight in stated:
        weights.setdefault((tree, at), []).append((target, float(weight)))
    modes = [str(mode).removeprefix("BRANCH_") for mode in a["nodes_modes"]]
    thresholds, missing = number(node, "nodes_values"), a.get("nodes_missing_value_tracks_true") or [0] * len(modes)
    branches: dict[tuple[int, int], Any] = {}
    children: set[tuple[int, int]] = set()
    for i, key in enumerate(zip(a["nodes_treeids"], a["nodes_nodeids"], strict=True)):
        if modes[i] == "LEAF":
            branches[key] = tuple(weights.get(key, ()))
            continue
        if modes[i] not in MODES[:-1]:
            raise UnsupportedError(f"{describe(node)}: unknown comparison {a['nodes_modes'][i]!r} in a tree")
        then, otherwise = (key[0], a["nodes_truenodeids"][i]), (key[0], a["nodes_falsenodeids"][i])
        children |= {then, otherwise}
        feature = a["nodes_featureids"][i]
        branches[key] = _branch(feature, modes[i], (float(thresholds[i]),), bool(missing[i]), then, otherwise)
    roots: dict[int, tuple[int, int]] = {}
    for key in branches:
        if key not in children:
            roots.setdefault(key[0], key)
    if len(roots) != len({tree for tree, _ in branches}):
        raise ModelError(f"{describe(node)}: a tree has no root, its nodes form a cycle; export the model again")
    return tuple(_leaves(node, root, branches) for root in roots.values())


def _from_lists(node: Node) -> tuple[Tree, ...]:
    """Nodes and leaves as two lists (TreeEnsemble)."""
    a = node.attrs
    modes, splits = np.ravel(a["nodes_modes"]), np.ravel(a["nodes_splits"]).astype(np.float64)
    members = iter(number(node, "membership_values"))
    missing = a.get("nodes_missing_value_tracks_true") or [0] * len(modes)
    leaf_weights = np.ravel(a["leaf_weights"]).astype(np.float64)
    branches: dict[tuple[str, int], Any] = {
        ("leaf", i): ((target, float(leaf_weights[i])),) for i, target in enumerate(a["leaf_targetids"])
    }
    for i, code in enumerate(modes):
        values = _members(members) if MODES[code] == "MEMBER" else [float(splits[i])]
        then, otherwise = (
            ("leaf" if a[f"nodes_{side}leafs"][i] else "node", a[f"nodes_{side}nodeids"][i]) for side in ("true", "false")
        )
        branches["node", i] = (
            branches[then]
            if then == otherwise and then[0] == "leaf"
            else _branch(a["nodes_featureids"][i], MODES[code], values, bool(missing[i]), then, otherwise)
        )
    return tuple(_leaves(node, ("node", root), branches) for root in a["tree_roots"])


def _members(values: Any) -> list[float]:
    """The members of one set: up to the next NaN."""
    found = []
    for value in values:
        if np.isnan(value):
            break
        found.append(float(value))
    return found


def _leaves(node: Node, root: Any, branches: dict[Any, Any]) -> Tree:
    """The leaves of one tree with their paths, from left to right."""
    leaves: list[Leaf] = []
    stack: list[tuple[Any, tuple[tuple[Test, bool], ...]]] = [(root, ())]
    limit = len(branches)
    while stack:
        key, path = stack.pop()
        if len(path) > min(limit, MAX_DEPTH) or len(leaves) > limit:
            raise ModelError(f"{describe(node)}: a tree has a cycle; export the model again")
        found = branches[key]
        if isinstance(found, Branch):
            stack.append((found.otherwise, (*path, (found.test, found.negated))))
            stack.append((found.then, (*path, (found.test, not found.negated))))
        else:
            _add(leaves, path, found)
    return tuple(leaves)


def _add(leaves: list[Leaf], path: tuple[tuple[Test, bool], ...], weights: tuple[tuple[int, float], ...]) -> None:
    """Adds a leaf, unless its path contradicts itself; a test that is met twice counts once."""
    results: dict[Test, bool] = {}
    for test, result in path:
        if results.setdefault(test, result) != result:
            return
    leaves.append(Leaf(tuple(results.items()), weights))
