"""Cross-layer equalization (Nagel et al., arXiv 1906.04721): channels of activations brought to one range.

Where all channels of a tensor share a scale, those of small range are left with few steps. Between two linear layers, past a
function that scales with its argument (ReLU and its like), a channel may have any unit: the layer that makes it is divided
by the unit, those that read it are multiplied by it, and the model computes the same. Scales per channel, the default of
`fit`, do this without changing weights; balance is for `Granularity.PER_TENSOR` and for models that go elsewhere.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fheq.client.outputs import rejoined
from fheq.graph import Graph
from fheq.integers.integer_weights import along_inputs, along_outputs
from fheq.observing.observed import check_stats
from fheq.observing.statistics import Stats
from fheq.planning.granularity import channel_axis
from fheq.planning.plan import Plan, plan
from fheq.regions import in_float64
from fheq.rewriting.weights import replaceable, with_weights
from fheq.steps import Linear
from fheq.tuning.channel_groups import Group, elements_by_channel, read_by_linear

LEAST = 2.0**-12  # of the largest range: units of channels that hardly vary


def balance(graph: Graph, stats: Stats) -> Graph:
    """The graph with weights and biases that bring the channels of its activations to one range.

    Args:
        graph: what `import_onnx` gives.
        stats: what `calibrate` gives for it. Calibrate the result anew.

    Raises:
        QuantizationError: the statistics are of another graph.
    """
    layout = plan(graph)
    check_stats(layout, stats)
    linear = [step for step in layout.steps if isinstance(step, Linear)]
    makers = {step.out: step for step in linear if replaceable(layout.graph, step)}
    changed: dict[str, Linear] = {}
    for group in read_by_linear(layout):
        maker = makers.get(layout.points.get(group.key, ""))
        if maker is None or not _scales(layout, group.key):
            continue
        channel = _channel_of(layout, maker)[layout.regions[group.key].elements]
        units = _units(layout, stats, group, channel, maker.weight.shape[maker.weight_axis])
        read = [(reader, _read_units(reader, units[channel])) for reader in group.readers]
        if all(factors is not None for _, factors in read):
            changed[maker.out] = _made_in(changed.get(maker.out, maker), units)
            changed.update((r.out, _read_in(changed.get(r.out, r), f)) for r, f in read if f is not None)
    return rejoined(graph, with_weights(layout.graph, changed)) if changed else graph


def _made_in(step: Linear, units: np.ndarray) -> Linear:
    """A step whose output channels are in other units."""
    shape = [1] * step.weight.ndim
    shape[step.weight_axis] = -1
    return replace(step, weight=step.weight / units.reshape(shape), bias=step.bias / along_outputs(step, units))


def _read_in(step: Linear, units: np.ndarray) -> Linear:
    """A step whose input channels are in other units."""
    return replace(step, weight=step.weight * along_inputs(step, units))


def _scales(layout: Plan, point: str) -> bool:
    """Whether a point alone is made of its source, and every element is f(x) with f(c x) = c f(x) for positive c."""
    source = layout.points[point]
    others = [p for p, s in layout.points.items() if s == source and p != point]
    shown = [n for n, r in layout.regions.items() if r.source == source and n in layout.outputs]
    if others or shown or np.any(layout.regions[point].elements < 0):
        return False
    grid = np.linspace(-4, 4, 16)
    everything = np.arange(int(np.prod(layout.shape(point))))

    def values(factor: float) -> np.ndarray:
        source = lambda _, need: np.broadcast_to(factor * grid, (len(need), len(grid)))
        return in_float64(lambda: layout.elements.evaluate(point, everything, source))

    return bool(np.allclose(values(8.0), 8 * values(1.0), rtol=1e-9, atol=1e-12))


def _units(layout: Plan, stats: Stats, group: Group, channel: np.ndarray, count: int) -> np.ndarray:
    """The unit of each channel of a tensor's maker, `(C,)`: its largest magnitude, relative to the largest of all.

    Args:
        channel: of the tensor's elements, out of `count`.
    """
    found, shape = stats[group.key], layout.shape(group.key)
    axis = channel_axis(layout, group.key)
    reach = np.maximum(np.abs(found.minimum), np.abs(found.maximum)).astype(np.float64)
    spread = np.broadcast_to(reach.reshape(-1, *(1,) * (-axis - 1)) if axis is not None else reach.reshape(()), shape)
    units = np.zeros(count)
    np.maximum.at(units, channel, spread.ravel())
    return np.where(units > 0, np.maximum(units / max(units.max(), 1e-300), LEAST), 1.0)


def _channel_of(layout: Plan, maker: Linear) -> np.ndarray:
    """The channel of each element of a step's result, flat."""
    shape = layout.shape(maker.out)
    count = maker.weight.shape[maker.weight_axis]
    return np.broadcast_to(np.arange(count).reshape(-1, *(1,) * (-maker.channel - 1)), shape).ravel()


def _read_units(reader: Linear, each: np.ndarray) -> np.ndarray | None:
    """The unit of each input channel of a reader, from those of the elements that it reads; None where one mixes several."""
    found = [np.unique(each[elements]) for elements in elements_by_channel(reader)]
    return np.array([v[0] if len(v) else 1.0 for v in found]) if all(len(v) < 2 for v in found) else None
