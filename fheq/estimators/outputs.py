"""What estimators make of their scores: post-transforms, second columns of binary ones, labels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.errors import UnsupportedError
from fheq.graph import Node, describe, is_float
from fheq.ops.table import Kind, Op, register
from fheq.rewriting.edit import Draft

Array = Any
DOMAIN = "ai.onnx.ml"
TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")
"""Post-transforms by their numbers in TreeEnsemble."""
NOT_ZERO = 1e-7  # what SOFTMAX_ZERO takes for more than 0
PROBIT = 0.147  # Winitzki's constant
LEAST_PROBABILITY, UNSETTLED, SWEEPS = 1e-7, 0.005, 100
"""Of libsvm's coupling: the bound on probabilities, the error (times the number of classes) at which it ends, and sweeps."""


def real_input(draft: Draft, node: Node, position: int = 0) -> str:
    """An input as float32, or float64 where it is that."""
    name = node.inputs[position]
    return name if is_float(draft.types[name].dtype) else draft.apply(node, "Cast", name, to=1)


def constant_like(draft: Draft, node: Node, label: str, value: Any, like: str) -> str:
    """A known tensor of the type of another one."""
    return draft.constant(f"{node.outputs[0] or node.outputs[-1]}/{label}", value, draft.types[like].dtype)


def linear(draft: Draft, node: Node, x: str, weight: np.ndarray, bias: np.ndarray, out: str = "", **attrs: Any) -> str:
    """`x @ weight + bias`; the bias is left out where it is 0."""
    product = draft.apply(
        node, "MatMul", x, constant_like(draft, node, "weight", weight, x), out="" if np.any(bias) else out, **attrs
    )
    if not np.any(bias):
        return product
    return draft.apply(node, "Add", product, constant_like(draft, node, "bias", bias, x), out=out)


def transformed(draft: Draft, node: Node, scores: str, transform: str, out: str = "") -> str:
    """Scores `(N, C)` after a post-transform."""
    if transform in ("", "NONE"):
        return draft.apply(node, "Identity", scores, out=out) if out else scores
    if transform == "LOGISTIC":
        return draft.apply(node, "Sigmoid", scores, out=out)
    if transform == "SOFTMAX":
        return draft.apply(node, "Softmax", scores, out=out, axis=-1)
    internal = {"SOFTMAX_ZERO": "SoftmaxZero", "PROBIT": "Probit"}
    if transform not in internal:
        raise UnsupportedError(f"{describe(node)}: unknown post_transform {transform!r}; use one of {', '.join(TRANSFORMS)}")
    return own(draft, node, internal[transform], (scores,), out)


def own(draft: Draft, node: Node, op: str, inputs: tuple[str, ...], out: str = "") -> str:
    """A node of an operator that only fheq has."""
    out = out or draft.fresh(f"{node.outputs[-1]}/{op}")
    draft.write(Node(f"{node.name or out}/{op}", op, inputs, (out,), {}, "fheq", 1))
    return out


def two_columns(draft: Draft, node: Node, score: str, complement: bool) -> str:
    """Scores of both classes from that of the positive one: `1 - s` (complement) or `-s` beside `s`."""
    if complement:
        other = draft.apply(node, "Sub", constant_like(draft, node, "one", 1, score), score)
    else:
        other = draft.apply(node, "Neg", score)
    return draft.apply(node, "Concat", other, score, axis=1)


def class_labels(node: Node) -> np.ndarray:
    """The labels of the classes; strings are numbers of the model's strings by now (see `fheq.onnx.strings`)."""
    names = ("classlabels_strings", "classlabels_int64s", "classlabels_ints")
    return np.asarray(next((node.attrs[n] for n in names if node.attrs.get(n)), ()), np.int64)


def write_label(draft: Draft, node: Node, scores: str, labels: np.ndarray, out: str) -> None:
    """The label `(N,)` of the greatest of scores `(N, C)`."""
    best = draft.apply(node, "ArgMax", scores, axis=1, keepdims=0, select_last_index=0)
    named = Node(
        f"{node.name or out}/label",
        "LabelEncoder",
        (best,),
        (out,),
        {"keys_int64s": tuple(range(len(labels))), "values_int64s": tuple(int(v) for v in labels), "default_int64": -1},
        DOMAIN,
        2,
    )
    draft.write(named)


def _softmax_zero(node: Node, x: Array) -> Array:
    """Softmax over the last axis in which a zero keeps the weight 0."""
    top = jnp.max(x, axis=-1, keepdims=True)
    powers = jnp.where(jnp.abs(x) > NOT_ZERO, jnp.exp(x - top), x * jnp.exp(-top))
    total = jnp.sum(powers, axis=-1, keepdims=True)
    return jnp.where(total == 0, 0.5, powers / jnp.where(total == 0, 1, total)).astype(x.dtype)


def _probit(node: Node, x: Array) -> Array:
    """The inverse of the normal distribution, in the approximation that ONNX runtimes use (Winitzki 2008)."""
    y = 2 * x - 1
    log = jnp.log((1 - y) * (1 + y))
    half = 2 / (np.pi * PROBIT) + 0.5 * log
    return (1.41421356 * jnp.sign(y) * jnp.sqrt(-half + jnp.sqrt(half * half - log / PROBIT))).astype(x.dtype)


def _pairwise_coupling(node: Node, r: Array) -> Array:
    """Class probabilities `(N, C)` from those of all pairs `(N, C (C - 1) / 2)` (Wu, Lin, Weng 2004, as libsvm does it)."""
    pairs = r.shape[-1]
    count = round((1 + (1 + 8 * pairs) ** 0.5) / 2)
    first, second = np.triu_indices(count, 1)
    r = jnp.clip(r, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)

    def one(row: Array) -> Array:
        table = jnp.zeros((count, count), row.dtype).at[first, second].set(row).at[second, first].set(1 - row)
        q = -table.T * table
        q = q.at[np.arange(count), np.arange(count)].set(jnp.sum(table**2, axis=0))

        def sweep(state: tuple[Array, Array]) -> tuple[Array, Array]:
            p, step = state
            qp = q @ p
            total = p @ qp
            for t in range(count):
                change = (total - qp[t]) / q[t, t]
                total = (total + change * (change * q[t, t] + 2 * qp[t])) / (1 + change) ** 2
                qp = (qp + change * q[t]) / (1 + change)
                p = p.at[t].add(change) / (1 + change)
            return p, step + 1

        def unfinished(state: tuple[Array, Array]) -> Array:
            p, step = state
            qp = q @ p
            return (step < max(SWEEPS, count)) & (jnp.max(jnp.abs(qp - p @ qp)) >= UNSETTLED / count)

        return jax.lax.while_loop(unfinished, sweep, (jnp.full(count, 1 / count, row.dtype), 0))[0]

    return jax.vmap(one)(r)


register(
    Op("SoftmaxZero", 1, Kind.CLIENT, _softmax_zero, domain="fheq"),
    Op("Probit", 1, Kind.ELEMENTWISE, _probit, domain="fheq"),
    Op("PairwiseCoupling", 1, Kind.CLIENT, _pairwise_coupling, domain="fheq"),
)
