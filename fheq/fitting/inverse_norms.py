"""Inverses of norms, by which normalizations multiply what the norm is of.

Of a row that is all zeros, as padding and dead channels are, the inverse is the largest number that a model has (316 after
an epsilon of 1e-5), and multiplies nothing but zeros. A quantizer that reached up to it would leave the inverses of other
rows few of its steps. What an error of an inverse costs is weighed by the row: as it has the size of the norm, errors
count as parts of the inverse. And rows so small that the terms of their norms round to 0 cannot be told apart: they share
one inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from fheq.graph import Graph
from fheq.observing.statistics import Stats, TensorStats, bins, per_tensor
from fheq.ops.table import Kind, lookup
from fheq.planning.plan import Plan
from fheq.regions import in_float64
from fheq.steps import Linear, Product, Step, Sum

_AFTER = ("Cast", "Clip", "Identity", "Max", "Min")
"""Operators that may follow it."""
FLOAT = 1 - 2.0**-16  # relative, how much smaller than it is a number in float32 may come out
LEAST = 1e-30
SUMS = LEAST * 2.0 ** np.arange(200)
FLAT = 0.99  # of the inverse of 0: with an epsilon, an eighth of the sum that halves it takes a tenth
UNRESOLVED = 2 / 9
"""The square, in steps, whose root has the inverse of least squared error for all numbers whose squares round to 0: with
x^2 even in x from 0 to a, where 2 a^2 is a step, the sum of (r x - 1)^2 is least at r = 1.5 / a."""
_BEFORE = (
    *("Abs", "Add", "Cast", "Clip", "Div", "Equal", "Identity", "Less", "Max", "Mul", "Pow", "Relu", "Sqrt", "Sub"),
    "Where",
)
"""Operators between a sum and the number that is inverted."""


def ceilings_of(layout: Plan, stats: Stats, bits: Callable[[str], int]) -> dict[str, float]:
    """By tensor, the value above which inverses of norms are worth less than finer steps for the others.

    Args:
        bits: of a quantized tensor.
    """
    found: dict[str, float] = {}
    for key, maker in _inverses(layout):
        seen = per_tensor(stats[key]) if key in stats else None
        if seen is not None and seen.histogram is not None and float(seen.minimum[0]) > 0:
            of_zero = np.inf if _is_clamped(layout, key) else float(_inverse(layout, key, LEAST)[0])
            ceiling = _of_least_error(seen, bits(key), of_zero)
            ceiling = min(ceiling, float(_inverse(layout, key, max(_unresolved(stats, maker, bits), LEAST))[0]))
            if float(seen.minimum[0]) < ceiling < float(seen.maximum[0]):
                found[key] = ceiling
    return found


def _inverses(layout: Plan) -> Iterator[tuple[str, Step]]:
    """Points that are inverses of norms of what the other factor of a product is a multiple of, each with what makes the
    norm's sum."""
    makers = {step.out: step for step in layout.steps}
    for step in layout.steps:
        if not isinstance(step, Product):
            continue
        for factor, inverse in ((step.a, step.b), (step.b, step.a)):
            maker = makers.get(layout.points.get(inverse.key, ""))
            if maker is not None and _inverts(layout.graph, inverse.key, maker.out):
                terms = {layout.points.get(term.key, term.key) for term in maker.operands}
                if terms & _factors(layout, makers, factor.key):
                    yield inverse.key, maker


def _factors(layout: Plan, makers: Mapping[str, Step], key: str) -> set[str]:
    """The sources without which a tensor would be 0: its own, and those of what that is a product or a sum of products
    of."""
    found: set[str] = set()
    stack = [key]
    while stack:
        last = stack.pop()
        source = layout.points.get(last, last)
        maker = makers.get(source)
        if source not in found and (
            isinstance(maker, Product | Sum) or (isinstance(maker, Linear) and not np.any(maker.bias))
        ):
            stack += [operand.key for operand in maker.operands]
        found.add(source)
    return found


def _inverts(graph: Graph, name: str, source: str) -> bool:
    """Whether a tensor is the inverse, or an inverse power, of a norm that is made from `source`."""
    producers = graph.producers()
    last = producers[name]
    while lookup(last).kind is Kind.MOVEMENT or last.op in _AFTER:
        before = next((producers[n] for n in last.inputs if n in producers), None)
        if before is None:
            return False
        last = before
    if last.op != "Reciprocal" and not (last.op == "Pow" and np.all(graph.constants.get(last.inputs[1], 0) < 0)):
        return False
    stack, seen = list(last.inputs), {source, "", *graph.constants}
    while stack:
        tensor = stack.pop()
        if tensor not in seen:
            seen.add(tensor)
            node = producers.get(tensor)
            if node is None or not (node.op in _BEFORE or lookup(node).kind is Kind.MOVEMENT):
                return False
            stack += node.inputs
    return True


def _inverse(layout: Plan, key: str, values: np.ndarray | float) -> np.ndarray:
    """The inverses where the sum that the norm is made of has these values, `(V,)`."""
    source = lambda _, need: np.broadcast_to(values, (len(need), np.size(values)))
    return in_float64(lambda: layout.elements.evaluate(key, np.zeros(1, np.int64), source)).ravel()


def _is_clamped(layout: Plan, key: str) -> bool:
    """Whether small norms have the inverse of the least one that the model tells apart, as counts of 0 have that of 1: no
    epsilon is added, of which the norm of a row could be told."""
    found = _inverse(layout, key, SUMS)
    halved = int(np.argmax(found <= found[0] / 2))
    return bool(found[max(halved - 3, 0)] > FLAT * found[0])


def _of_least_error(seen: TensorStats, bits: int, of_zero: float) -> float:
    """The end of the range from 0 that has the least error, in parts of the inverses.

    Args:
        of_zero: the inverse of a sum of 0 with an epsilon; infinite where none is added.
    """
    _, value, mass = (np.ravel(v) for v in bins(seen))
    value, mass = value[mass > 0], mass[mass > 0]
    least = of_zero**-2.0 if of_zero >= FLOAT * value[-1] else 0.0  # of the square of a norm, as an epsilon is
    weight = mass * np.maximum(value**-2.0 - least / FLOAT**2, 0)
    moments = [np.cumsum(weight * value**k) for k in range(3)]
    above = [moment[-1] - moment for moment in moments]
    clipped = above[2] - 2 * value * above[1] + value**2 * above[0]
    rounded = (value / (2.0**bits - 1)) ** 2 / 12 * moments[0]
    return float(value[np.argmin(clipped + rounded)])


def _unresolved(stats: Stats, maker: Step, bits: Callable[[str], int]) -> float:
    """What stands for all sums whose terms round to 0: terms that are 0 add nothing to it, but for one."""
    key = maker.operands[0].key
    if key not in stats:
        return 0.0
    terms = per_tensor(stats[key])
    step = float(terms.maximum[0]) / (2.0 ** bits(key) - 1)
    centre, _, mass = bins(terms)
    weights = _weights(maker)
    count = max(np.sum(mass[0][centre != 0]) / np.sum(mass) * len(weights), 1)
    return UNRESOLVED * step * count * float(np.mean(weights))


def _weights(maker: Step) -> np.ndarray:
    """What a sum multiplies its terms by."""
    if isinstance(maker, Sum):
        return np.full(maker.x.shape[-1], np.min(np.abs(maker.coefficient)))
    if isinstance(maker, Linear):
        size = np.abs(maker.rows(maker.weight))
        row = size[np.argmin(size.sum(axis=1))]
        return row[row > 0] if np.any(row > 0) else np.zeros(1)
    return np.ones(1)
