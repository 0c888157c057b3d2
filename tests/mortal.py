"""Tasks that die, hang or fail, and what is left of them: `python tests/mortal.py spawned` or `given`.

A process of its own runs them, in which a circuit ran before: concrete's runtime, which circuits start, must not make a
child's death the parent's.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor

import numpy as np
from build_models import model, node

import fheq
from fheq.many import run_all

DEADLY = {"abort": os.abort, "killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "hang": lambda: time.sleep(600)}
X = np.random.default_rng(0).normal(size=(80, 2)).astype(np.float32)
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


def small_program(n_bits: int) -> fheq.IntProgram:
    """Of one layer, two inputs and two outputs."""
    known = {"w": np.float32([[0.5, -1.0], [1.0, 0.75]])}
    nodes = [node("Gemm", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])]
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 2]}, ["y"], known))
    bits = {"op_inputs": n_bits, "op_weights": 2, "model_inputs": n_bits, "model_outputs": n_bits}
    return fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, X), bits))


def main(kind: str) -> None:
    """Runs the tasks in pools of our own, or in a pool that is given first."""
    fheq.compile(small_program(2), p_error=1e-3).simulate(X[:1])
    executor = ProcessPoolExecutor(2) if kind == "given" else None
    items = {**MORTAL, "b": "killed"} if kind == "given" else MORTAL
    assert_survived(dict(run_all(double, items, executor, workers=2, timeout=1.0)))


if __name__ == "__main__":
    main(*sys.argv[1:])
