"""Search for the cheapest TFHE parameters of a circuit, as concrete's multi-parameter optimizer makes it.

Every partition p has a bootstrap (k, N, n, levels); pairs of partitions that meet have a key switch from the large key of
one to the small key of the other, or a conversion between large keys. The sum of all costs is minimized subject to

    sum_p fresh_p V_fresh + sum_p boot_p V_boot + sum_pq conv_pq V_conv + V_keyswitch + V_modulus_switch <= bound

for every table and output. Source: `compilers/concrete-optimizer/concrete-optimizer/src/optimization/dag/multi_parameters/
optimize/mod.rs`, a descent over partitions, from the last one to the first. It starts with none decided: those that still
are open are taken to have the candidate's keys, and bootstraps at once as cheap and as precise as there are. Here (k, N)
are chosen with n in steps of 16 before n is searched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from fheq.optimizer import noise
from fheq.optimizer.partition import Pair, Problem
from fheq.optimizer.points import Points, chosen

STEP = 16
SHARES = (0.5, 0.25, 0.1, 0.03, 0.005)  # of a noise bound, that a conversion may use up
DESCENTS = 6
PROMISING = 4  # pairs (k, N) for which n is searched
PROBED = 17  # of so many candidates one is looked at first; prime, so that all levels are among them


@dataclass(frozen=True, eq=False)
class Solution:
    """What a search found; costs are infinite where nothing is secure and precise enough.

    Args:
        point: the parameters, one element per array; None if there are none.
        boot, switch, conversion: cost of one operation, by partition or pair.
        levels, switch_variance: of key switches, by pair.
    """

    point: Points | None
    boot: tuple[float, ...]
    switch: Mapping[Pair, float]
    conversion: Mapping[Pair, float]
    switch_variance: Mapping[Pair, float]
    total: float


def search(problem: Problem, kappa: float) -> Solution:
    """The cheapest parameters found.

    Args:
        kappa: deviations of noise that a message's cell must hold.
    """
    return _search(problem.undominated(), kappa)


@lru_cache(maxsize=1024)
def _search(problem: Problem, kappa: float) -> Solution:
    if not problem.switches:
        return _without_tables(problem, kappa)
    found = _Search(problem, kappa)
    point = found.descend()
    return Solution(None, (np.inf,) * len(problem.boots), {}, {}, {}, np.inf) if point is None else found.solution(point)


def _without_tables(problem: Problem, kappa: float) -> Solution:
    """The smallest key of plain ciphertexts; concrete counts its dimension as the cost."""
    dimension = noise.FREE_DIMENSIONS
    secure = noise.secure_variance(dimension)
    holds = [sum(c.fresh) * secure <= noise.variance_bound(c.bits, kappa) for c in problem.constraints]
    fits = np.logical_and.reduce(holds)
    total = float(dimension[fits.argmax()]) if np.any(fits) else np.inf
    return Solution(None, (0.0,), {}, {}, {}, total)


class _Search:
    """A problem with its tables: variances and costs of every operation."""

    def __init__(self, problem: Problem, kappa: float):
        self.problem, self.kappa = problem, kappa
        self.bounds = [noise.variance_bound(c.bits, kappa) for c in problem.constraints]
        self.glwe = noise.glwe_table()
        self.small = noise.small_keyswitch_table()
        self.large = noise.large_keyswitch_table()
        self.levels = noise.keyswitch_levels()
        self.open: frozenset[int] = frozenset()  # partitions that are still to be decided

    # Cost of candidates

    def boot_cost(self, points: Points, p: int) -> np.ndarray:
        level = 0 if p in self.open else points.level[p]
        return points.small[p] * self.glwe.cost[points.glwe[p], level]

    def boot_variance(self, points: Points, p: int) -> np.ndarray:
        """Noise of a bootstrap."""
        g = points.glwe[p]
        each = self.glwe.variance[g].min(axis=1) if p in self.open else self.glwe.variance[g, points.level[p]]
        return points.small[p] * each

    def conversion(self, points: Points, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        """Variance and cost of a conversion between large keys; nothing if they are of one kind."""
        if not self.open.isdisjoint(pair):
            return np.zeros(1), np.zeros(1)
        source, target = (points.glwe[p] for p in pair)
        level = points.conversion[pair]
        variance = self.glwe.dimension[source] * self.large[target, level]
        cost = noise.keyswitch_cost(self.glwe.dimension[source], self.glwe.dimension[target], self.levels[level])
        return np.where(source == target, 0.0, variance), np.where(source == target, 0.0, cost)

    def modulus_switches(self, points: Points) -> list[np.ndarray]:
        """Variance of each partition's modulus switch."""
        return [noise.modulus_switch_variance(n, self.glwe.log2_size[g]) for g, n in zip(points.glwe, points.small)]

    def lefts(self, points: Points, bounds: Sequence[float]) -> list[np.ndarray]:
        """What each constraint leaves to its key switch."""
        boots = [self.boot_variance(points, p) for p in range(len(points.glwe))]
        switched = self.modulus_switches(points)
        conversions = {pair: self.conversion(points, pair)[0] for pair, _ in self.problem.conversions}
        lefts = []
        for c, bound in zip(self.problem.constraints, bounds):
            left = np.full(1, bound)
            for p, (fresh, boot) in enumerate(zip(c.fresh, c.boot)):
                if fresh:
                    left = left - fresh * self.glwe.fresh[points.glwe[p]]
                if boot:
                    left = left - boot * boots[p]
            for pair, weight in c.conv:
                left = left - weight * conversions[pair]
            lefts.append(left if c.switch is None else left - switched[c.switch[1]])
        return lefts

    def limits(self, points: Points) -> tuple[np.ndarray, dict[Pair, np.ndarray]]:
        """Which candidates hold every constraint without key switch, and what is left to each key switch."""
        holds = np.ones(len(points), bool)
        limits: dict[Pair, np.ndarray] = {}
        for c, left in zip(self.problem.constraints, self.lefts(points, self.bounds)):
            holds &= left > 0
            if c.switch is not None:
                limits[c.switch] = np.minimum(limits.get(c.switch, np.inf), left)
        return holds, limits

    def switch(self, points: Points, pair: Pair, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cost and variance of the key switch with the fewest levels whose variance is within a limit."""
        source, n = self.glwe.dimension[points.glwe[pair[0]]], points.small[pair[1]]
        rows, limit = self.small[n - noise.LWE_DIMENSIONS[0]], limit / source
        if len(rows) == 1:
            level = np.searchsorted(-np.minimum.accumulate(rows[0]), -limit)
            found = level < len(self.levels)
            level[~found] = 0
            variance = rows[0, level]
        else:
            fits = rows <= limit[:, None]
            level = fits.argmax(axis=1)
            found, variance = fits[np.arange(len(n)), level], rows[np.arange(len(n)), level]
        cost = self.switch_cost(points, pair, self.levels[level])
        return np.where(found, cost, np.inf), source * variance

    def switch_cost(self, points: Points, pair: Pair, levels: np.ndarray | int) -> np.ndarray:
        """Cost of a key switch of some levels."""
        return noise.keyswitch_cost(self.glwe.dimension[points.glwe[pair[0]]], points.small[pair[1]], levels)

    def total(self, points: Points, below: float = np.inf) -> np.ndarray:
        """Cost of every candidate, infinite if it breaks a constraint or costs more than `below`."""
        cost = np.zeros(len(points))
        for p, number in enumerate(self.problem.boots):
            cost = cost + number * self.boot_cost(points, p)
        for pair, number in self.problem.conversions:
            cost = cost + number * self.conversion(points, pair)[1]
        least = sum(number * self.switch_cost(points, pair, 1) for pair, number in self.problem.switches)
        out = np.full(len(cost), np.inf)
        where = np.flatnonzero(cost + least < below)
        if not len(where):
            return out
        kept, cost = points[where], cost[where]
        holds, limits = self.limits(kept)
        where, kept, cost = where[holds], kept[holds], cost[holds]
        for pair, number in self.problem.switches:
            cost = cost + number * self.switch(kept, pair, chosen(limits[pair], holds))[0]
        out[where] = cost
        return out

    # Descent

    def descend(self) -> Points | None:
        """Decides one partition after the other, then improves one, then one conversion, at a time; None where nothing is
        secure and precise enough."""
        several = len(self.problem.boots) > 1
        point, best = self.decided()
        if point is None and several:
            point, best = self.common()
        if point is None:
            return None
        for _ in range(DESCENTS * several):
            before = best
            for p in reversed(range(len(self.problem.boots))):
                found, total = self.step(p, point, best)
                if found is not None:
                    point, best = found, total
                for pair, _ in self.problem.conversions:
                    point, best = self.polish(pair, point, best)
            if not best < before * (1 - 1e-4):
                break
        return point

    def decided(self) -> tuple[Points | None, float]:
        """The best parameters of each partition in turn, those before it being given; their cost."""
        count, unknown, best = len(self.problem.boots), np.zeros(1, int), np.inf
        point = Points((unknown,) * count, (unknown,) * count, (unknown,) * count, dict.fromkeys(self.conversions, unknown))
        for p in reversed(range(count)):
            self.open = frozenset(range(p))
            found, best = self.step(p, point, np.inf)
            if found is None:
                self.open = frozenset()
                return None, np.inf
            point = found
        return point, best

    def common(self) -> tuple[Points | None, float]:
        """The best parameters that all partitions can have in common; their cost."""
        point = _Search(self.problem.merged(), self.kappa).descend()
        if point is None:
            return None, np.inf
        count, none = len(self.problem.boots), np.zeros(1, int)
        point = Points(point.glwe * count, point.small * count, point.level * count, dict.fromkeys(self.conversions, none))
        return point, float(self.total(point)[0])

    @property
    def conversions(self) -> list[Pair]:
        """Pairs of partitions between whose large keys values are converted."""
        return [pair for pair, _ in self.problem.conversions]

    def step(self, p: int, point: Points, best: float) -> tuple[Points | None, float]:
        """The best parameters of one partition that cost less than `best`, the others' being given or open."""
        found: Points | None = None
        glwes = np.arange(len(self.glwe.k))
        shares: tuple[float, ...] = SHARES
        for every in (STEP, 1):
            g, n = np.meshgrid(glwes, noise.LWE_DIMENSIONS[::every], indexing="ij")
            points = self.candidates(p, point, g.ravel(), n.ravel(), best, shares)
            few = points[::PROBED]  # what the most promising of them cost bounds what is looked at
            bound = np.sort(self.lowest(few, p, self.total(few, best)))[PROMISING - 1]
            total = self.total(points, min(best, np.nextafter(bound, np.inf)))
            at = int(np.argmin(total)) if len(total) else 0
            if not len(total) or not np.isfinite(total[at]):
                break
            found, best = points[at : at + 1], float(total[at])
            lowest = self.lowest(points, p, total)
            glwes = np.argsort(lowest)[: min(PROMISING, int(np.isfinite(lowest).sum()))]
            shares = (SHARES[at * len(SHARES) // len(total)],)
        return found, best

    def lowest(self, points: Points, p: int, total: np.ndarray) -> np.ndarray:
        """The least of candidates' costs for each (k, N) of a partition."""
        lowest = np.full(len(self.glwe.k), np.inf)
        np.minimum.at(lowest, points.glwe[p], total)
        return lowest

    def candidates(
        self, p: int, point: Points, g: np.ndarray, n: np.ndarray, best: float, shares: tuple[float, ...]
    ) -> Points:
        """All bootstrap levels and shares of conversions for the given (k, N) and n; hopeless ones are left out."""
        room = min((b / c.boot[p] for b, c in zip(self.bounds, self.problem.constraints) if c.boot[p]), default=np.inf)
        bound = min(
            (b for b, c in zip(self.bounds, self.problem.constraints) if c.switch and c.switch[1] == p), default=np.inf
        )
        others = [q for q in range(len(self.problem.boots)) if q != p and q not in self.open]
        budget = best - sum(self.problem.boots[q] * float(self.boot_cost(point, q)[0]) for q in others)
        fits = noise.modulus_switch_variance(n, self.glwe.log2_size[g]) < bound
        g, n = g[fits], n[fits]
        hopeful = (n[:, None] * self.glwe.variance[g] < room) & (
            n[:, None] * self.glwe.cost[g] * self.problem.boots[p] < budget
        )
        row, level = np.nonzero(hopeful)
        g, n = g[row], n[row]
        swap = lambda arrays, mine: tuple(mine if q == p or q in self.open else a for q, a in enumerate(arrays))
        points = Points(swap(point.glwe, g), swap(point.small, n), swap(point.level, level), {})
        met = [pair for pair in self.conversions if self.open.isdisjoint(pair)]
        return self.shared(points, met, shares) if met else replace(points, conversion=point.conversion)

    def shared(self, points: Points, pairs: list[Pair], shares: tuple[float, ...]) -> Points:
        """The candidates once for each share of the noise bounds that conversions of some pairs may use up."""
        parts: dict[Pair, list[np.ndarray]] = {pair: [np.zeros(1, int)] * len(shares) for pair in self.conversions}
        for pair in pairs:
            weights = [
                (b, dict(c.conv)[pair]) for b, c in zip(self.bounds, self.problem.constraints) if pair in dict(c.conv)
            ]
            room = min((b / w for b, w in weights), default=np.inf)
            variance = self.glwe.dimension[points.glwe[pair[0]]][:, None] * self.large[points.glwe[pair[1]]]
            parts[pair] = [np.argmax(variance <= share * room, axis=1) for share in shares]
        tile = lambda arrays: tuple(a if len(a) == 1 else np.tile(a, len(shares)) for a in arrays)
        conversion = {
            pair: np.concatenate([np.broadcast_to(v, len(points)) for v in found]) for pair, found in parts.items()
        }
        return Points(tile(points.glwe), tile(points.small), tile(points.level), conversion)

    def polish(self, pair: Pair, point: Points, best: float) -> tuple[Points, float]:
        """The best level of one conversion."""
        count = len(self.levels)
        points = replace(point, conversion={**point.conversion, pair: np.arange(count)})
        total = self.total(points)
        at = int(np.argmin(total))
        return (points[at : at + 1], float(total[at])) if total[at] < best else (point, best)

    def solution(self, point: Points) -> Solution:
        """Everything about the parameters found."""
        limits = self.limits(point)[1]
        switch = {pair: self.switch(point, pair, limits[pair]) for pair, _ in self.problem.switches}
        return Solution(
            point,
            tuple(float(self.boot_cost(point, p)[0]) for p in range(len(self.problem.boots))),
            {pair: float(cost[0]) for pair, (cost, _) in switch.items()},
            {pair: float(self.conversion(point, pair)[1][0]) for pair, _ in self.problem.conversions},
            {pair: float(variance[0]) for pair, (_, variance) in switch.items()},
            float(self.total(point)[0]),
        )


def variances(problem: Problem, solution: Solution) -> list[tuple[float, float]]:
    """Noise at each of a problem's constraints, dominated ones included: of leveled operations, and of the table's own key
    and modulus switch (0 at an output)."""
    assert solution.point is not None
    search = _Search(problem, 1.0)
    lefts = search.lefts(solution.point, [0.0] * len(problem.constraints))
    switched = [float(v[0]) for v in search.modulus_switches(solution.point)]
    own = [0.0 if c.switch is None else switched[c.switch[1]] for c in problem.constraints]
    keys = [0.0 if c.switch is None else solution.switch_variance.get(c.switch, 0.0) for c in problem.constraints]
    return [(max(-float(left[0]) - o, 0.0), k + o) for left, o, k in zip(lefts, own, keys)]
