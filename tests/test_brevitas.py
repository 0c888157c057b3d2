"""Networks quantized by Brevitas: the imported program answers what Brevitas itself does (see `brevitas_models.py`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import fheq
from fheq import AccumulatorRange, Spec
from fheq.post_training import PostTrainingQATImporter

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
DATA = np.load(Path(__file__).parent / "data" / "brevitas.npz")
NAMES = sorted({name.rsplit("/", 1)[0] for name in DATA.files})


@pytest.mark.parametrize("name", NAMES)
def test_a_network_of_brevitas_keeps_its_integers(name: str) -> None:
    """To the error of float32 sums: a step is some thousand times as large. The bits that are asked for decide nothing."""
    x, want = DATA[f"{name}/x"], DATA[f"{name}/y"]
    graph = fheq.import_onnx(onnx.load_from_string(DATA[f"{name}/model"].tobytes()))
    stats = fheq.calibrate(graph, x)
    programs = [
        fheq.lower(graph, fheq.fit(graph, stats, Spec(bits, accumulators=AccumulatorRange.WORST_CASE))) for bits in (3, 7)
    ]
    for program in programs:
        (answers,) = program.dequantize(fheq.simulate(program, *program.quantize(x)))
        np.testing.assert_allclose(answers, want, atol=2e-6 * np.abs(want).max())
    np.testing.assert_allclose(fheq.evaluate(graph, x), want, atol=2e-6 * np.abs(want).max())
    np.testing.assert_allclose(fheq.fake_quant(graph, fheq.fit(graph, stats, 3), x), want, atol=2e-6 * np.abs(want).max())


def test_the_importer_of_quantized_models_takes_them() -> None:
    x, want = (DATA[f"residual, QONNX/{part}"] for part in "xy")
    graph = fheq.import_onnx(onnx.load_from_string(DATA["residual, QONNX/model"].tobytes()))
    module = PostTrainingQATImporter(3, graph).quantize_module(x)
    np.testing.assert_allclose(module.forward(x), want, atol=2e-6 * np.abs(want).max())
