"""Cost of tables wider than concrete's native ones, which it evaluates on several residues ("without padding" bootstraps).

concrete turns to these where no native parameters are precise enough, and only in programs that round nothing
(`fheq.compile` keeps it from narrowing what tables read, which it cannot do there). Every table then costs what the widest
does. The numbers are measured: `circuit.complexity` per table of what concrete 2.11 made of a table, a multiplication by the
2-norm and another table, for every width; a norm above 16 changed nothing. Between the measured norms and error
probabilities they are interpolated in the logarithms, beyond them taken as they are.
"""

from __future__ import annotations

from math import log, log2

import numpy as np

from fheq.optimizer.leveled import Leveled
from fheq.optimizer.parameters import Solution
from fheq.optimizer.partition import Partitioned

LOG2_NORMS = (0.0, 2.0, 4.0)
# 1e9 operations by width, error probability (from where tables of the width are not native on) and norm
MEASURED: dict[int, dict[float, tuple[float, float, float]]] = {
    11: {
        2.0**-30: (6.759, 11.895, 23.446),
        2.0**-40: (6.972, 12.272, 26.652),
    },
    12: {
        1e-2: (5.862, 9.645, 19.235),
        1e-3: (6.026, 10.144, 20.354),
        1e-5: (6.374, 12.127, 24.728),
        2.0**-40: (8.678, 17.141, 39.644),
    },
    13: {
        0.1: (5.892, 9.123, 16.977),
        1e-2: (6.202, 10.239, 20.566),
        1e-3: (6.374, 10.825, 21.796),
        1e-5: (6.768, 12.994, 26.373),
        2.0**-40: (9.309, 18.204, 42.421),
    },
    14: {
        0.5: (4.866, 7.619, 15.402),
        0.1: (6.860, 10.554, 19.973),
        1e-2: (7.130, 11.776, 23.654),
        1e-3: (7.336, 12.684, 25.778),
        1e-5: (7.891, 15.421, 30.217),
        2.0**-40: (10.799, 20.945, 49.091),
    },
    15: {
        0.5: (5.266, 8.036, 16.004),
        0.1: (6.736, 11.040, 21.850),
        1e-2: (7.145, 13.048, 26.289),
        1e-3: (8.524, 14.783, 29.114),
        1e-5: (8.950, 17.745, 40.453),
        2.0**-40: (12.722, 26.565, 66.364),
    },
    16: {
        0.85: (3.774, 6.236, 10.717),
        0.5: (5.566, 8.421, 17.499),
        0.1: (7.408, 12.112, 22.531),
        1e-2: (7.749, 13.104, 26.283),
        1e-3: (8.118, 15.325, 31.444),
        1e-5: (9.641, 16.861, 36.214),
        2.0**-40: (12.328, 26.193, 61.163),
    },
}


def applies(program: Leveled) -> bool:
    """Whether concrete could evaluate the program in this way: it has tables, and rounds nothing."""
    return any(node.kind == "table" for node in program.nodes) and not program.rounds


def table_cost(bits: int, norm: float, p_error: float) -> float:
    """Operations of one table in a program whose widest value has `bits` bits; infinite beyond what was measured."""
    rows = MEASURED.get(max(bits, min(MEASURED)))
    if rows is None:
        return np.inf
    logs = [np.interp(log2(max(norm, 1.0)), LOG2_NORMS, np.log(values)) for values in rows.values()]
    return float(1e9 * np.exp(np.interp(-log(p_error), [-log(p) for p in rows], logs)))


def solution(program: Leveled, parts: Partitioned, p_error: float) -> Solution:
    """The program's cost in this way; there are no parameters in it."""
    norm = max(np.sqrt(sum(c.fresh) + sum(c.boot)) for c in parts.problem.constraints)
    each = table_cost(max(program.widths.values()), float(norm), p_error)
    boots = parts.problem.boots
    switches = {pair: 0.0 for pair, _ in parts.problem.switches}
    conversions = {pair: 0.0 for pair, _ in parts.problem.conversions}
    return Solution(None, (each,) * len(boots), switches, conversions, {}, each * sum(boots))
