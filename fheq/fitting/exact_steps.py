"""Tensors that hold whole multiples of a step: ranges and steps in which they are exact.

Inputs of whole numbers are told by their statistics (`fheq.fitting.whole_numbers`), activations by the operators that make
them (`fheq.fitting.function_grids`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping

import numpy as np

from fheq.affine import Affine
from fheq.fitting.function_grids import Grid, grid_of, grid_on
from fheq.fitting.whole_numbers import filling, holding, in_steps_of_one, is_whole
from fheq.graph import is_float
from fheq.observing.statistics import Stats, per_tensor
from fheq.origins import is_integer
from fheq.planning.granularity import Sharing
from fheq.planning.plan import Plan
from fheq.steps import Linear, Sum

Range = tuple[np.ndarray, np.ndarray, int]
"""Lowest and highest value of a tensor, `()` or `(C,)`, and the bits for it."""


def take_whole(
    layout: Plan, stats: Stats, sharing: Sharing, ranges: dict[str, Range], stated: Mapping[str, Affine]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Float inputs that hold whole numbers, by channel, and the steps of those that share none; `ranges` are fitted to them
    in place."""
    whole, steps = {}, {}
    for port in layout.graph.inputs:
        key = port.name
        if not is_float(port.type.dtype) or key in stated or key not in ranges:
            continue
        low, high, bits = ranges[key]
        seen = stats[key] if sharing.axis[key] is not None else per_tensor(stats[key])
        if meets_filler(layout, key):
            seen = seen._replace(minimum=np.minimum(seen.minimum, 0), maximum=np.maximum(seen.maximum, 0))
        whole[key] = is_whole(seen, bits).reshape(low.shape)
        interval = holding(seen, (np.atleast_1d(low), np.atleast_1d(high)), np.atleast_1d(whole[key]))
        interval = in_steps_of_one(seen, interval, bits, np.atleast_1d(whole[key]))
        if list(sharing.group.values()).count(sharing.group[key]) == 1:
            weighted = any(isinstance(step, Linear) and step.operands[0].key == key for step in layout.steps)
            filled = filling(*interval, bits, np.atleast_1d(whole[key]))
            steps[key] = filled.reshape(low.shape) if weighted else np.ones(low.shape)
        ranges[key] = interval[0].reshape(low.shape), interval[1].reshape(high.shape), bits
    return whole, steps


def take_grids(
    layout: Plan,
    stats: Stats,
    sharing: Sharing,
    ranges: dict[str, Range],
    keys: Iterable[str],
    joined: Container[str],
    copied: Mapping[str, Affine],
) -> dict[str, np.ndarray]:
    """The steps of those of `keys` that are on a grid of no more integers than their bits count; `ranges` are fitted to them
    in place. Not of those that share steps with others.

    Of those that are `joined` with channels on other grids the steps are parts of the grid's, lest weights that take in all
    of them have few bits left for the others.

    Args:
        copied: the grids of integers that tensors are casts of.
    """
    steps = {}
    groups = Counter(sharing.group.values())
    for key in keys:
        grid = grid_on(copied[key]) if key in copied else grid_of(layout.graph, key)
        if key in joined and grid is None and is_integer(layout.graph, key):
            grid = Grid(1.0, -np.inf, np.inf)
        if grid is None or groups[sharing.group[key]] > 1:
            continue
        seen = stats[key] if sharing.axis[key] is not None else per_tensor(stats[key])
        exact = is_integer(layout.graph, key)
        low, high = (seen.minimum, seen.maximum) if exact else ranges[key][:2]
        bits = ranges[key][2]
        low, high = (np.clip(np.round(end / grid.step) * grid.step, grid.low, grid.high) for end in (low, high))
        if grid.high - grid.low < grid.step * 2.0**bits:
            low, high = np.full_like(low, grid.low), np.full_like(high, grid.high)
        if np.all(high - low < grid.step * 2.0**bits) and np.any(high > low):
            count = np.max(np.round((high - low) / grid.step))
            parts = np.floor((2.0**bits - 1) / count) if key in joined else 1.0
            ranges[key] = low, high, max(1, int(np.ceil(np.log2(parts * count + 1))))
            steps[key] = np.full_like(low, grid.step / parts)
    return steps


def meets_filler(layout: Plan, key: str) -> bool:
    """Whether zeros are put beside its values (padding), so that 0 must be one of its steps."""
    return any(o.key == key and np.any(o.elements < 0) for step in layout.steps for o in step.operands)


def is_weighed(layout: Plan, key: str) -> bool:
    """Whether a tensor is read by products with weights and by sums alone, which tell no integer from the next."""
    readers = [step for step in layout.steps if any(o.key == key for o in step.operands)]
    read_otherwise = key in layout.points.values() or any(o is not None and o.key == key for o in layout.outputs.values())
    return bool(readers) and not read_otherwise and all(isinstance(step, Linear | Sum) for step in readers)
