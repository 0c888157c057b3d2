"""Error rates of noisy simulations and of encrypted runs: `python -m benchmarks.noise [--runs N]`.

Each run puts ROWS rows of random data through a tiny network; an output is wrong when it differs from exact simulation.
Prints the share of wrong outputs in fheq's simulation, in concrete's and in encrypted runs, each with its standard error.
NOISE.md has what it printed.
"""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np

import fheq
from benchmarks.cost_model import Case, mlp
from fheq.display.console import text_table

ROWS = 16
MORE = 50  # runs of fheq's simulation for one encrypted run
APPROXIMATE, EXACT = fheq.Rounding(3, approximate=True), fheq.Rounding(3)
CASES = [  # widths, rounding, that of outputs, p_error
    ((3, 2, 2), APPROXIMATE, None, 0.3),
    ((3, 2, 2), APPROXIMATE, None, 0.1),
    ((3, 2, 2), APPROXIMATE, APPROXIMATE, 0.7),
    ((3, 2, 2), APPROXIMATE, APPROXIMATE, 0.3),
    ((3, 6, 4, 2), APPROXIMATE, None, 0.3),
    ((3, 6, 4, 2), APPROXIMATE, None, 0.1),
    ((3, 2, 2), EXACT, None, 0.3),
    ((3, 2, 2), EXACT, None, 0.1),
    ((3, 2, 2), None, None, 0.7),
    ((3, 2, 2), None, None, 0.3),
]
HEAD = ("widths", "rounding", "outputs", "p_error", "fheq", "concrete", "encrypted", "s")


def case(widths: tuple[int, ...], rounding: fheq.Rounding | None, outputs: fheq.Rounding | None, p_error: float) -> Case:
    """A network of dense layers, with weights and inputs of 2 bits."""
    model = mlp(np.random.default_rng(0), widths, rows=(ROWS,))
    return Case("x".join(map(str, widths)), model, (ROWS, widths[0]), 2, rounding, outputs, p_error)


def rate(got: np.ndarray, exact: np.ndarray) -> str:
    """The share of wrong outputs in percent, with its standard error: outputs of a row fail together."""
    wrong = np.mean(got != exact, axis=-1)
    return f"{np.mean(wrong):.1%} ± {np.std(wrong) / np.sqrt(wrong.size):.1%}"


def measure(found: Case, runs: int) -> tuple[str, ...]:
    """A line of the table."""
    start = time.perf_counter()
    program = found.program()
    circuit = fheq.compile(program, p_error=found.p_error)
    x = np.random.default_rng(2).normal(size=(runs * MORE, *found.shape)).astype(np.float32)
    (q,) = program.quantize(x)
    exact = fheq.simulate(program, q)
    ours = rate(fheq.simulate(program, q, p_error=found.p_error, key=jax.random.key(0)), exact)
    few, right = q[:runs], exact[:runs]
    theirs = rate(circuit.simulate(few, quantized=True), right)
    encrypted = rate(circuit(few, quantized=True, progress=False), right)
    rounding = "none" if found.rounding is None else "approximate" if found.rounding.approximate else "exact"
    seconds = f"{time.perf_counter() - start:.0f}"
    outputs = "whole" if found.output_rounding is None else "rounded"
    return found.name, rounding, outputs, f"{found.p_error:g}", ours, theirs, encrypted, seconds


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=16)
    runs = parser.parse_args().runs
    lines = []
    for one in CASES:
        lines.append(measure(case(*one), runs))
        print(*lines[-1], flush=True)
    print(text_table(HEAD, lines))


if __name__ == "__main__":
    main()
