"""Activations of recurrent cells, and the algebra that cells are written in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fheq.errors import UnsupportedError
from fheq.graph import Node, describe

Array = Any
Value = Any

_DEFAULTS = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}

# Activations with parameters, and the defaults of alpha and beta (None: no such parameter; NaN: it has no default).
_PARAMETERS: dict[str, tuple[float | None, float | None]] = {
    "Affine": (math.nan, math.nan),
    "Elu": (1.0, None),
    "HardSigmoid": (0.2, 0.5),
    "LeakyRelu": (0.01, None),
    "ScaledTanh": (math.nan, math.nan),
    "ThresholdedRelu": (1.0, None),
}
_NAMES = {name.lower(): name for name in (*_PARAMETERS, "Relu", "Sigmoid", "Softplus", "Softsign", "Tanh")}


class Algebra(Protocol):
    """What a recurrence is written with: known arrays, and operators of opset 18 applied to values."""

    def known(self, array: Array) -> Value:
        """A value for an array."""

    def weight(self, array: Array, leaves: Mapping[str, Array] | None) -> Value:
        """A value for a known matrix; leaves: its quantizer's, one entry per weight, where the model states it."""

    def apply(self, op: str, *inputs: Value, out: str = "", **attrs: Any) -> Value:
        """The result of an operator, every attribute given; `out` may name it."""


@dataclass(frozen=True)
class Activation:
    """An activation of a cell with its parameters."""

    name: str
    alpha: float | None
    beta: float | None

    def apply(self, algebra: Algebra, x: Value, dtype: Any) -> Value:
        """The activation of a value."""
        if self.name in ("Affine", "ScaledTanh"):
            alpha, beta = (algebra.known(np.asarray(v, dtype)) for v in (self.alpha, self.beta))
            if self.name == "Affine":
                return algebra.apply("Add", algebra.apply("Mul", x, alpha), beta)
            return algebra.apply("Mul", algebra.apply("Tanh", algebra.apply("Mul", x, beta)), alpha)
        given: dict[str, Any] = {"alpha": self.alpha, "beta": self.beta}
        return algebra.apply(self.name, x, **{key: value for key, value in given.items() if value is not None})


def activations_of(node: Node, directions: int) -> list[tuple[Activation, ...]]:
    """The activations of each direction; alphas and betas go in order to those that take one.

    Raises:
        UnsupportedError: an unknown activation.
        ValueError: too few of them.
    """
    count = len(_DEFAULTS[node.op])
    names = node.attrs.get("activations") or _DEFAULTS[node.op] * directions
    if len(names) < count * directions:  # the schema's default for RNN has one for each direction that there may be
        raise ValueError(f"{len(names)} activations for {directions} directions of {node.op}; {count} each are due")
    alphas, betas = (iter(node.attrs.get(f"activation_{key}") or ()) for key in ("alpha", "beta"))
    found = []
    for name in names[: count * directions]:
        known = _NAMES.get(name.lower())
        if known is None:
            raise UnsupportedError(f"{describe(node)}: activation {name!r}; use one of {', '.join(sorted(_NAMES.values()))}")
        alpha, beta = _PARAMETERS.get(known, (None, None))
        alpha, beta = (
            default if default is None else float(next(rest, default)) for default, rest in ((alpha, alphas), (beta, betas))
        )
        if any(value is not None and math.isnan(value) for value in (alpha, beta)):
            raise UnsupportedError(f"{describe(node)}: {known} without alpha and beta; state both, they have no defaults")
        found.append(Activation(known, alpha, beta))
    return [tuple(found[i : i + count]) for i in range(0, len(found), count)]
