"""Functions of models, compiled, of which the latest are kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import Any

import jax

KEPT = 32


def compiled_for(count: int, kept: int = KEPT) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`jax.jit` with the first arguments static, which lets go of what it compiled for the least recent of them.

    `jax.jit` itself keeps all of it, and every compiled function takes some hundreds of the 65,530 memory maps that Linux
    gives a process by default: a search, which tries hundreds of programs, would come to the end of them.

    Args:
        count: how many arguments are static; they are hashable.
        kept: for how many values of them compiled functions are kept.

    Returns:
        A decorator. What it makes has `compiled`, which gives the `jax.jit` of some values of the static arguments.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @lru_cache(maxsize=kept)
        def compiled(*static: Any) -> Callable[..., Any]:
            return jax.jit(partial(function, *static))

        @wraps(function)
        def call(*args: Any) -> Any:
            return compiled(*args[:count])(*args[count:])

        call.compiled = compiled  # type: ignore[attr-defined]
        return call

    return decorate
