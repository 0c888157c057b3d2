"""Bits layer by layer: which layers to give more and which fewer, from what each change alone does to score and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fheq.fitting.accumulators import rounding_of
from fheq.fitting.tensor_quantizers import tensor_bits
from fheq.graph import Graph
from fheq.planning.plan import Plan, plan
from fheq.spec import Override, Rounding, Spec
from fheq.steps import Linear, Step

TABLE_BITS = range(2, 9)
SOLUTIONS = 6


@dataclass(frozen=True)
class Change:
    """Other bits of one layer: of what its tables read, of what they make or of its weights (None: as they are).

    Args:
        layer: the accumulator; weight, activation: the quantized tensors.
    """

    layer: str
    weight: str = ""
    activation: str = ""
    table_bits: int | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None

    def __str__(self) -> str:
        kinds = {"tables of": self.table_bits, "weights": self.weight_bits, "activations": self.activation_bits}
        return f"{', '.join(f'{kind} {bits}' for kind, bits in kinds.items() if bits)} at {self.layer}"


def layer_changes(graph: Graph, spec: Spec) -> list[Change]:
    """One bit more and one fewer, of tables, weights and activations, in every layer whose accumulators are rounded."""
    layout, found = plan(graph), []
    for step in layout.steps:
        rounding = rounding_of(layout, spec, step)
        if rounding is None:
            continue
        weight = step.weight_name if isinstance(step, Linear) else ""
        tables = [bits for bits in (rounding.n_bits - 1, rounding.n_bits + 1) if bits in TABLE_BITS]
        found += [Change(step.out, table_bits=bits) for bits in tables]
        if weight and weight not in layout.graph.pinned:
            own = spec.override(weight, step.out, step.node.name).n_bits or spec.bits()["op_weights"]
            found += [Change(step.out, weight=weight, weight_bits=bits) for bits in (own - 1, own + 1) if bits > 1]
        for point in _own_points(layout, step):
            own = tensor_bits(layout, point, spec)
            found += [Change(step.out, activation=point, activation_bits=bits) for bits in (own - 1, own + 1) if bits > 1]
    return found


def _own_points(layout: Plan, step: Step) -> list[str]:
    """The tensors that tables make of a step's accumulator, but for those that have its name, as overrides go by name."""
    named = {step.out, step.node.name}
    made = [point for point, source in layout.points.items() if source == step.out]
    return [point for point in made if point not in named and point not in layout.graph.pinned]


def with_changes(spec: Spec, changes: Sequence[Change]) -> Spec:
    """The spec with changes as overrides."""
    overrides = dict(spec.overrides)
    for change in changes:
        if change.table_bits is not None:
            own = overrides.get(change.layer, Override())
            approximate = (own.rounding or spec.rounding or Rounding(change.table_bits, True)).approximate
            overrides[change.layer] = replace(own, rounding=Rounding(change.table_bits, approximate))
        if change.weight_bits is not None:
            own = overrides.get(change.weight, Override())
            overrides[change.weight] = replace(own, n_bits=change.weight_bits)
        if change.activation_bits is not None:
            own = overrides.get(change.activation, Override())
            overrides[change.activation] = replace(own, n_bits=change.activation_bits)
    return replace(spec, overrides=overrides)


def allocations(changes: Sequence[Change], losses: Sequence[float], costs: Sequence[float]) -> list[list[Change]]:
    """Sets of changes, at most one per layer, that are best together if their effects add up.

    Lagrangian relaxation of the multiple-choice knapsack: for a price per operation each layer takes the change of least
    loss plus price times cost (Sinha and Zoltners, Operations Research 1979). A range of prices gives the sets.

    Args:
        losses: what each change alone takes from the score; may be negative.
        costs: what it adds to the operations; may be negative.
    """
    loss, cost = np.asarray(losses, np.float64), np.asarray(costs, np.float64)
    usable = np.isfinite(cost) & (cost != 0)
    if not np.any(usable):
        return []
    prices = np.quantile(np.abs(loss[usable] / cost[usable]), np.linspace(0.1, 0.9, 4 * SOLUTIONS))
    layers = list(dict.fromkeys(change.layer for change in changes))
    found: dict[tuple[int, ...], list[Change]] = {}
    for price in prices:
        value = np.where(np.isfinite(cost), loss + price * cost, np.inf)
        chosen = []
        for layer in layers:
            own = [i for i, change in enumerate(changes) if change.layer == layer]
            best = min(own, key=lambda i: value[i])
            if value[best] < 0:
                chosen.append(best)
        if chosen:
            found.setdefault(tuple(chosen), [changes[i] for i in chosen])
    sets = list(found.values())
    return [sets[i] for i in sorted({round(i) for i in np.linspace(0, len(sets) - 1, SOLUTIONS)})] if sets else []
