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

from fheq.errors import DataError

Array = Any
Measure = Callable[[Any, Any, Any], Any]


class Score(NamedTuple):
    """A score that is a function of averages, such as R2.

    measure: `measure(y, exact, target)` of one sample, any pytree of arrays; finish: the score from the averages over all
    samples; origin: None, or a function `origin(exact, target)` of one sample. The measure is then given, as a fourth
    argument, what it returns for one of the samples, the same one for all: averages of float32 hold the moments of
    deviations from it, where those of the values themselves cancel.
    """

    measure: Callable[..., Any]
    finish: Callable[[Any], Any] = lambda means: means
    origin: Callable[[Any, Any], Any] | None = None

    def of(self, arguments: Callable[[Any, Any, Any], tuple[Any, Any, Any]]) -> Score:
        """This score of other things: `arguments(y, exact, target)` are those that it is given in their place.

        `scores.r2.of(lambda y, exact, target: (y, exact, target["value"]))` takes one of several targets.
        """

        def measure(y: Any, exact: Any, target: Any, *origin: Any) -> Any:
            return self.measure(*arguments(y, exact, target), *origin)

        if self.origin is None:
            return Score(measure, self.finish)
        first = self.origin
        return Score(measure, self.finish, lambda exact, target: first(*arguments(exact, exact, target)[1:]))


def as_score(score: Score | Measure) -> Score:
    """A function of one sample as a `Score`; a `Score` as it is.

    Raises:
        DataError: it is neither.
    """
    if not callable(score) and not isinstance(score, Score):
        raise DataError(f"a score must be a function score(y, exact, target) of one sample, or a Score; got {score!r}")
    return score if isinstance(score, Score) else Score(score)


def accuracy(y: Array, exact: Array, target: Array) -> Array:
    """Share of samples whose largest output is the one that `target` (an index) names.

    Raises:
        DataError: the target is not one number.
    """
    del exact
    wanted = _wanted(target)
    if wanted.size != 1:
        raise DataError(f"a target of accuracy is the number of a class, and these hold {wanted.size}: give class numbers")
    return jnp.argmax(_single(y)) == wanted[0]


def agreement(y: Array, exact: Array, target: Array) -> Array:
    """Share of samples whose largest output is also that of the float model."""
    del target
    return jnp.argmax(_single(y)) == jnp.argmax(_single(exact))


def mse(y: Any, exact: Any, target: Any) -> Any:
    """Mean squared error against the float model, of each output."""
    del target
    return jax.tree.map(lambda a, b: jnp.mean((a - b) ** 2), y, exact)


def kl(y: Array, exact: Array, target: Array) -> Array:
    """Kullback-Leibler divergence of the softmax of the outputs from that of the float model, in nats."""
    del target
    p, q = (jax.nn.log_softmax(_single(v)) for v in (exact, y))
    return jnp.sum(jnp.exp(p) * (p - q))


def _single(v: Any) -> Array:
    """A single output as a vector.

    Raises:
        DataError: there are several.
    """
    if isinstance(v, tuple):
        raise DataError(f"this score is of one output and the model has {len(v)}: write a function of y[i] and exact[i]")
    return jnp.ravel(v)


def _wanted(target: Any) -> Array:
    """A target as a vector.

    Raises:
        DataError: there is none.
    """
    if target is None:
        raise DataError("this score compares with targets: pass targets=")
    return jnp.ravel(target)


class _Spread(NamedTuple):
    """Of an output: squared errors, what is wanted, from an origin on, and its squares, element by element."""

    error: Array
    wanted: Array
    squares: Array


def _vector(v: Array) -> Array:
    return jnp.ravel(v).astype(jnp.float32)


def _spread(y: Array, wanted: Array, origin: Array) -> _Spread:
    y, wanted = _vector(y), _vector(wanted)
    shifted = wanted - origin
    return _Spread((y - wanted) ** 2, shifted, shifted**2)


def _spread_of_each(y: Any, exact: Any, target: Any, origins: list[Array] | None = None) -> list[_Spread]:
    del target
    pairs = list(zip(jax.tree.leaves(y), jax.tree.leaves(exact)))
    return [_spread(*pair, origin) for pair, origin in zip(pairs, origins or [jnp.float32(0)] * len(pairs))]


def _explained(means: _Spread) -> Array:
    """R2; of an output that never varies 1 where it is met and 0 where it is not (as scikit-learn's `r2_score`)."""
    error, variance = jnp.sum(means.error), jnp.sum(means.squares - means.wanted**2)
    return jnp.where(variance > 0, 1 - error / jnp.where(variance > 0, variance, 1), jnp.where(error > 0, 0.0, 1.0))


def _explained_of_each(means: list[_Spread]) -> Array:
    return jnp.mean(jnp.stack([_explained(of_output) for of_output in means]))


r2 = Score(
    lambda y, exact, target, origin=0.0: _spread(_single(y), _wanted(target), origin),
    _explained,
    lambda exact, target: _vector(_wanted(target)),
)
"""R2 of a single output against the targets, over all its elements."""

r2_to_float = Score(
    _spread_of_each, _explained_of_each, lambda exact, target: [_vector(leaf) for leaf in jax.tree.leaves(exact)]
)
"""R2 against the float model, over all elements of an output; the mean of several outputs' (labels count as numbers)."""


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
