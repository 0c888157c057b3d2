"""Products of two encrypted tensors."""

from __future__ import annotations

import numpy as np
import pytest
from build_models import model, node

import fheq


@pytest.mark.parametrize("granularity", fheq.Granularity)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_a_factor_that_hardly_varies_costs_no_bits(size: float, granularity: fheq.Granularity) -> None:
    """In steps of its own small range it would lie thousands of them away from 0. The product loses little by coarser ones:
    most of what it is off by comes from the other factor."""
    graph = fheq.import_onnx(model([node("Mul", ["x", "z"], ["y"])], {"x": ["N", 3], "z": ["N", 3]}, ["y"]))
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (2000, 3)).astype(np.float32)
    still = (size * rng.uniform(0.99, 1, (2000, 3))).astype(np.float32)
    lively = (size * rng.uniform(-1, 1, (2000, 3))).astype(np.float32)
    widths, errors = [], []
    for z in (still, lively):
        program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x, z), fheq.Spec(6, activations=granularity)))
        answers = program.dequantize(fheq.simulate(program, *program.quantize(x, z)))[0]
        widths.append(np.log2(np.max(program.outputs[0].affine.qmax) + 1))
        errors.append(np.sqrt(np.mean((answers - x * z) ** 2)))
    assert widths[0] <= widths[1] + 1  # its values all have one sign
    step = 2 / 63  # of x, whose size is 1; half of it is a step of the still factor, as a part of its size
    assert errors[0] < size * step / np.sqrt(12) * np.hypot(1, 1 / 2) * 1.03  # of 6,000 values: known to 1 %
