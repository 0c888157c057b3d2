"""Settings that all tests share."""

import gc

import jax
import pytest
from hypothesis import settings

from fheq.compiled import memory_maps

# Time limits say more about the machine than about the code; the same examples every time make failures reproducible.
settings.register_profile("fheq", deadline=None, derandomize=True)
settings.load_profile("fheq")

# Every function that jax compiles takes some of the 65,530 memory maps that Linux gives a process by default. At the limit,
# compilation stands still without an error.
MANY_MAPS = 10_000


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Drops what jax compiled once it takes much of what the process may map."""
    if memory_maps() > MANY_MAPS:
        jax.clear_caches()
        gc.collect()
