"""Estimators of ai.onnx.ml, written with simple operators.

Each has one body, which import puts in its place (`expand_estimators`) and which its row evaluates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fheq.estimators.ensembles import tree_classifier, tree_ensemble, tree_regressor
from fheq.estimators.features import feature_vectorizer, one_hot_encoder, scaler, zip_map
from fheq.estimators.linear import linear_classifier, linear_regressor, svm_classifier, svm_regressor
from fheq.estimators.outputs import DOMAIN
from fheq.graph import Graph, Node, TensorType
from fheq.interpret import run_node
from fheq.ops.table import Kind, Op, register
from fheq.rewriting.edit import Draft

Body = Callable[[Draft, Node], None]

_BODIES: tuple[tuple[str, tuple[int, ...], Body], ...] = (
    ("FeatureVectorizer", (1,), feature_vectorizer),
    ("LinearClassifier", (1,), linear_classifier),
    ("LinearRegressor", (1,), linear_regressor),
    ("OneHotEncoder", (1,), one_hot_encoder),
    ("SVMClassifier", (1,), svm_classifier),
    ("SVMRegressor", (1,), svm_regressor),
    ("Scaler", (1,), scaler),
    ("TreeEnsemble", (5,), tree_ensemble),
    ("TreeEnsembleClassifier", (1, 3), tree_classifier),
    ("TreeEnsembleRegressor", (1, 3), tree_regressor),
    ("ZipMap", (1,), zip_map),
)
BODIES = {name: body for name, _, body in _BODIES}


def expand_estimators(graph: Graph) -> Graph:
    """Every estimator replaced by its body."""
    draft = Draft(graph, hook=_expanded)
    for node in graph.nodes:
        draft.write(node)
    return draft.finish()


def _expanded(draft: Draft, node: Node) -> bool:
    if node.domain != DOMAIN or node.op not in BODIES:
        return False
    BODIES[node.op](draft, node)
    return True


def _evaluate(node: Node, *inputs: Any) -> tuple[Any, ...]:
    """The float semantics of an estimator: those of its body."""
    types = {name: TensorType(tuple(x.shape), x.dtype) for name, x in zip(node.inputs, inputs) if name}
    draft = Draft(Graph((), (), (), {}, types))
    BODIES[node.op](draft, node)
    env = dict(zip(node.inputs, inputs))
    for part in draft.nodes:
        values = run_node(part, lambda name: env[name] if name in env else draft.constants[name], draft.constants)
        env.update((name, value) for name, value in zip(part.outputs, values) if name)
    return tuple(env[name] if name else None for name in node.outputs)


register(*(Op(name, since, Kind.COMPOSITE, _evaluate, domain=DOMAIN) for name, versions, _ in _BODIES for since in versions))
