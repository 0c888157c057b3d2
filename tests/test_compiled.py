"""Compiled functions are kept for the latest models only."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from fheq.arrays import compiled


@pytest.mark.parametrize(("many", "left"), [(10**9, 2), (0, 1)], ids=["room", "no room"])
def test_what_was_compiled_is_let_go_of(many, left, monkeypatch):
    monkeypatch.setattr(compiled, "MANY_MAPS", many)
    monkeypatch.setattr(compiled, "_caches", [])
    traced = []

    @compiled.compiled_for(1, kept=2)
    def power(exponent, x):
        traced.append(exponent)  # Python runs it while it is compiled, and not again
        return x**exponent

    for exponent in (1, 2, 3, 3):
        assert power(exponent, jnp.float32(2)) == 2**exponent
    assert traced == [1, 2, 3]
    assert power.compiled.cache_info().currsize == left
    assert power(1, jnp.float32(2)) == 2 and traced == [1, 2, 3, 1]
