"""The noise of encrypted runs, from the TFHE parameters that a program gets.

A ciphertext holds a message plus Gaussian noise. A table of P bits reads the message to the nearest of 2^P cells, so noise
of a few tenths of a cell sends values near a cell's end to the neighbour. Exact values lie at the centres of cells; those of
an approximately rounded accumulator lie anywhere, for its low bits are not removed before the table reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import jax
import numpy as np

from fheq.arguments import is_number
from fheq.errors import ArgumentError, CompileError
from fheq.optimizer.noise import quantile
from fheq.optimizer.solve import Solved, solve
from fheq.program import IntProgram

DEFAULT_P_ERROR = 1e-5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Noise:
    """Standard deviations of noise: a pytree, so that other parameters do not compile a simulation anew.

    Args:
        tables: at the input of the tables that read a value, in cells, by the value's name. At 1 / (2 kappa) cells, kappa
            being the two-sided quantile of p_error, a value at a cell's centre leaves it with probability p_error.
        roundings: of a rounded value, by its name, at each table that removes one of its bits (cells are halves of the
            torus), lowest bit first; or at the identity by which anything but a table reads an approximately rounded one.
        outputs: at the decryption of each output, in integers (of an approximately rounded one in cells).
        table_shares, rounding_shares: the part of the variances at tables that leveled operations make. Deviations are of a
            value's noisiest element; this part is smaller for elements that add up less (see `fheq.encryption.norms`). All
            of the outputs' noise is of this part.
    """

    tables: Mapping[str, float]
    roundings: Mapping[str, tuple[float, ...]]
    outputs: tuple[float, ...]
    table_shares: Mapping[str, float]
    rounding_shares: Mapping[str, tuple[float, ...]]


def noise(program: IntProgram, p_error: float | None = None, global_p_error: float | None = None) -> Noise:
    """The noise of the parameters that a program gets; `fheq.cost` finds the same ones, its report has them as `noise`.

    Args:
        program: what `lower` gives.
        p_error: probability that one table lookup fails; 1e-5 when neither probability is given, as for `compile`.
        global_p_error: probability that any table lookup of one run fails.

    Raises:
        CompileError: no secure parameters are precise enough.
        ArgumentError: (a ValueError) a probability outside of (0, 1), or both probabilities.
    """
    solved = solve(program, *failure_probabilities(p_error, global_p_error))
    if not np.isfinite(solved.solution.total):
        widest = max((t.bits for t in program.lookups), default=0)
        raise CompileError(
            f"no secure parameters are precise enough for p_error {solved.p_error:.3g} (the widest table reads {widest} "
            "bits): lower n_bits, round accumulators or allow a larger p_error"
        )
    return noise_of(program, solved)


def noise_of(program: IntProgram, solved: Solved) -> Noise:
    """The noise of parameters found; infinite where there are none, and at its bound where they are not native."""
    flat, parts = solved.flat, solved.parts
    found = solved.variances
    bound = 1 / (2 * quantile(solved.p_error)) if np.isfinite(solved.solution.total) else np.inf
    bits = [c.bits for c in parts.problem.constraints]
    cells = [bound if found is None else sqrt(sum(found[i])) * 2.0 ** (b + 1) for i, b in enumerate(bits)]
    shares = [0.0] * len(cells) if found is None else [part / max(part + own, 1e-300) for part, own in found]
    read = [(t.args[0], flat.tables[t.out]) for t in program.lookups if flat.tables[t.out] >= 0]
    (tables, roundings), (table_shares, rounding_shares) = (
        ({name: at[i] for name, i in read}, {name: tuple(at[i] for i in nodes) for name, nodes in flat.roundings.items()})
        for at in (dict(zip(parts.own, values)) for values in (cells, shares))
    )
    return Noise(tables, roundings, tuple(cells[len(parts.own) :]), table_shares, rounding_shares)


def failure_probabilities(p_error: float | None, global_p_error: float | None) -> tuple[float | None, float | None]:
    """The two probabilities as asked for, one of them None; `DEFAULT_P_ERROR` where neither was.

    Raises:
        ArgumentError: (a ValueError) a probability outside of (0, 1), or both probabilities.
    """
    if p_error is not None and global_p_error is not None:
        raise ArgumentError("give either p_error or global_p_error")
    for name, value in (("p_error", p_error), ("global_p_error", global_p_error)):
        if value is not None and not (is_number(value) and 0 < value < 1):
            raise ArgumentError(f"{name} must be between 0 and 1, got {value!r}")
    return (DEFAULT_P_ERROR if global_p_error is None and p_error is None else p_error), global_p_error
