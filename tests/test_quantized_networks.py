"""Networks quantized by Brevitas and by PyTorch: the imported program answers what they do themselves (see
`brevitas_models.py` and `pt2e_models.py`, which made the data)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import fheq
from fheq import AccumulatorRange, Spec
from fheq.post_training import PostTrainingQATImporter

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
FOLDER = Path(__file__).parent / "data"
DATA, EXPORTED = np.load(FOLDER / "brevitas.npz"), np.load(FOLDER / "pt2e.npz")
NAMES = sorted({name.rsplit("/", 1)[0] for name in DATA.files})


@pytest.mark.parametrize("name", NAMES)
def test_a_network_of_brevitas_keeps_its_integers(name: str) -> None:
    """To the error of float32 sums: a step is some thousand times as large. The 3 bits that are asked for decide nothing."""
    x, want = DATA[f"{name}/x"], DATA[f"{name}/y"]
    graph = fheq.import_onnx(onnx.load_from_string(DATA[f"{name}/model"].tobytes()))
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), Spec(3, accumulators=AccumulatorRange.WORST_CASE))
    program = fheq.lower(graph, qparams)
    (answers,) = program.dequantize(fheq.simulate(program, *program.quantize(x)))
    np.testing.assert_allclose(answers, want, atol=2e-6 * np.abs(want).max())


def test_the_importer_of_quantized_models_takes_them() -> None:
    x, want = (DATA[f"residual, QONNX/{part}"] for part in "xy")
    graph = fheq.import_onnx(onnx.load_from_string(DATA["residual, QONNX/model"].tobytes()))
    module = PostTrainingQATImporter(3, graph).quantize_module(x)
    np.testing.assert_allclose(module.forward(x), want, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("name", ["dense", "convolutions"])
def test_a_network_that_torch_quantized_and_exported(name: str) -> None:
    """8 bits each: an accumulator that is too wide for a table loses low bits, which may move an activation by a step. A
    step of the first convolution reaches four values of the second, each a row of the last weight at most."""
    x, want = EXPORTED[f"{name}/x"], EXPORTED[f"{name}/y"]
    graph = fheq.import_onnx(onnx.load_from_string(EXPORTED[f"{name}/model"].tobytes()))
    np.testing.assert_allclose(fheq.evaluate(graph, x), want, atol=2e-6 * np.abs(want).max())
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 3)
    program = fheq.lower(graph, qparams)
    (answers,) = program.dequantize(fheq.simulate(program, *program.quantize(x)))
    last = next(node for node in reversed(graph.nodes) if node.op == "Gemm")
    step = float(qparams.tensors[last.inputs[0]].scale) * np.abs(graph.constants[last.inputs[1]]).max()
    lost = any(accumulator.lsbs for accumulator in program.accumulators.values())
    assert np.abs(answers - want).max() <= (4 * step if lost else 2e-6 * np.abs(want).max())
    assert np.mean(np.abs(answers - want) > 2e-6 * np.abs(want).max()) <= 0.1
