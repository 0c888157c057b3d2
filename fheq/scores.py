"""Scores of quantized outputs: what `sweep` and `attribute` average over samples.

A score is a pure function of one sample, `score(y, exact, target)`, whose value is averaged: `y` is what the quantized model
gives, `exact` what the float model gives (both without a batch axis; a tuple where the model has several outputs), `target`
the sample's target, None where none are given. It may return any pytree. A `Score` also says what to make of the averages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = Any
Measure = Callable[[Any, Any, Any], Any]


class Score(NamedTuple):
    """A score that is a function of averages, such as R2.

    measure: `measure(y, exact, target)` of one sample, any pytree of arrays; finish: the score from the averages over all
    samples.
    """

    measure: Measure
    finish: Callable[[Any], Any] = lambda means: means


def as_score(score: Score | Measure) -> Score:
    """A function of one sample as a `Score`; a `Score` as it is."""
    return score if isinstance(score, Score) else Score(score)


def accuracy(y: Array, exact: Array, target: Array) -> Array:
    """Share of samples whose largest output is the one that `target` (an index) names."""
    del exact
    return jnp.argmax(jnp.ravel(y)) == jnp.ravel(target)[0]


def agreement(y: Array, exact: Array, target: Array) -> Array:
    """Share of samples whose largest output is also that of the float model."""
    del target
    return jnp.argmax(jnp.ravel(y)) == jnp.argmax(jnp.ravel(exact))


def mse(y: Any, exact: Any, target: Any) -> Any:
    """Mean squared error against the float model, of each output."""
    del target
    return jax.tree.map(lambda a, b: jnp.mean((a - b) ** 2), y, exact)


def kl(y: Array, exact: Array, target: Array) -> Array:
    """Kullback-Leibler divergence of the softmax of the outputs from that of the float model, in nats."""
    del target
    p, q = (jax.nn.log_softmax(jnp.ravel(v)) for v in (exact, y))
    return jnp.sum(jnp.exp(p) * (p - q))


def _spread(y: Array, wanted: Array) -> tuple[Array, Array, Array]:
    return (y - wanted) ** 2, wanted, wanted**2


def _explained(means: tuple[Array, Array, Array]) -> Array:
    error, mean, square = means
    return 1 - jnp.sum(error) / jnp.sum(square - mean**2)


r2 = Score(lambda y, exact, target: _spread(jnp.ravel(y), jnp.ravel(target)), _explained)
"""R2 of a single output against the targets, over all its elements."""

r2_to_float = Score(lambda y, exact, target: _spread(jnp.ravel(y), jnp.ravel(exact)), _explained)
"""R2 of a single output against the float model, over all its elements."""


def _powers(y: Any, exact: Any, target: Any) -> Any:
    del target
    return (
        jax.tree.map(lambda a: jnp.mean(a**2), exact),
        jax.tree.map(lambda a, b: jnp.mean((a - b) ** 2), y, exact),
    )


def _ratio(means: tuple[Any, Any]) -> Any:
    return jax.tree.map(lambda signal, noise: noise / signal, *means)


noise_to_signal = Score(_powers, _ratio)
"""Power of the error against the float model over the float model's power: of each output, or of each tensor that
`sweep(tensors=...)` names."""

snr = Score(_powers, lambda means: jax.tree.map(lambda ratio: -10 * jnp.log10(ratio), _ratio(means)))
"""`noise_to_signal` as a signal-to-noise ratio in dB."""
