"""Sums of accumulators: no table between a layer and what its result is added to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from build_models import model, node, tensor
from models import prepared

import fheq
from fheq.fitting.accumulators import FULL, SPARE, same_range
from fheq.integers.accumulator_decoders import multipliers, summands
from fheq.planning.plan import plan
from fheq.qparams import unsigned
from fheq.steps import Add

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
RESIDUALS = ["residual_with_different_scales", "two_convolutions_added", "residual_whose_layer_has_a_dead_channel"]
ROUNDED = fheq.Spec(6, rounding=fheq.Rounding(6, approximate=True), margin=1.0)


@pytest.mark.parametrize("name", RESIDUALS)
@pytest.mark.parametrize("spec", [fheq.Spec(5), ROUNDED])
def test_sums_take_whole_multiples_of_layers(name: str, spec: fheq.Spec):
    """So that nothing is missed of what they add, but for channels of weights near 0."""
    ready = prepared(name)
    layout, qparams = plan(ready.graph), unsigned(fheq.fit(ready.graph, ready.stats, spec))
    sums = [s for s in layout.steps if isinstance(s, Add) and any(o.key in layout.summed for o in s.operands)]
    assert sums
    for step in sums:
        parts = summands(layout, qparams, step)
        *times, unit = multipliers(layout, qparams, step, *parts)
        for part, multiplier in zip(parts, times):
            assert np.all(multiplier >= 1) and np.all(multiplier == np.round(multiplier))
            np.testing.assert_allclose(multiplier * unit, part.scale, rtol=1e-5)


@pytest.mark.parametrize("rounding", [None, fheq.Rounding(8, approximate=True)])
def test_layers_whose_channels_lie_otherwise_are_added_as_precisely_as_they_are_alone(rounding: fheq.Rounding | None):
    """A matrix with a scale per place and a convolution with one per channel, one of which is small: four bits more make a
    linear model some 16 times more precise, in every channel."""
    small = np.float32([[1.0], [0.1]])
    nodes = [
        node("Flatten", ["z"], ["f"]),
        node("MatMul", ["f", "w"], ["d"]),
        node("Reshape", ["d", "shape"], ["m"]),
        node("Conv", ["x", "k"], ["c"]),
        node("Add", ["m", "c"], ["y"]),
    ]
    matrix = (tensor(10, 2, 5) * small).reshape(10, 10)
    known = {"w": matrix, "k": tensor(2, 2, 1) * small[..., None], "shape": np.array([-1, 2, 5])}
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 2, 5], "z": ["N", 2, 5]}, ["y"], known))
    inputs = tensor(200, 2, 5), tensor(200, 2, 5)
    stats, want = fheq.calibrate(graph, *inputs), np.asarray(fheq.evaluate(graph, *inputs))

    def error(bits: int) -> np.ndarray:
        found = fheq.fake_quant(graph, fheq.fit(graph, stats, fheq.Spec(bits, rounding=rounding)), *inputs)
        return np.sqrt(np.mean((np.asarray(found) - want) ** 2, axis=(0, 2)) / np.var(want, axis=(0, 2)))

    assert np.all(error(6) < 0.08) and np.all(error(10) < error(6) / 8)


@pytest.mark.parametrize("name", RESIDUALS)
def test_scales_that_were_edited_are_computed_with_as_they_are(name: str):
    """Whole multipliers then miss a part of what is added, in `fake_quant` as in the program."""
    ready = prepared(name)
    fitted = fheq.fit(ready.graph, ready.stats, ROUNDED)
    weights = {key: replace(a, scale=np.float32(a.scale * 1.37)) for key, a in fitted.weights.items()}
    edited = same_range(plan(ready.graph), replace(fitted, weights=weights))
    program = fheq.lower(ready.graph, edited)
    found = program.dequantize(fheq.simulate(program, *program.quantize(*ready.data)))[0]
    expected = np.asarray(fheq.fake_quant(ready.graph, edited, *ready.data))
    cell = np.max(program.outputs[0].affine.scale)
    assert np.mean(np.abs(found - expected) > 0.01 * cell) < 0.01  # float32 decides ties


def test_every_channel_of_a_sum_fills_its_table():
    """Channels of a layer whose ranges lie far apart: the sum takes each as often as fits."""
    spread = np.geomspace(0.05, 1, 6, dtype=np.float32)
    nodes = [
        node("MatMul", ["x", "w1"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "w2"], ["g"]),
        node("MatMul", ["x", "w3"], ["d"]),
        node("Add", ["g", "d"], ["s"]),
        node("Tanh", ["s"], ["y"]),
    ]
    known = {"w1": tensor(5, 5), "w2": tensor(5, 6) * spread, "w3": tensor(5, 6) * spread}
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 5]}, ["y"], known))
    x = np.random.default_rng(0).normal(size=(500, 5)).astype(np.float32)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), fheq.Spec(6, rounding=fheq.Rounding(6, approximate=True)))
    found = qparams.accumulators["s"]
    h = np.maximum(x @ known["w1"], 0)
    s = h @ known["w2"] + x @ known["w3"]
    cells = np.ptp(s, axis=0) / (found.scale * 2.0**found.lsbs)
    assert np.all(cells > 2**6 * SPARE * FULL / 2)  # the margin for unseen values is half of it at most
    assert np.all(cells < 2**6)
