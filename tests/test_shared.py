"""Models from elsewhere, where they are present: float evaluation and quality at 8 bits against the peer's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from models import as_tuple

import fheq

SHARED = Path(__file__).resolve().parents[2] / "shared"
ZOO, WORKLOADS = SHARED / "zoo", SHARED / "workloads"
NAMES = sorted(path.stem for path in ZOO.glob("*.onnx"))

pytestmark = [
    pytest.mark.skipif(not NAMES, reason="the models are not here"),
    pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning"),
]

# Quick ones of many families.
QUANTIZED = (
    "add_net",
    "branching",
    "enc_matmul",
    "fcsmall_gelu",
    "fcsmall_hardswish",
    "fcsmall_prelu",
    "multi_input_linear",
    "net_with_concat_unsqueeze",
    "shape_ops",
    "simple_net",
    "skl_mlp_classifier",
    "skl_random_forest",
    "skl_scaler_logreg_pipeline",
    "sum_axis1",
    "torch_multiply",
    "univariate_reshape",
)


def arrays(data: np.lib.npyio.NpzFile, prefix: str) -> list[np.ndarray]:
    """The arrays prefix0, prefix1, ..."""
    count = sum(name.startswith(prefix) and name[len(prefix) :].isdigit() for name in data.files)
    return [data[f"{prefix}{i}"] for i in range(count)]


def samples_first(entry: dict, outputs: tuple[np.ndarray, ...], wanted: list[np.ndarray]) -> list[np.ndarray]:
    """Outputs in the layout of the references; a graph may merge the samples with another axis."""
    axes = [output["batch_axis"] or 0 for output in entry["outputs"]]
    moved = [np.moveaxis(np.asarray(out), axis, 0) for axis, out in zip(axes, outputs)]
    return [out.reshape(want.shape) if out.size == want.size else out for out, want in zip(moved, wanted)]


def r2(got: np.ndarray, want: np.ndarray) -> float:
    """1 - SSE / SST; for labels the rate of agreement."""
    if want.dtype.kind in "iu":
        return float(np.mean(np.round(got) == want))
    want = want.astype(np.float64)
    return 1 - float(np.sum((got - want) ** 2) / np.sum((want - want.mean()) ** 2))


@pytest.mark.parametrize("name", NAMES)
def test_float_evaluation_is_the_reference(name: str) -> None:
    """Within 1e-4, as the references are given in float32; relative where values are large."""
    entry = json.loads((ZOO / "manifest.json").read_text())[name]
    data = np.load(ZOO / f"{name}.npz")
    graph = fheq.import_onnx(ZOO / f"{name}.onnx")
    for port, out in zip(graph.outputs, entry["outputs"], strict=True):
        assert out["batch_axis"] in (None, port.batch_axis)
    outputs = samples_first(entry, as_tuple(fheq.evaluate(graph, *arrays(data, "t"))), arrays(data, "ref"))
    for got, want in zip(outputs, arrays(data, "ref"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", QUANTIZED)
def test_eight_bits_are_as_good_as_the_peer(name: str) -> None:
    """Mean R2 over outputs, on the test samples; 0.0005 is the spread that other calibration samples give."""
    if name not in NAMES:
        pytest.skip("the model is not here")
    entry = json.loads((ZOO / "manifest.json").read_text())[name]
    peer = json.loads((ZOO / "peer.json").read_text())[name]["peer"].get("8") or {}
    bound = (peer.get("forward") or {}).get("r2")
    data = np.load(ZOO / f"{name}.npz")
    graph = fheq.import_onnx(ZOO / f"{name}.onnx")
    stats = fheq.calibrate(graph, *arrays(data, "in"))
    program = fheq.lower(graph, fheq.fit(graph, stats, 8))
    real = program.dequantize(*as_tuple(fheq.simulate(program, *program.quantize(*arrays(data, "t")))))
    wanted = arrays(data, "ref")
    scores = [r2(got, want) for got, want in zip(samples_first(entry, real, wanted), wanted, strict=True)]
    assert np.mean(scores) >= (0.99 if bound is None else bound - 0.0005)


@pytest.mark.parametrize(("name", "score"), [("digits_mlp", 0.9778), ("cancer_mlp", 0.9650)])
def test_trained_classifiers_keep_their_accuracy(name: str, score: float) -> None:
    """At 6 bits with accumulators rounded to 6; one test image in a hundred may change its class."""
    if not (WORKLOADS / f"{name}.onnx").exists():
        pytest.skip("the model is not here")
    data = np.load(WORKLOADS / f"{name}.npz")
    graph = fheq.import_onnx(WORKLOADS / f"{name}.onnx")
    inputs = {key: data[key].astype(np.float32) for key in ("x_train", "x_test")}
    stats = fheq.calibrate(graph, inputs["x_train"])
    program = fheq.lower(graph, fheq.fit(graph, stats, fheq.Spec(6, rounding=fheq.Rounding(6))))
    (real,) = program.dequantize(fheq.simulate(program, *program.quantize(inputs["x_test"])))
    label = real.argmax(axis=1) if real.shape[1] > 1 else (real.ravel() > 0).astype(int)
    assert np.mean(label == data["y_test"]) >= score - 0.01
