"""Checks of options that callers give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from math import isfinite
from numbers import Integral, Real
from typing import Any, TypeGuard

import jax
import numpy as np

from fheq.errors import ArgumentError, FheqError, QuantizationError


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool | np.bool_)


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, or an array of one; True and False are not."""
    if isinstance(value, np.ndarray | jax.Array):
        return np.ndim(value) == 0 and is_number(value.item())
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_) and isfinite(value)


def check_whole(name: str, value: Any, least: int, error: type[FheqError] = QuantizationError) -> None:
    """Checks a number of things.

    Raises:
        FheqError: of the type given, where it is no whole number or below `least`.
    """
    if not is_whole(value) or value < least:
        raise error(f"{name} must be an integer of at least {least}, got {value!r}")


def check_chances(p_error: Any) -> None:
    """Checks a probability of failure from 0 to 1, an array of these, or these by name; tracers pass, as their values are
    not known.

    Raises:
        ArgumentError: it is no number, NaN, or outside of [0, 1].
    """
    for chance in p_error.values() if isinstance(p_error, Mapping) else [p_error]:
        if isinstance(chance, jax.core.Tracer):
            continue
        values = np.asarray(chance)
        if values.dtype.kind not in "biuf" and not jax.numpy.issubdtype(values.dtype, np.floating):
            raise ArgumentError(f"p_error must be a probability, got {chance!r}")
        if not np.all((values >= 0) & (values <= 1)):
            raise ArgumentError(f"p_error must be a probability from 0 to 1, got {chance!r}")


def check_key(key: Any) -> None:
    """Checks a key of `jax.random`.

    Raises:
        ArgumentError: it is something else.
    """
    try:
        jax.random.key_data(key)
    except TypeError as error:
        raise ArgumentError(f"key must be a key of jax.random, such as jax.random.key(0); got {key!r}") from error


def near(name: str, known: Iterable[str]) -> str:
    """Some of the known names, the most similar ones first, for a message on one that is not known."""
    names = sorted({*known} - {""})
    alike = get_close_matches(str(name), names, n=4)
    return ", ".join(map(repr, [*alike, *(n for n in names if n not in alike)][:8]))
