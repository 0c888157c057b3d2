"""The TFHE parameters of a program: one solution that `fheq.cost` prices and `fheq.noise` reads."""

from __future__ import annotations

from dataclasses import dataclass
from math import log1p

import numpy as np

from fheq.optimizer import crt, noise
from fheq.optimizer.leveled import Leveled, leveled
from fheq.optimizer.parameters import Solution, search, variances
from fheq.optimizer.partition import Partitioned, partition
from fheq.program import IntProgram

GLOBAL_TRIES = 10


@dataclass(frozen=True, eq=False)
class Solved:
    """A program as the optimizer sees it, with the cheapest parameters.

    Args:
        p_error: probability that one table fails, that the parameters are chosen for.
    """

    flat: Leveled
    parts: Partitioned
    p_error: float
    solution: Solution

    @property
    def variances(self) -> list[tuple[float, float]] | None:
        """Noise at each of the problem's constraints, of leveled operations and of the table's own switches; None where the
        parameters are not native."""
        return None if self.solution.point is None else variances(self.parts.problem, self.solution)

    def failures(self) -> tuple[float, float]:
        """The largest probability that one element fails, and that any of a run does."""
        found = self.variances
        if found is None:
            count = max(sum(self.parts.problem.boots), 1)
            finite = np.isfinite(self.solution.total)
            return (self.p_error, float(-np.expm1(count * log1p(-self.p_error)))) if finite else (1.0, 1.0)
        kappa, worst, log_success = noise.quantile(self.p_error), 0.0, 0.0
        for c, variance in zip(self.parts.problem.constraints, found):
            p = noise.failure(sum(variance), noise.variance_bound(c.bits, kappa), kappa)
            worst = max(worst, p)
            log_success += c.count * log1p(-p) if p < 1 else -np.inf
        return worst, float(-np.expm1(log_success))


def solve(program: IntProgram, p_error: float | None, global_p_error: float | None) -> Solved:
    """The cheapest parameters of a program for one of two probabilities, the other being None."""
    flat = leveled(program)
    parts = partition(flat)
    if global_p_error is not None:
        return _globally(flat, parts, global_p_error)
    assert p_error is not None
    return _solved(flat, parts, p_error)


def _solved(flat: Leveled, parts: Partitioned, p_error: float) -> Solved:
    found = search(parts.problem, noise.quantile(p_error))
    if not np.isfinite(found.total) and crt.applies(flat):
        found = crt.solution(flat, parts, p_error)
    return Solved(flat, parts, p_error, found)


def _globally(flat: Leveled, parts: Partitioned, wanted: float) -> Solved:
    """The p_error that keeps a run's failures within `wanted`, as concrete looks for it.

    Source: getV1ParameterGlobalPError of `compilers/concrete-compiler/compiler/lib/Support/V0Parameters.cpp`.
    """
    p_error = wanted
    solved = _solved(flat, parts, p_error)
    for _ in range(GLOBAL_TRIES - 1):
        one, all_ = solved.failures()
        if all_ <= wanted or not np.isfinite(solved.solution.total):
            break
        ratio = log1p(-one) / log1p(-all_) if all_ < 1 else 0.0
        surrogate = -float(np.expm1(log1p(-wanted) * ratio))
        p_error = surrogate if 0 < surrogate < 1 else p_error * (one / all_ if one < 0.1 else 0.1)
        solved = _solved(flat, parts, p_error)
    return solved
