"""Steps of tensors that share them: summed, compared, or read together by a layer.

The coarsest of a group sets the step of all. In a sum, a tensor of finer steps may keep a part of the common one, of
which the sum takes a whole number: that costs nothing but width. Whole numbers in coarser steps than 1 are other numbers,
which is an error like others to a layer; to an index, or to a comparison, it is a wrong row, or a wrong decision. Where such
readers are, the common step is a multiple of the one in which whole numbers are exact. In steps of 1 they are exact however
few they are, so that what is added to them may have a part of 1 for its step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fheq.fitting.accumulator_ranges import decides
from fheq.fitting.exact_steps import Range
from fheq.fitting.whole_numbers import unit_fraction
from fheq.origins import is_boolean
from fheq.planning.plan import Plan
from fheq.steps import Add, Step

FINER = 16.0  # own steps in a common one, at most
DECIDED = 256.0  # of integers, where wrong ones are wrong rows of tables and wrong decisions
TINY = 1e-6  # of a step


@dataclass(frozen=True)
class Group:
    """Tensors that share steps.

    Args:
        own: the steps that each would have by itself, by name, `()` or `(C,)`.
        least: steps that would do: finer ones for whole numbers, which lose nothing in theirs and make no others coarse.
        whole: where they hold whole numbers that their bits can count, by name.
    """

    layout: Plan
    own: Mapping[str, np.ndarray]
    least: Mapping[str, np.ndarray]
    whole: Mapping[str, np.ndarray]

    @staticmethod
    def of(
        layout: Plan,
        members: list[str],
        ranges: Mapping[str, Range],
        scales: Mapping[str, np.ndarray],
        whole: Mapping[str, np.ndarray],
    ) -> Group:
        """The group of these members.

        Args:
            ranges, scales, whole: of all tensors; `whole` of inputs in floating point.
        """
        steps = dict(zip(members, np.broadcast_arrays(*(scales[m] for m in members))))
        known = {m: is_integral(layout, m) or is_boolean(layout.graph, m) or whole.get(m, False) for m in members}
        counted = {m: np.broadcast_to(known[m], steps[m].shape) for m in members}
        own = {m: unit_fraction(s, counted[m]) for m, s in steps.items()}
        bits = max(ranges[m][2] for m in members)
        finest = {m: (ranges[m][1] - ranges[m][0]) / (2.0**bits - 1) for m in members}
        least = {m: np.where(counted[m], np.minimum(s, finest[m]), s) for m, s in own.items()}
        return Group(layout, own, least, counted)

    def in_sum(self, key: str) -> np.ndarray:
        """The step of a tensor that is summed with the others."""
        common = self._common()
        times = common / self.own[key]
        divides = np.abs(times - np.round(times)) <= TINY * times
        exact = self.whole[key] & ((self._keeps(key) & divides) | (times <= 1))
        return np.where(exact, self.own[key], self._part(key, common))

    def together(self, step: np.ndarray) -> np.ndarray:
        """The step of all, that they have exactly alike, from one that would do."""
        if any(is_integral(self.layout, m) for m in self.own):  # a step of 1/3 is no number of floating point
            step = np.where(step > 1, np.ceil(step - TINY), 2.0 ** np.ceil(np.log2(step) - TINY))
        step = unit_fraction(step, np.any(list(self.whole.values()), axis=0))
        decisive = [m for m in self.own if np.all(self.whole[m]) and self._decisive(m)]
        return np.min([step, *(self.own[m] for m in decisive if np.all(step <= self._limit(m) * self.own[m]))], axis=0)

    @property
    def coarsest(self) -> np.ndarray:
        """The largest of the steps."""
        return np.max(list(self.least.values()), axis=0)

    def _common(self) -> np.ndarray:
        """The step of all, of which some have a part: a multiple, or part, of the least in which whole numbers are kept."""
        step = self.coarsest
        kept = lambda m: self.whole[m] & (self._keeps(m) | (self.own[m] >= step))
        unit = np.min([np.where(kept(m), own, np.inf) for m, own in self.own.items()], axis=0)
        exact = np.isfinite(unit)
        unit = np.where(exact, unit, 1.0)
        multiple = np.where(
            step < unit, unit / np.maximum(np.floor(unit / step + TINY), 1), unit * np.ceil(step / unit - TINY)
        )
        step = np.where(exact, multiple, unit_fraction(step, np.any(list(self.whole.values()), axis=0)))
        return np.ceil(step - TINY) if any(is_integral(self.layout, m) for m in self.own) and np.all(step > 1) else step

    def _part(self, key: str, common: np.ndarray) -> np.ndarray:
        part = common / finer(common, self.own[key]) if self._counts(key, common) else common
        return common if is_integral(self.layout, key) and np.any(part % 1) else part

    def _keeps(self, key: str) -> bool:
        """Whether a tensor is to have the steps in which its whole numbers are exact."""
        times = np.max(np.where(self.whole[key], self.coarsest / self.own[key], 1.0))
        if not np.any(self.whole[key]) or times > self._limit(key):
            return False
        return self._decisive(key) or (times <= FINER and self._counts(key, self.coarsest))

    def _limit(self, key: str) -> float:
        """How many of its own steps a tensor may have in a common one, to keep them."""
        return DECIDED if is_integral(self.layout, key) else FINER

    def _counts(self, key: str, common: np.ndarray) -> bool:
        """Whether a step reads a tensor that can tell its own steps from coarser common ones: a sum with nothing as coarse,
        or what is no sum."""
        coarse = lambda k: k != key and (k not in self.own or np.all(finer(common, self.own[k]) == 1))
        return any(not isinstance(s, Add) or not any(coarse(o.key) for o in s.operands) for s in self._readers(key))

    def _decisive(self, key: str) -> bool:
        """Whether a table reads a tensor, or a comparison."""
        return key in self.layout.points.values() or any(decides(self.layout, step) for step in self._readers(key))

    def _readers(self, key: str) -> list[Step]:
        return [step for step in self.layout.steps if any(o.key == key for o in step.operands)]


def is_integral(layout: Plan, key: str) -> bool:
    """Whether a tensor is one of integers."""
    return layout.graph.types[key].dtype.kind in "iub"


def finer(common: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The power of two, up to `FINER`, by which a tensor's own steps may divide those that it shares in a sum.

    The sum then multiplies its other operand by as much, for nothing but some bits of width.
    """
    return np.clip(2.0 ** np.floor(np.log2(common / own) + 1e-9), 1.0, FINER)


def coarser(stated: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The whole number of steps that a model states, for what a tensor is added to, in one of the tensor's own."""
    return np.maximum(np.ceil(own / stated - TINY), 1.0)
