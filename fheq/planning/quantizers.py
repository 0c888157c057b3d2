"""Which quantizers a plan asks for."""

from __future__ import annotations

from fheq.errors import QuantizationError
from fheq.graph import Graph
from fheq.planning.plan import Plan, plan
from fheq.qparams import QParams
from fheq.steps import Linear, makes_accumulator


def needed(layout: Plan) -> dict[str, list[str]]:
    """The names in each part of `QParams`."""
    return {
        "tensors": [*layout.inputs, *layout.points],
        "weights": [s.weight_name for s in layout.steps if isinstance(s, Linear)],
        "accumulators": [s.out for s in layout.steps if makes_accumulator(s)],
    }


def plan_for(graph: Graph, qparams: QParams) -> Plan:
    """The plan of a graph, whose quantizers these are.

    Raises:
        QuantizationError: one is missing, named.
    """
    layout = plan(graph)
    for part, names in needed(layout).items():
        missing = [name for name in names if name not in getattr(qparams, part)]
        if missing:
            raise QuantizationError(f"qparams.{part} lacks {missing[0]!r}: these are another graph's; fit this one")
    return layout
