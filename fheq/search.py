"""The search for the cheapest circuits of an accuracy: pruning, bits, roundings and the probability of failures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fheq.arguments import check_key
from fheq.calibrate import calibrate
from fheq.display.progress import track
from fheq.errors import QuantizationError
from fheq.fit import fit, fit_each
from fheq.graph import Graph
from fheq.reconstruct import Training, tune
from fheq.rewriting.maxima import maxima_as_sums
from fheq.scores import Measure, Score, as_score, r2_to_float
from fheq.searching.allocate import Change, allocations, layer_changes, with_changes
from fheq.searching.front import Front, Point, pareto, spaced, undominated
from fheq.searching.judge import Candidate, Judge
from fheq.searching.space import Space, spec_name
from fheq.tuning.learned import Learned, with_learned
from fheq.tuning.prune import prune

Array = Any


def search(
    graph: Graph,
    *inputs: Array,
    key: Array,
    score: Score | Measure = r2_to_float,
    targets: Any = None,
    target: float | None = None,
    budget: float | None = None,
    space: Space | None = None,
    folder: str | os.PathLike[str] | None = None,
    compiled: bool = False,
    progress: bool | None = None,
) -> Front:
    """Finds quantizations of which none is both dearer and worse than another.

    The graph is pruned to several degrees; every degree, with its maxima as they are and as sums (`fheq.maxima_as_sums`), is
    fitted with a grid of bits, scored by one noisy sweep over bits and failure probabilities, and costed; the best are
    refined layer by layer; some are reconstructed; the finalists are scored by noisy simulation, on samples that nothing was
    fitted to.

    Args:
        graph: what `import_onnx` gives.
        inputs: calibration data, as for `evaluate`.
        key: a key of `jax.random`; the same key gives the same answer.
        score: what is to be high, as `fheq.sweep` takes it (see `fheq.scores`); by default R2 to the float model's outputs.
        targets: for the score, an array or pytree of arrays with the samples as the leading axis.
        target: a score to reach: reconstructions go where it is reached most cheaply.
        budget: operations not to exceed: nothing dearer is considered.
        space: what is tried.
        folder: where results are kept, so that a run that was stopped goes on there, or one of a larger space.
        compiled: whether to compile the points of the front, to confirm their costs (see `Front.compiled`).
        progress: whether to show progress bars; by default when standard error is a terminal.

    Raises:
        DataError: the data do not fit, the folder holds another search, or the score is no finite number or low when
            outputs are good.
        ArgumentError: (a ValueError) `key` is no key.
        QuantizationError: nothing runs, stays within the budget and has a finite score.
    """
    check_key(key)
    judge = Judge(graph, inputs, key, as_score(score), targets, space or Space(), folder, progress)
    found = _Search(judge, progress).front(target, budget)
    return found.compiled(progress=progress) if compiled else found


class _Search:
    def __init__(self, judge: Judge, progress: bool | None):
        self.judge, self.graph, self.space, self.progress = judge, judge.graph, judge.space, progress

    def front(self, target: float | None, budget: float | None) -> Front:
        most = np.finfo(np.float64).max if budget is None else budget  # what has no parameters costs infinitely much
        within = lambda c: c.complexity <= most and np.isfinite(c.score)
        pool = [c for c in self.grid() if within(c)]
        if not pool:
            limit = "runs with secure parameters" if budget is None else f"costs at most {budget:g} operations"
            raise QuantizationError(f"nothing that was tried {limit} and has a score that is a number")
        pool += [c for c in self.refined(pool, target) if within(c)]
        points = []
        finalists = {c.name: c for c in self.promising(pool, target, np.linspace(0, 1, self.space.finalists))}
        for candidate in track(list(finalists.values()), "confirming", self.progress):
            points += self.judge.points(candidate.name, candidate.graph, candidate.qparams)
        points += self.reconstructed(pool, target)
        return pareto([p for p in points if within(p)], self.judge.best)

    def grid(self) -> list[Candidate]:
        """Every pruning with every spec."""
        found: list[Candidate] = []
        seen: list[Graph] = []
        for tolerance in track(self.space.tolerances, "pruning and fitting", self.progress):
            graph = prune(self.graph, *self.judge.data, tolerance=tolerance) if tolerance else self.graph
            if graph in seen:
                continue
            seen.append(graph)
            found += self.fitted(f"pruned {tolerance:g}", graph, found)
            summed = maxima_as_sums(graph)
            if summed is not graph:
                found += self.fitted(f"pruned {tolerance:g}, maxima as sums", summed, found)
        return found

    def fitted(self, how: str, graph: Graph, known: list[Candidate]) -> list[Candidate]:
        """A graph with every spec, but what known candidates surpass."""
        stats = calibrate(graph, *self.judge.data)
        group, specs = [], self.space.specs()
        for spec, qparams in zip(specs, fit_each(graph, stats, specs), strict=True):
            name = f"{how}, {spec_name(spec)}"
            group += [Candidate(name, p, graph, stats, spec, qparams) for p in self.space.p_errors]
        return self.judge.rivals(group, known)

    def refined(self, pool: list[Candidate], target: float | None) -> list[Candidate]:
        """Bits chosen layer by layer around the most promising candidates."""
        found = []
        for base in self.promising(pool, target, between(BASES)):
            changes = layer_changes(base.graph, base.spec)
            if len({change.layer for change in changes}) > 1:
                found += self.allocated(base, changes)
        return found

    def allocated(self, base: Candidate, changes: list[Change]) -> list[Candidate]:
        """Candidates with several of the changes, from the effects of each alone."""
        single = self.judge.swept([base, *(self.changed(base, [change]) for change in changes)])
        losses = [single[0].score - c.score for c in single[1:]]
        costs = [c.complexity - single[0].complexity for c in single[1:]]
        return self.judge.swept([self.changed(base, chosen) for chosen in allocations(changes, losses, costs)])

    def changed(self, base: Candidate, changes: Sequence[Change]) -> Candidate:
        spec = with_changes(base.spec, changes)
        name = ", ".join([base.name, *(str(change) for change in changes)])
        return replace(base, name=name, spec=spec, qparams=fit(base.graph, base.stats, spec))

    def promising(self, pool: list[Candidate], target: float | None, places: np.ndarray) -> list[Candidate]:
        """Candidates on the front of the sweep: at these places of it (see `spaced`), or as many next to the target."""
        front = undominated([c.complexity for c in pool], [c.score for c in pool])
        if target is None:
            return [pool[front[i]] for i in spaced([pool[i].score for i in front], self.judge.best, places)]
        count = len(places)
        at = next((n for n, i in enumerate(front) if pool[i].score >= target), len(front) - 1)
        low = max(0, min(at - count // 2, len(front) - count))
        return [pool[i] for i in front[low : low + count]]

    def reconstructed(self, pool: list[Candidate], target: float | None) -> list[Point]:
        """Points of reconstructed candidates: spread over the front, or by bisection where the target is just reached."""
        count, found = self.space.reconstructions, []
        if target is None:
            chosen = self.promising(pool, None, between(count))
            graphs = [c.graph for c in pool]
            chosen.sort(key=lambda c: graphs.index(c.graph))  # those of one graph together: it is compiled once
            for candidate in track(chosen, "reconstructing", self.progress):
                found += self.tuned(candidate)
            return found
        front = undominated([c.complexity for c in pool], [c.score for c in pool])
        low, high = 0, len(front) - 1
        for _ in track(range(count), "reconstructing", self.progress):
            if low > high:
                break
            at = (low + high) // 2
            points = self.tuned(pool[front[at]])
            found += points
            low, high = (low, at - 1) if any(p.score >= target for p in points) else (at + 1, high)
        return found

    def tuned(self, candidate: Candidate) -> list[Point]:
        """The points of a candidate by every kind of reconstruction."""
        return [point for training in self.space.trainings for point in self.reconstruct(candidate, training)]

    def reconstruct(self, candidate: Candidate, training: Training) -> list[Point]:
        """The points of a reconstructed candidate."""
        how = "roundings" if training.adaptive else "weights"
        name = f"{candidate.name}, {how} reconstructed for p_error {candidate.p_error:g}"

        def run() -> dict[str, np.ndarray]:
            learned = tune(
                candidate.graph,
                candidate.qparams,
                *self.judge.data,
                key=self.judge.key,
                p_error=candidate.p_error,
                teacher=self.graph,
                training=training,
                progress=False,
            )
            return {f"{part}/{k}": v for part in PARTS for k, v in getattr(learned, part).items()}

        arrays = self.judge.memory.arrays(f"{name} by {training}", run)
        parts = [{k.split("/", 1)[1]: v for k, v in arrays.items() if k.split("/", 1)[0] == part} for part in PARTS]
        return self.judge.points(
            name, *with_learned(candidate.graph, candidate.qparams, Learned(*parts)), how=f" by {training}"
        )


PARTS = ("weights", "biases", "scales")
BASES = 2  # candidates around which bits are chosen layer by layer


def between(count: int) -> np.ndarray:
    """The middles of equal parts of [0, 1]."""
    return (np.arange(count) + 0.5) / max(count, 1)
