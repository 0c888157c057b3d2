"""Settings that all tests share."""

import gc
from pathlib import Path

import jax
import pytest
from hypothesis import settings

# Time limits say more about the machine than about the code; the same examples every time make failures reproducible.
settings.register_profile("fheq", deadline=None, derandomize=True)
settings.load_profile("fheq")

# Every function that jax compiles takes some of the 65,530 memory maps that Linux gives a process by default. At the limit,
# compilation stands still without an error.
MANY_MAPS = 10_000
MAPS = Path("/proc/self/maps")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Drops what jax compiled once it takes much of what the process may map."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()
