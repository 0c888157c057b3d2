"""Scores and costs of quantizations, on samples that nothing was fitted to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.batching import check_arrays, check_targets, join, split
from fheq.calibrate import Stats
from fheq.cost import cost
from fheq.encryption.table_noise import table_noise
from fheq.errors import CompileError, DataError
from fheq.evaluate import as_tuple, evaluate, numbered, unwrap
from fheq.graph import Graph
from fheq.lower import lower
from fheq.program import IntProgram
from fheq.qparams import QParams
from fheq.scores import Score
from fheq.searching.front import Point
from fheq.searching.memory import Memory, fingerprint
from fheq.searching.space import Space
from fheq.simulate import simulate
from fheq.spec import Spec
from fheq.sweep import sweep
from fheq.sweeping.configurations import stack

ORDERS = 8  # in which outputs are scored, to tell whether the score is high for good ones


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


class Judge:
    """Splits the data, scores on one part and leaves the other for whatever is fitted.

    Args:
        inputs, targets, folder: as for `fheq.search`.
    """

    def __init__(
        self, graph: Graph, inputs: Any, key: Any, score: Score, targets: Any, space: Space, folder: Any, progress: Any
    ):
        self.graph, self.key, self.score, self.space, self.progress = graph, key, score, space, progress
        self.last: tuple[str, IntProgram] | None = None
        parts = check_arrays(graph.inputs, inputs)
        n = len(parts[0])
        order = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel()).permutation(n)
        held = round(n * space.held_out)
        if not 2 <= held < n:
            raise DataError(f"held_out={space.held_out} of {n} samples leaves less than 2 to score or none to fit to")
        check_targets(targets, n)
        whole = lambda at: tuple(join(port, part[at]) for port, part in zip(graph.inputs, parts))
        self.data, self.held = whole(order[held:]), whole(order[:held])
        self.targets = jax.tree.map(lambda leaf: np.asarray(leaf)[order[:held]], targets)
        floats = self.outputs(evaluate(graph, *self.held))
        self.exact = unwrap(floats)
        first = jax.tree.map(lambda leaf: leaf[0], (self.exact, self.targets))
        self.origin = () if score.origin is None else (score.origin(*first),)
        self.best = self.scored(floats)
        if not np.isfinite(self.best):
            raise DataError(f"the score of the float model is {self.best}; it must be a finite number")
        if not min(map(len, (space.tolerances, space.specs(), space.p_errors))):
            raise DataError("the space has no quantization to try: one of its axes is empty, or leaves nothing of another")
        others = [self.scored([np.roll(v, by, axis=0) for v in floats]) for by in range(1, min(ORDERS, held - 1) + 1)]
        if len(others) > 1 and min(others) - self.best > max(others) - min(others):
            raise DataError(
                f"the float model's score, {self.best:.4g}, is below {min(others):.4g}, which its outputs have in another "
                "order: a score must be high when outputs are good; give an error with its sign changed"
            )
        # One function for all sweeps, which are then compiled once for each graph.
        self.to_float = score.of(lambda y, _, t: (y, t[0], t[1]))
        # What is tried may be extended from one run to the next; what results depend on may not.
        options = (
            space.spec,
            (space.input_bits, space.output_bits),
            space.held_out,
            f"{self.best:.6g} {others}",  # which tell this score from others
        )
        parts_of_graph = graph.nodes, graph.inputs, graph.outputs, sorted(graph.pinned.items())
        arrays = (*graph.constants.values(), *parts, jax.random.key_data(key), *jax.tree.leaves(targets))
        self.memory = Memory(folder, fingerprint(parts_of_graph, options, *map(np.asarray, arrays)))

    def outputs(self, results: Any) -> list[np.ndarray]:
        """Outputs of the held-out samples, the samples leading."""
        ports = self.graph.outputs
        values = [numbered(port, result) for port, result in zip(ports, as_tuple(results))]
        return [np.asarray(split(p, v, "output")).reshape(-1, *p.shape) for p, v in zip(ports, values)]

    def measured(self, results: Any) -> float:
        """The score of the model's results."""
        return self.scored(self.outputs(results))

    def scored(self, outputs: list[np.ndarray]) -> float:
        measure = lambda *sample: self.score.measure(*sample, *self.origin)
        values = jax.vmap(measure)(unwrap(outputs), self.exact, self.targets)
        means = jax.tree.map(lambda v: jnp.mean(jnp.asarray(v, jnp.float32), axis=0), values)
        found = self.score.finish(means)
        if not jax.tree_util.all_leaves([found]) or np.shape(found) != ():
            raise DataError(
                f"a score must be one number, and this one is {jax.tree.map(np.shape, found)}: take a mean of them"
            )
        return float(found)

    def swept(self, candidates: list[Candidate]) -> list[Candidate]:
        """The candidates, of one graph, with their scores by one sweep and their predicted costs."""
        return [replace(c, complexity=self.predicted(c)) for c in self.scored_together(candidates)]

    def rivals(self, candidates: list[Candidate], known: list[Candidate]) -> list[Candidate]:
        """`swept` without those that others, or known ones, are sure to surpass, whose costs are not predicted.

        A quantization costs no less at a smaller p_error: what it costs at a larger one is a bound.
        """
        found = list(known)
        scored = self.scored_together(candidates)
        groups = [sorted(group, key=lambda c: -c.p_error) for _, group in groupby(scored, lambda c: c.name)]
        for group in sorted(groups, key=lambda group: -group[0].score):  # the best are those that surpass the most
            least = 0.0
            for c in group:
                if not any(k.complexity <= least and k.score >= c.score for k in found):
                    least = self.predicted(c)
                    found.append(replace(c, complexity=least))
        return found[len(known) :]

    def scored_together(self, candidates: list[Candidate]) -> list[Candidate]:
        """The candidates, of one graph, with their scores by one sweep."""
        if not candidates:
            return []
        names = "/".join(f"{c.name} at {c.p_error:g}" for c in candidates)

        def run() -> list[float]:
            graph, stacked = candidates[0].graph, stack(c.qparams for c in candidates)
            p_errors = jnp.asarray([c.p_error for c in candidates])
            found = sweep(
                graph,
                stacked,
                *self.held,
                scores={"score": self.to_float},
                targets=(self.exact, self.targets),
                noise=jax.jit(jax.vmap(partial(table_noise, graph)))(stacked, p_errors),
                progress=self.progress,
            )
            return np.asarray(found.scores["score"], np.float64).tolist()

        scores = self.memory.value(f"scores of {fingerprint(names)}", run)
        return [replace(c, score=s) for c, s in zip(candidates, scores)]

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
