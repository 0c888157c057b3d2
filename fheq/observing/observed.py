"""The tensors that are observed, and those whose statistics follow from another's.

A clipped tensor has the extremes and the histogram of what it clips, clipped: they need not be collected.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

import numpy as np

from fheq.errors import QuantizationError
from fheq.graph import Node
from fheq.interpret import run_node
from fheq.observing.statistics import Stats, TensorStats, clipped
from fheq.origins import is_boolean
from fheq.planning.granularity import channel_axis
from fheq.planning.plan import Plan
from fheq.steps import counts_decisions

# They choose one of their inputs, so that nothing is rounded.
CLIPPING = ("Relu", "Clip")


def observed(layout: Plan) -> tuple[str, ...]:
    """The tensors whose statistics quantization needs: inputs, points and the results of steps.

    Not those whose ranges are known: decisions, and sums of them.
    """
    points = [name for name in layout.points if not is_boolean(layout.graph, name)]
    steps = [step.out for step in layout.steps if not counts_decisions(step)]
    return tuple(dict.fromkeys([*layout.inputs, *points, *steps]))


def channels(layout: Plan, name: str) -> int:
    """How many channels an observed tensor has; 1 where it has no channel axis."""
    axis = channel_axis(layout, name)
    return 1 if axis is None else layout.shape(name)[axis]


def check_stats(layout: Plan, stats: Stats) -> None:
    """Checks that statistics are of a graph.

    Raises:
        QuantizationError: they lack one of its tensors, or have it with other channels.
    """
    for name in observed(layout):
        if name not in stats:
            raise QuantizationError(f"the statistics lack tensor {name!r}: calibrate this graph")
        found, wanted = np.size(stats[name].count), channels(layout, name)
        if found != wanted:
            raise QuantizationError(
                f"the statistics of tensor {name!r} have {found} channels, where it has {wanted}: calibrate this graph"
            )


@lru_cache(maxsize=32)
def followed(layout: Plan) -> dict[str, Node]:
    """The observed tensors whose extremes and histograms follow from another's, and the nodes that make them, in order."""
    names = observed(layout)
    return {
        node.outputs[0]: node for node in layout.graph.nodes if node.outputs[0] in names and _follows(layout, names, node)
    }


def _follows(layout: Plan, names: Collection[str], node: Node) -> bool:
    source, *limits = node.inputs
    return (
        node.op in CLIPPING
        and source in names
        and channel_axis(layout, source) == channel_axis(layout, node.outputs[0])
        and all(name in layout.graph.constants for name in limits if name)
    )


def follow(layout: Plan, stats: Stats) -> dict[str, TensorStats]:
    """The statistics with extremes and histograms of the tensors that follow from others."""
    found = dict(stats)
    for name, node in followed(layout).items():
        source, moments = found[node.inputs[0]]._replace(total=None, squares=None), found.get(name)
        found[name] = clipped(source, *_limits(layout, name))
        if moments is not None:
            found[name] = found[name]._replace(total=moments.total, squares=moments.squares)
    return found


@lru_cache(maxsize=256)
def _limits(layout: Plan, name: str) -> tuple[float, float]:
    node, constants = followed(layout)[name], layout.graph.constants
    known = {**constants, node.inputs[0]: np.array([-np.inf, np.inf], np.float32)}
    low, high = np.asarray(run_node(node, known.__getitem__, constants)[0], np.float32)
    return float(low), float(high)
