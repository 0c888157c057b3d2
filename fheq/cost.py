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

import numpy as np

from fheq.encryption.decryption import removed_bits
from fheq.encryption.noise import Noise, failure_probabilities, noise_of
from fheq.optimizer.leveled import Leveled
from fheq.optimizer.parameters import Solution
from fheq.optimizer.partition import Partitioned
from fheq.optimizer.solve import Solved, solve
from fheq.program import IntProgram, Lookup


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
        noise: standard deviation of the noise at the table's input, in cells (what `fheq.noise` gives).
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
    noise: float


@dataclass(frozen=True)
class Output:
    """A program's output.

    Args:
        bits: width of its integers, without low bits that are rounded away.
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
        noise: of these parameters, for `fheq.simulate`.
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
    noise: Noise

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
        if not np.isfinite(self.complexity):
            remedy = "round accumulators, approximately where they are wide, lower n_bits or raise p_error"
            operations = f"no parameters hold that beside tables at p_error {self.p_error:.3g}: {remedy}"
        text.append(f"widest integer {self.max_bits} bits; {operations}")
        return "\n".join(text)


def cost(program: IntProgram, p_error: float | None = None, global_p_error: float | None = None) -> Report:
    """Predicts what a program will cost, without compiling it.

    Args:
        program: what `lower` gives.
        p_error: probability that one table lookup fails; 1e-5 when neither probability is given, as for `compile`.
        global_p_error: probability that any table lookup of one run fails.

    Raises:
        ArgumentError: (a ValueError) a probability outside of (0, 1), or both probabilities.
    """
    solved = solve(program, *failure_probabilities(p_error, global_p_error))
    deviations = noise_of(program, solved)
    rows = tuple(_row(program, solved, deviations, lookup) for lookup in program.lookups)
    wraps = tuple(Wrap(name, a.low, a.high, a.bits) for name, a in program.accumulators.items() if a.can_wrap)
    made = {lookup.out for lookup in program.lookups}
    removed = zip(program.outputs, removed_bits(program))
    outputs = tuple(Output(e.name, program.values[e.value].bits - lsbs, e.value not in made) for e, lsbs in removed)
    boots, total, widest = solved.parts.problem.boots, solved.solution.total, max(solved.flat.widths.values())
    return Report(
        rows,
        outputs,
        wraps,
        solved.p_error,
        solved.failures()[1],
        sum(boots),
        _by_width(solved.flat),
        total,
        widest,
        deviations,
    )


def _by_width(flat: Leveled) -> dict[int, int]:
    counts: dict[int, int] = {}
    for node in flat.nodes:
        if node.kind == "table":
            width = max(node.reads, 1)
            counts[width] = counts.get(width, 0) + node.size
    return dict(sorted(counts.items()))


def _row(program: IntProgram, solved: Solved, deviations: Noise, lookup: Lookup) -> Row:
    flat = solved.flat
    main = flat.tables[lookup.out]
    tables = [*flat.extras[lookup.out], *([main] if main >= 0 else [])]
    total = sum(flat.nodes[i].size * _each(solved.parts, solved.solution, i) for i in tables)
    value = program.values[lookup.args[0]]
    lookups = max(int(np.prod(value.shape)), int(np.prod(program.values[lookup.out].shape)))
    known = program.accumulators.get(lookup.accumulator)
    rounding = "" if not lookup.lsbs else "approximate" if known and known.approximate else "exact"
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
        deviations.tables.get(lookup.args[0], 0.0),
    )


def _each(parts: Partitioned, solution: Solution, table: int) -> float:
    """Cost of one application of a table node."""
    one = solution.boot[parts.own[table]] + solution.switch.get(parts.switch[table], np.inf)
    return one + (solution.conversion[parts.conversion[table]] if table in parts.conversion and solution.conversion else 0.0)


def _short(name: str, width: int = 22) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines)]
    left = 2  # the names
    return [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    ]
