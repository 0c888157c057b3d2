"""Pareto fronts: what a search found, cheapest first."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fheq.cost import Report
from fheq.display.console import number, text_table
from fheq.errors import QuantizationError
from fheq.graph import Graph
from fheq.many import compile_many
from fheq.program import IntProgram
from fheq.qparams import QParams

if TYPE_CHECKING:
    from matplotlib.axes import Axes

USEFUL = 0.25  # of what the worst score of a front misses of the best: who misses more is not looked at


@dataclass(frozen=True, eq=False)
class Point:
    """A quantization and what it gives.

    Args:
        graph: the graph that `qparams` belong to (pruned, with reconstructed weights).
        qparams: its quantizers.
        program: what `lower` makes of both.
        p_error: probability of a table's failure, for `compile`.
        score: of the noisy simulation at that probability on the held-out samples.
        report: what `cost` predicts at that probability.
        settings: how it was made, for people.
        compiled: operations as concrete compiled it; None where nobody asked, or where it could not be.
    """

    graph: Graph
    qparams: QParams
    program: IntProgram
    p_error: float
    score: float
    report: Report
    settings: str
    compiled: float | None = None

    @property
    def complexity(self) -> float:
        """Predicted operations of one encrypted run."""
        return self.report.complexity


@dataclass(frozen=True, eq=False)
class Front:
    """Points of which none is both dearer and worse than another, cheapest first.

    Args:
        float_score: score of the float model on the same samples.
    """

    points: tuple[Point, ...]
    float_score: float

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, at: int) -> Point:
        return self.points[at]

    def cheapest(self, target: float) -> Point:
        """The cheapest point with at least the score `target`.

        Raises:
            QuantizationError: there is none; the message says what the best one reaches.
        """
        for point in self.points:
            if point.score >= target:
                return point
        best = self.points[-1]
        raise QuantizationError(
            f"no point reaches the score {target:g}: the best has {best.score:g} at {number(best.complexity)} operations "
            f"(the float model has {self.float_score:g})"
        )

    def best(self, budget: float) -> Point:
        """The point with the best score of at most `budget` operations.

        Raises:
            QuantizationError: there is none; the message says what the cheapest one costs.
        """
        within = [point for point in self.points if point.complexity <= budget]
        if not within:
            raise QuantizationError(
                f"no point costs at most {budget:g} operations: the cheapest takes {number(self.points[0].complexity)}"
            )
        return within[-1]

    def compiled(self, executor: Executor | None = None, progress: bool | None = None) -> Front:
        """The front with what concrete says of every point's cost: each is compiled in a process of its own.

        Args:
            executor, progress: as for `fheq.compile_many`.
        """
        chances = {i: point.p_error for i, point in enumerate(self.points)}
        results = compile_many([p.program for p in self.points], p_error=chances, executor=executor, progress=progress)
        points = (replace(point, compiled=result.complexity) for point, result in zip(self.points, results))
        return replace(self, points=tuple(points))

    def __str__(self) -> str:
        known = any(p.compiled is not None for p in self.points)
        head = ["score", "operations", *(["compiled"] if known else []), "tables", "p_error", "settings"]
        return text_table(head, [self._row(p, known) for p in self.points])

    def _row(self, point: Point, known: bool) -> list[str]:
        compiled = ["-" if point.compiled is None else number(point.compiled)] if known else []
        tables = str(sum(row.lookups for row in point.report.rows))
        return [number(point.score), number(point.complexity), *compiled, tables, f"{point.p_error:g}", point.settings]

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draws score against predicted operations; needs matplotlib (`pip install "fheq[plot]"`)."""
        from matplotlib import pyplot

        axes = axes or pyplot.subplots()[1]
        axes.plot([p.complexity for p in self.points], [p.score for p in self.points], "o-", label="found")
        axes.axhline(self.float_score, linestyle=":", label="float")
        axes.set(xscale="log", xlabel="predicted operations", ylabel="score")
        axes.legend()
        return axes


def pareto(points: Sequence[Point], float_score: float) -> Front:
    """The front of some points."""
    kept = undominated([p.complexity for p in points], [p.score for p in points])
    return Front(tuple(points[i] for i in kept), float_score)


def undominated(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Numbers of the entries, cheapest first, that score higher than everything that costs no more."""
    found, best = [], -float("inf")
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if scores[i] > best:
            found.append(i)
            best = scores[i]
    return found


def spaced(scores: Sequence[float], best: float, places: np.ndarray) -> list[int]:
    """Positions on a front at even steps of the logarithm of what scores miss of the best, from a part of it on.

    What misses more than `USEFUL` of what the worst one misses is left out: of no use, however cheap.

    Args:
        scores: in ascending order.
        best: the score that nothing is expected to surpass.
        places: from 0, the worst that is of use, to 1, the last.
    """
    missing = np.maximum(best - np.asarray(scores), 0)
    least = np.min(missing[missing > 0], initial=np.inf)
    logs = np.log(np.maximum(missing, least / 2 if np.isfinite(least) else 1.0))
    first = int(np.argmax(logs <= np.log(USEFUL) + logs[0])) if len(logs) > 1 else 0
    wanted = logs[first] + (logs[-1] - logs[first]) * np.asarray(places)
    return sorted({first + int(np.argmin(np.abs(logs[first:] - at))) for at in wanted})
