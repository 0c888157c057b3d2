"""Functions of models, compiled, of which the latest are kept."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import lru_cache, partial, wraps
from pathlib import Path
from typing import Any

import jax

KEPT = 32
MANY_MAPS = 20_000  # of the 65,530 that Linux gives a process by default; one function may take some thousands
_caches: list[Any] = []


def memory_maps() -> int:
    """How many memory maps this process has; 0 where the system keeps no such list, nor such a limit."""
    listed = Path("/proc/self/maps")
    return listed.read_bytes().count(b"\n") if listed.exists() else 0


def compiled_for(count: int, kept: int = KEPT) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`jax.jit` with the first arguments static, which lets go of what it compiled for the least recent of them.

    `jax.jit` itself keeps all of it, and a search, which tries hundreds of programs, would come to the end of the process's
    memory maps. Where few functions take many maps, all are let go of.

    Args:
        count: how many arguments are static; they are hashable.
        kept: for how many values of them compiled functions are kept.

    Returns:
        A decorator. What it makes has `compiled`, which gives the `jax.jit` of some values of the static arguments.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @lru_cache(maxsize=kept)
        def compiled(*static: Any) -> Callable[..., Any]:
            _make_room()
            return jax.jit(partial(function, *static))

        @wraps(function)
        def call(*args: Any) -> Any:
            return compiled(*args[:count])(*args[count:])

        call.compiled = compiled  # type: ignore[attr-defined]
        _caches.append(compiled)
        return call

    return decorate


def _make_room() -> None:
    if memory_maps() > MANY_MAPS:
        for cache in _caches:
            cache.cache_clear()
        gc.collect()
