"""What a program will cost, before it is compiled: widths, ranges, tables, bootstraps and concrete's complexity.

The complexity is that of the cheapest TFHE parameters that `fheq.optimizer.parameters` finds for the noise that
`fheq.optimizer.leveled` and `fheq.optimizer.partition` derive from the program; nothing in them is fitted to measurements.
Only where no native parameters exist, in programs without rounding whose tables read some 12 bits or more, does it come from
measured costs (`fheq.optimizer.crt`). Nothing needs concrete-python. `benchmarks/cost_model.py` compares with compiled
circuits. Clear inputs count as encrypted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import log1p

import numpy as np

from fheq.circuit import failure_probabilities
from fheq.optimizer import crt, noise
from fheq.optimizer.leveled import Leveled, leveled
from fheq.optimizer.parameters import Solution, search, variances
from fheq.optimizer.partition import Partitioned, partition
from fheq.program import IntProgram, Lookup

GLOBAL_TRIES = 10


@dataclass(frozen=True)
class Row:
    """One table of a program.

    Args:
        tensor: name of the quantized tensor that the table makes.
        accumulator: name of the accumulator that it reads, empty if it reads something else.
        worst_bits: width of the accumulator that no input in range can exceed.
        bits: width that sizes the circuit.
        low, high: what the accumulator can reach, as integers of the program; outside of [0, 2^bits) it wraps around.
        removed: low bits that rounding removes.
        rounding: "exact", "approximate", or empty.
        table_bits: width that the table reads.
        lookups: applications of the table, per sample.
        bootstraps: bootstraps for them; exact rounding adds one per removed bit and value.
        lookup_cost: predicted operations of one application with its share of the rounding.
        cost: predicted operations of all.
    """

    tensor: str
    accumulator: str
    worst_bits: int
    bits: int
    low: int
    high: int
    removed: int
    rounding: str
    table_bits: int
    lookups: int
    bootstraps: int
    lookup_cost: float
    cost: float


@dataclass(frozen=True)
class Output:
    """A program's output.

    Args:
        bits: width of its integers.
        leveled: whether it is decrypted without a table after the last linear operation.
    """

    name: str
    bits: int
    leveled: bool


@dataclass(frozen=True)
class Wrap:
    """An accumulator that some input in range drives out of its width: from [low, high] into [0, 2^bits)."""

    accumulator: str
    low: int
    high: int
    bits: int


@dataclass(frozen=True)
class Report:
    """What a program will cost.

    Args:
        p_error: probability that one table fails, that the parameters are chosen for.
        global_p_error: predicted probability that any table or output of one run fails by noise. For approximately rounded
            accumulators that is a neighbouring cell, not a wrong result.
        bootstraps_by_width: number of bootstraps by the width that they read; those of exact rounding read 1 bit.
        complexity: predicted operations of one run, in the unit of `Circuit.complexity`; infinite if no secure parameters
            are precise enough.
        max_bits: widest encrypted integer.
    """

    rows: tuple[Row, ...]
    outputs: tuple[Output, ...]
    wraps: tuple[Wrap, ...]
    p_error: float
    global_p_error: float
    bootstraps: int
    bootstraps_by_width: dict[int, int]
    complexity: float
    max_bits: int

    def as_dict(self) -> dict:
        """Plain data for JSON; an infinite cost becomes None."""
        finite = lambda pairs: {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in pairs}
        out = asdict(self, dict_factory=finite)
        out["bootstraps_by_width"] = {str(width): n for width, n in self.bootstraps_by_width.items()}
        return out

    def __str__(self) -> str:
        head = (
            "tensor",
            "accumulator",
            "worst",
            "bits",
            "range",
            "removed",
            "table",
            "lookups",
            "bootstraps",
            "M each",
            "M",
        )
        lines = [[*map(str, head)]]
        for r in self.rows:
            removed = f"{r.removed} {r.rounding}" if r.removed else "-"
            reach = f"{r.low}..{r.high}"
            costs = (f"{r.lookup_cost / 1e6:,.1f}", f"{r.cost / 1e6:,.1f}")
            cells = (_short(r.tensor), _short(r.accumulator) or "-", r.worst_bits, r.bits, reach, removed, r.table_bits)
            lines.append([*map(str, cells), f"{r.lookups:,}", f"{r.bootstraps:,}", *costs])
        text = _aligned(lines) if self.rows else ["no tables"]
        text += [f"output {o.name}: {o.bits} bits{', no table' if o.leveled else ''}" for o in self.outputs]
        text += [
            f"{w.accumulator} can wrap around: it reaches {w.low}..{w.high}, {w.bits} bits hold 0..{(1 << w.bits) - 1}"
            for w in self.wraps
        ]
        by_width = ", ".join(f"{n:,} of {width} bits" for width, n in self.bootstraps_by_width.items())
        text.append(f"{self.bootstraps:,} bootstraps" + (f": {by_width}" if by_width else ""))
        operations = f"{self.complexity / 1e6:,.1f} M operations predicted at p_error {self.p_error:.3g}"
        text.append(f"widest integer {self.max_bits} bits; {operations}")
        return "\n".join(text)


def cost(program: IntProgram, p_error: float | None = None, global_p_error: float | None = None) -> Report:
    """Predicts what a program will cost, without compiling it.

    Args:
        program: what `lower` gives.
        p_error: probability that one table lookup fails; 1e-5 when neither probability is given, as for `compile`.
        global_p_error: probability that any table lookup of one run fails.

    Raises:
        ValueError: a probability outside of (0, 1), or both probabilities.
    """
    p_error, global_p_error = failure_probabilities(p_error, global_p_error)
    flat = leveled(program)
    parts = partition(flat)
    if global_p_error is not None:
        wanted, solution = _globally(flat, parts, global_p_error)
    else:
        assert p_error is not None
        wanted, solution = p_error, _solve(flat, parts, p_error)
    rows = tuple(_row(program, flat, parts, solution, lookup) for lookup in program.lookups)
    wraps = tuple(Wrap(name, a.low, a.high, a.bits) for name, a in program.accumulators.items() if a.can_wrap)
    made = {lookup.out for lookup in program.lookups}
    outputs = tuple(Output(e.name, program.values[e.value].bits, e.value not in made) for e in program.outputs)
    return Report(
        rows,
        outputs,
        wraps,
        wanted,
        _failures(parts, solution, wanted)[1],
        sum(parts.problem.boots),
        _by_width(flat),
        solution.total,
        max(flat.widths.values()),
    )


def _by_width(flat: Leveled) -> dict[int, int]:
    counts: dict[int, int] = {}
    for node in flat.nodes:
        if node.kind == "table":
            width = max(node.reads, 1)
            counts[width] = counts.get(width, 0) + node.size
    return dict(sorted(counts.items()))


def _row(program: IntProgram, flat: Leveled, parts: Partitioned, solution: Solution, lookup: Lookup) -> Row:
    main = flat.tables[lookup.out]
    tables = [*flat.extras[lookup.out], *([main] if main >= 0 else [])]
    total = sum(flat.nodes[i].size * _each(parts, solution, i) for i in tables)
    value = program.values[lookup.args[0]]
    lookups = max(int(np.prod(value.shape)), int(np.prod(program.values[lookup.out].shape)))
    known = program.accumulators.get(lookup.accumulator)
    rounding = "" if known is None or not known.lsbs else "approximate" if known.approximate else "exact"
    return Row(
        lookup.origin,
        lookup.accumulator,
        known.worst_bits if known else value.bits,
        known.bits if known else value.bits,
        known.low if known else value.low,
        known.high if known else value.high,
        lookup.lsbs,
        rounding,
        flat.nodes[main].reads if main >= 0 else lookup.bits,
        lookups,
        sum(flat.nodes[i].size for i in tables),
        total / lookups,
        total,
    )


def _each(parts: Partitioned, solution: Solution, table: int) -> float:
    """Cost of one application of a table node."""
    one = solution.boot[parts.own[table]] + solution.switch.get(parts.switch[table], np.inf)
    return one + (solution.conversion[parts.conversion[table]] if table in parts.conversion and solution.conversion else 0.0)


def _failures(parts: Partitioned, solution: Solution, p_error: float) -> tuple[float, float]:
    """The largest probability that one element fails, and that any of a run does, for the parameters found."""
    if solution.point is None:
        count = max(sum(parts.problem.boots), 1)
        return (p_error, float(-np.expm1(count * log1p(-p_error)))) if np.isfinite(solution.total) else (1.0, 1.0)
    kappa, worst, log_success = noise.quantile(p_error), 0.0, 0.0
    for c, variance in zip(parts.problem.constraints, variances(parts.problem, solution)):
        p = noise.failure(variance, noise.variance_bound(c.bits, kappa), kappa)
        worst = max(worst, p)
        log_success += c.count * log1p(-p) if p < 1 else -np.inf
    return worst, float(-np.expm1(log_success))


def _solve(flat: Leveled, parts: Partitioned, p_error: float) -> Solution:
    found = search(parts.problem, noise.quantile(p_error))
    return crt.solution(flat, parts, p_error) if not np.isfinite(found.total) and crt.applies(flat) else found


def _globally(flat: Leveled, parts: Partitioned, wanted: float) -> tuple[float, Solution]:
    """The p_error that keeps a run's failures within `wanted`, as concrete looks for it.

    Source: getV1ParameterGlobalPError of `compilers/concrete-compiler/compiler/lib/Support/V0Parameters.cpp`.
    """
    p_error = wanted
    solution = _solve(flat, parts, p_error)
    for _ in range(GLOBAL_TRIES - 1):
        one, all_ = _failures(parts, solution, p_error)
        if all_ <= wanted or not np.isfinite(solution.total):
            break
        ratio = log1p(-one) / log1p(-all_) if all_ < 1 else 0.0
        surrogate = -float(np.expm1(log1p(-wanted) * ratio))
        p_error = surrogate if 0 < surrogate < 1 else p_error * (one / all_ if one < 0.1 else 0.1)
        solution = _solve(flat, parts, p_error)
    return p_error, solution


def _short(name: str, width: int = 22) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines)]
    left = 2  # the names
    return [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    ]
