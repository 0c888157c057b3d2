"""Settings that all tests share."""

import gc

import jax
import numpy as np
import pytest
from build_models import SOURCES
from hypothesis import settings

from fheq.arrays.compiled import memory_maps

# Time limits say more about the machine than about the code; the same examples every time make failures reproducible.
settings.register_profile("fheq", deadline=None, derandomize=True)
settings.load_profile("fheq")

# Every function that jax compiles takes some of the 65,530 memory maps that Linux gives a process by default. At the limit,
# compilation stands still without an error.
MANY_MAPS = 10_000


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every test draws from the start, whichever ran before it."""
    SOURCES.clear()
    module = item.getparent(pytest.Module)
    if module is not None and isinstance(getattr(module.obj, "RNG", None), np.random.Generator):
        module.obj.RNG = np.random.default_rng(0)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Drops what jax compiled once it takes much of what the process may map."""
    if memory_maps() > MANY_MAPS:
        jax.clear_caches()
        gc.collect()
