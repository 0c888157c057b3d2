"""Tasks that die, hang or fail, and what is left of them: `python tests/mortal.py spawned` or `given`.

A process of its own runs them: a test runner's own workers, with all that other tests loaded, have died of their children.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor

from fheq.many import run_all

DEADLY = {"abort": os.abort, "killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "hang": lambda: time.sleep(600)}
MORTAL = {"a": 1, "b": "abort", "c": -3, "d": 2, "e": "hang", "f": 4}


def double(value: int | str) -> int:
    """A task that can die or fail."""
    if isinstance(value, str):
        DEADLY[value]()
    if value < 0:
        raise ValueError(f"{value} is negative")
    return 2 * value


def assert_survived(found: dict) -> None:
    """Every item has its own result."""
    assert {key: value for key, value in found.items() if isinstance(value, int)} == {"a": 2, "d": 4, "f": 8}
    assert isinstance(found["c"], ValueError) and isinstance(found["e"], TimeoutError)
    assert isinstance(found["b"], BrokenExecutor) and len(found) == 6


def main(kind: str) -> None:
    """Runs the tasks in pools of our own, or in a pool that is given first."""
    executor = ProcessPoolExecutor(2) if kind == "given" else None
    items = {**MORTAL, "b": "killed"} if kind == "given" else MORTAL
    assert_survived(dict(run_all(double, items, executor, workers=2, timeout=1.0)))


if __name__ == "__main__":
    main(*sys.argv[1:])
