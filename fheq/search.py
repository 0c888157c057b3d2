"""The search for the cheapest circuits of an accuracy: pruning, bits, roundings and the probability of failures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.allocate import Change, allocations, layer_changes, with_changes
from fheq.batching import check_arrays, join, split
from fheq.calibrate import Stats, calibrate
from fheq.cost import cost
from fheq.errors import CompileError, DataError, QuantizationError
from fheq.evaluate import evaluate, numbered, unwrap
from fheq.fit import fit
from fheq.front import Front, Point, pareto, spaced, undominated
from fheq.graph import Graph
from fheq.lower import lower
from fheq.memory import Memory, fingerprint
from fheq.program import IntProgram
from fheq.progress import track
from fheq.prune import prune
from fheq.qparams import QParams
from fheq.reconstruct import Learned, Training, tune, with_learned
from fheq.scores import Measure, Score, as_score, r2_to_float
from fheq.simulate import simulate
from fheq.space import Space, spec_name
from fheq.spec import Spec
from fheq.sweep import stack, sweep
from fheq.table_noise import table_noise

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

    The graph is pruned to several degrees; every degree is fitted with a grid of bits, scored by one noisy sweep over bits
    and failure probabilities, and costed; the best are refined layer by layer; some are reconstructed; the finalists are
    scored by noisy simulation, on samples that nothing was fitted to.

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
        DataError: the data do not fit, or the folder holds another search.
        QuantizationError: nothing stays within the budget.
    """
    found = _Search(graph, inputs, key, as_score(score), targets, space or Space(), folder, progress).front(target, budget)
    return found.compiled(progress=progress) if compiled else found


@dataclass(frozen=True, eq=False)
class Candidate:
    """A fitted quantization under a failure probability, with what the sweep and the cost model say of it."""

    name: str
    p_error: float
    graph: Graph
    stats: Stats
    spec: Spec
    qparams: QParams
    score: float = 0.0
    complexity: float = 0.0


class _Search:
    def __init__(self, graph, inputs, key, score, targets, space, folder, progress):
        self.graph, self.key, self.score, self.space, self.progress = graph, key, score, space, progress
        self.last: tuple[str, IntProgram] | None = None
        parts = check_arrays(graph.inputs, inputs)
        n = len(parts[0])
        order = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel()).permutation(n)
        held = round(n * space.held_out)
        if not 0 < held < n:
            raise DataError(f"held_out={space.held_out} of {n} samples leaves none to fit to or none to score")
        whole = lambda at: tuple(join(port, part[at]) for port, part in zip(graph.inputs, parts))
        self.data, self.held = whole(order[held:]), whole(order[:held])
        self.targets = jax.tree.map(lambda leaf: np.asarray(leaf)[order[:held]], targets)
        floats = evaluate(graph, *self.held)
        self.exact = unwrap(self.outputs(floats))
        self.best = self.measured(floats)
        # What is tried may be extended from one run to the next; what results depend on may not.
        options = (
            space.spec,
            (space.input_bits, space.output_bits),
            space.held_out,
            getattr(score.measure, "__qualname__", ""),
        )
        arrays = (*graph.constants.values(), *parts, jax.random.key_data(key), *jax.tree.leaves(targets))
        self.memory = Memory(folder, fingerprint(graph.nodes, options, *map(np.asarray, arrays)))

    # Scores

    def outputs(self, results: Any) -> list[np.ndarray]:
        """Outputs of the held-out samples, the samples leading."""
        ports = self.graph.outputs
        values = [numbered(port, result) for port, result in zip(ports, as_tuple(results))]
        return [np.asarray(split(p, v, "output")).reshape(-1, *p.shape) for p, v in zip(ports, values)]

    def measured(self, results: Any) -> float:
        """The score of outputs."""
        values = jax.vmap(self.score.measure)(unwrap(self.outputs(results)), self.exact, self.targets)
        means = jax.tree.map(lambda v: jnp.mean(jnp.asarray(v, jnp.float32), axis=0), values)
        return float(self.score.finish(means))

    def swept(self, candidates: list[Candidate]) -> list[Candidate]:
        """The candidates, of one graph, with their scores by one sweep and their predicted costs."""
        exact = Score(lambda y, _, t: self.score.measure(y, t[0], t[1]), self.score.finish)
        names = "/".join(f"{c.name} at {c.p_error:g}" for c in candidates)

        def run() -> list[float]:
            graph, stacked = candidates[0].graph, stack(c.qparams for c in candidates)
            p_errors = jnp.asarray([c.p_error for c in candidates])
            found = sweep(
                graph,
                stacked,
                *self.held,
                scores={"score": exact},
                targets=(self.exact, self.targets),
                noise=jax.jit(jax.vmap(partial(table_noise, graph)))(stacked, p_errors),
                progress=self.progress,
            )
            return np.asarray(found.scores["score"], np.float64).tolist()

        scores = self.memory.value(f"scores of {fingerprint(names)}", run)
        return [replace(c, score=s, complexity=self.predicted(c)) for c, s in zip(candidates, scores)]

    def predicted(self, candidate: Candidate) -> float:
        """Operations; infinite where no parameters are found."""

        def run() -> float:
            try:
                return float(cost(self.lowered(candidate), p_error=candidate.p_error).complexity)
            except CompileError:
                return float("inf")

        return self.memory.value(f"cost of {candidate.name} at {candidate.p_error:g}", run)

    def lowered(self, candidate: Candidate) -> IntProgram:
        """The program of a candidate; those of one quantization follow each other."""
        if self.last is None or self.last[0] != candidate.name:
            self.last = candidate.name, lower(candidate.graph, candidate.qparams)
        return self.last[1]

    # Stages

    def front(self, target: float | None, budget: float | None) -> Front:
        within = lambda c: budget is None or c.complexity <= budget
        pool = [c for c in self.grid() if within(c)]
        if not pool:
            raise QuantizationError(f"nothing that was tried costs at most {budget:g} operations")
        pool += [c for c in self.refined(pool, target) if within(c)]
        points = []
        finalists = {c.name: c for c in self.promising(pool, target, np.linspace(0, 1, self.space.finalists))}
        for candidate in track(list(finalists.values()), "confirming", self.progress):
            points += self.points(candidate.name, candidate.graph, candidate.qparams)
        points += self.reconstructed(pool, target)
        if budget is not None:
            points = [p for p in points if p.complexity <= budget]
        return pareto(points, self.best)

    def grid(self) -> list[Candidate]:
        """Every pruning with every spec."""
        found: list[Candidate] = []
        seen: list[Graph] = []
        for tolerance in track(self.space.tolerances, "pruning and fitting", self.progress):
            graph = prune(self.graph, *self.data, tolerance=tolerance) if tolerance else self.graph
            if graph in seen:
                continue
            seen.append(graph)
            stats = calibrate(graph, *self.data)
            group = []
            for spec in self.space.specs():
                name, qparams = f"pruned {tolerance:g}, {spec_name(spec)}", fit(graph, stats, spec)
                group += [Candidate(name, p, graph, stats, spec, qparams) for p in self.space.p_errors]
            found += self.swept(group)
        return found

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
        single = self.swept([base, *(self.changed(base, [change]) for change in changes)])
        losses = [single[0].score - c.score for c in single[1:]]
        costs = [c.complexity - single[0].complexity for c in single[1:]]
        return self.swept([self.changed(base, chosen) for chosen in allocations(changes, losses, costs)])

    def changed(self, base: Candidate, changes: Sequence[Change]) -> Candidate:
        spec = with_changes(base.spec, changes)
        name = ", ".join([base.name, *(str(change) for change in changes)])
        return replace(base, name=name, spec=spec, qparams=fit(base.graph, base.stats, spec))

    def promising(self, pool: list[Candidate], target: float | None, places: np.ndarray) -> list[Candidate]:
        """Candidates on the front of the sweep: at these places of it (see `spaced`), or as many next to the target."""
        front = undominated([c.complexity for c in pool], [c.score for c in pool])
        if target is None:
            return [pool[front[i]] for i in spaced([pool[i].score for i in front], self.best, places)]
        count = len(places)
        at = next((n for n, i in enumerate(front) if pool[i].score >= target), len(front) - 1)
        low = max(0, min(at - count // 2, len(front) - count))
        return [pool[i] for i in front[low : low + count]]

    def points(self, name: str, graph: Graph, qparams: QParams, how: str = "") -> list[Point]:
        """A quantization under every failure probability; `how` tells those of one name apart."""
        program = lower(graph, qparams)
        integers = program.quantize(*self.held)
        found = []
        for p_error in self.space.p_errors:
            try:
                report = cost(program, p_error=p_error)
            except CompileError:
                continue
            noisy = lambda noise=report.noise: simulate(program, *integers, noise=noise, key=self.key)
            run = lambda noisy=noisy: self.measured(unwrap(list(program.dequantize(*as_tuple(noisy())))))
            score = self.memory.value(f"noisy score of {name} at {p_error:g}{how}", run)
            found.append(Point(graph, qparams, program, p_error, score, report, name))
        return found

    def reconstructed(self, pool: list[Candidate], target: float | None) -> list[Point]:
        """Points of reconstructed candidates: spread over the front, or by bisection where the target is just reached."""
        count, found = self.space.reconstructions, []
        if target is None:
            for candidate in track(self.promising(pool, None, between(count)), "reconstructing", self.progress):
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
                *self.data,
                key=self.key,
                p_error=candidate.p_error,
                teacher=self.graph,
                training=training,
                progress=False,
            )
            return {f"{part}/{k}": v for part in PARTS for k, v in getattr(learned, part).items()}

        arrays = self.memory.arrays(f"{name} by {training}", run)
        parts = [{k.split("/", 1)[1]: v for k, v in arrays.items() if k.split("/", 1)[0] == part} for part in PARTS]
        return self.points(name, *with_learned(candidate.graph, candidate.qparams, Learned(*parts)), how=f" by {training}")


PARTS = ("weights", "biases", "scales")
BASES = 2  # candidates around which bits are chosen layer by layer


def as_tuple(results: Any) -> tuple[Any, ...]:
    """Several outputs as they are, one in a tuple."""
    return results if isinstance(results, tuple) else (results,)


def between(count: int) -> np.ndarray:
    """The middles of equal parts of [0, 1]."""
    return (np.arange(count) + 0.5) / max(count, 1)
