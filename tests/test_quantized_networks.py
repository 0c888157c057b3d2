"""Networks quantized by Brevitas, by PyTorch and by onnxruntime: the imported program answers what they do themselves.

`brevitas_models.py` and `pt2e_models.py` made the data of the first two. For onnxruntime every integer inside is compared.
Its answers are not exact either: a float32 sum or scale may cross a tie (its 8-bit products of unsigned and signed integers
may even saturate, on processors without VNNI, unless `reduce_range` is asked for, as here). So both sides are judged by
`exact_quantized.py`: an integer other than the exact value rounds to is one step away, and its value is as near to a tie
as the error of the arithmetic that made it. What is left of a difference then comes from integers that it was computed from.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build_models import model, node
from exact_quantized import Referee
from models import as_tuple, weights
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import fheq
from fheq import AccumulatorRange, Spec
from fheq.graph import Graph
from fheq.integers.accumulator_decoders import multipliers, summands
from fheq.integers.decoders import step_of
from fheq.planning.plan import plan
from fheq.post_training import PostTrainingQATImporter
from fheq.qparams import QParams
from fheq.steps import Add

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
FOLDER = Path(__file__).parent / "data"
DATA, EXPORTED = np.load(FOLDER / "brevitas.npz"), np.load(FOLDER / "pt2e.npz")
NAMES = sorted({name.rsplit("/", 1)[0] for name in DATA.files})


@pytest.mark.parametrize("name", NAMES)
def test_a_network_of_brevitas_keeps_its_integers(name: str) -> None:
    """To the error of float32 sums: a step is some thousand times as large. No bits are asked for."""
    x, want = DATA[f"{name}/x"], DATA[f"{name}/y"]
    graph = fheq.import_onnx(onnx.load_from_string(DATA[f"{name}/model"].tobytes()))
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), Spec(None, accumulators=AccumulatorRange.WORST_CASE))
    program = fheq.lower(graph, qparams)
    (answers,) = program.dequantize(fheq.simulate(program, *program.quantize(x)))
    np.testing.assert_allclose(answers, want, atol=2e-6 * np.abs(want).max())


def test_the_importer_of_quantized_models_takes_them() -> None:
    x, want = (DATA[f"residual, QONNX/{part}"] for part in "xy")
    graph = fheq.import_onnx(onnx.load_from_string(DATA["residual, QONNX/model"].tobytes()))
    module = PostTrainingQATImporter(3, graph).quantize_module(x)
    np.testing.assert_allclose(module.forward(x), want, atol=2e-6 * np.abs(want).max())


NETWORKS: dict[str, tuple[list[onnx.NodeProto], tuple[int, ...], dict[str, np.ndarray]]] = {
    "pools": (
        [
            node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
            node("BatchNormalization", ["c", "g", "e", "m", "v"], ["n"]),
            node("Relu", ["n"], ["r"]),
            node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
            node("AveragePool", ["p"], ["a"], kernel_shape=[2, 2], strides=[1, 1], pads=[1, 1, 0, 0]),
            node("Flatten", ["a"], ["f"]),
            node("Gemm", ["f", "u", "d"], ["y"]),
        ],
        (2, 6, 6),
        {
            "w": weights(3, 2, 3, 3),
            "b": weights(3),
            "u": weights(27, 4),
            "d": weights(4),
            "g": weights(3, low=0.5),
            "e": weights(3, seed=1),
            "m": weights(3, seed=2),
            "v": weights(3, low=0.5, seed=3),
        },
    ),
    "branches": (
        [
            node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            node("Conv", ["x", "u"], ["d"], pads=[1, 1, 1, 1]),
            node("Add", ["c", "d"], ["s"]),
            node("Concat", ["s", "c"], ["j"], axis=1),
            node("GlobalAveragePool", ["j"], ["p"]),
            node("Flatten", ["p"], ["f"]),
            node("Gemm", ["f", "v"], ["y"], transB=1),
        ],
        (2, 5, 5),
        {"w": weights(3, 2, 3, 3), "u": weights(3, 2, 3, 3, seed=1), "v": weights(4, 6)},
    ),
    "rows": (
        [
            node("MatMul", ["x", "w"], ["a"]),
            node("Sigmoid", ["a"], ["g"]),
            node("MatMul", ["x", "u"], ["b"]),
            node("LeakyRelu", ["b"], ["l"], alpha=0.1),
            node("Mul", ["g", "l"], ["m"]),
            node("MatMul", ["m", "v"], ["y"]),
        ],
        (6,),
        {"w": weights(6, 5), "u": weights(6, 5, seed=1), "v": weights(5, 4)},
    ),
    "images": (
        [
            node("MaxPool", ["x"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
            node("Conv", ["p", "w"], ["c"], pads=[1, 1, 1, 1]),
            node("Resize", ["c", "", "k"], ["z"], coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
            node("Conv", ["z", "u"], ["y"]),
        ],
        (2, 6, 6),
        {"w": weights(3, 2, 3, 3), "u": weights(2, 3, 2, 2), "k": np.float32([1, 1, 2, 2])},
    ),
}
SIGNED, UNSIGNED, NARROW = QuantType.QInt8, QuantType.QUInt8, QuantType.QInt4
QDQ, OPERATOR = QuantFormat.QDQ, QuantFormat.QOperator
FORMATS: dict[str, dict[str, Any]] = {
    "QDQ": {"quant_format": QDQ, "activation_type": UNSIGNED, "weight_type": UNSIGNED},
    "QDQ, signed, per channel": {"quant_format": QDQ, "activation_type": SIGNED, "weight_type": SIGNED, "per_channel": True},
    "QDQ, 4-bit weights": {"quant_format": QDQ, "activation_type": UNSIGNED, "weight_type": NARROW},
    "QOperator": {"quant_format": OPERATOR, "activation_type": UNSIGNED, "weight_type": UNSIGNED},
    "QOperator, per channel": {
        "quant_format": OPERATOR,
        "activation_type": UNSIGNED,
        "weight_type": SIGNED,
        "per_channel": True,
        "reduce_range": True,
    },
}
FLOAT32 = 2.0**-21  # relative: eight roundings


class Samples(CalibrationDataReader):
    def __init__(self, x: np.ndarray) -> None:
        self.rest = iter([{"x": row[None]} for row in x])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rest, None)


def quantized(name: str, form: str, x: np.ndarray, folder: Path) -> onnx.ModelProto:
    """A network, quantized by onnxruntime."""
    nodes, shape, known = NETWORKS[name]
    proto = model(nodes, {"x": ["N", *shape]}, ["y"], known, opset=21)
    proto.ir_version = 10
    onnx.save(onnx.shape_inference.infer_shapes(proto), folder / "float.onnx")
    logging.disable(logging.WARNING)
    try:
        quantize_static(folder / "float.onnx", folder / "quantized.onnx", Samples(x), **FORMATS[form])
    finally:
        logging.disable(logging.NOTSET)
    return onnx.load(folder / "quantized.onnx")


def allowed(graph: Graph, qparams: QParams, output: str, scale: float) -> float:
    """How far from a tie, in steps, a program may still round to the other side: half a cell of an accumulator that lost low
    bits, and what the whole multipliers of a sum of two scales miss of them at the ends of the range."""
    layout = plan(graph)
    operand = layout.outputs[output]
    source = layout.points.get(operand.key) if operand is not None else None
    if source not in qparams.accumulators:
        return 0.0
    a, step = qparams.accumulators[source], step_of(layout, source)
    reach = float(np.max(np.where(a.lsbs > 0, a.scale * 2.0**a.lsbs / 2, 0)))
    if isinstance(step, Add):
        parts = summands(layout, qparams, step)
        *times, unit = multipliers(layout, qparams, step, *parts)
        reach += sum(np.max(abs(p.scale - k * unit) * p.reach) for p, k in zip(parts, times))
    return reach / scale


def assert_accounted(
    proto: onnx.ModelProto, data: np.ndarray, x: np.ndarray, kernels: tuple[bool, ...] = (True, False)
) -> int:
    """Every integer of onnxruntime (with its integer kernels, and without) and of the program is what its exact value rounds
    to, or one step away near a tie; outputs are what their integers say. The number of integers in which the two differ."""
    referee = Referee(proto)
    graph = fheq.import_onnx(referee.tapped())
    qparams = fheq.fit(graph, fheq.calibrate(graph, data), Spec(None, accumulators=AccumulatorRange.WORST_CASE))
    program = fheq.lower(graph, qparams)
    answer, *inside = program.dequantize(*as_tuple(fheq.simulate(program, *program.quantize(x))))
    ours = {}
    for stage, real in zip(referee.stages, inside, strict=True):
        ours[stage.tensor] = np.round(real / referee.known[stage.scale]) + referee.known[stage.zero].astype(np.float64)
    theirs = [referee.integers(x, optimised=optimised) for optimised in kernels]
    for stage in referee.stages:
        scale = float(referee.known[stage.scale])
        for integers, within in [(ours, allowed(graph, qparams, f"{stage.tensor}/tap", scale)), *((t, 0) for t in theirs)]:
            other, from_tie = referee.judged(stage, x, integers)
            error = FLOAT32 * np.maximum(np.abs(referee.steps(stage, x, integers)), 1)
            assert np.all(~other | (from_tie <= within + error)), stage.tensor
            assert np.all(np.abs(integers[stage.tensor] - referee.nearest(stage, x, integers)) <= 1), stage.tensor
    want = referee.output(x, ours)
    np.testing.assert_allclose(answer, want, atol=2e-6 * np.abs(want).max())
    return sum(int(np.sum(ours[stage.tensor] != theirs[0][stage.tensor])) for stage in referee.stages)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("pools", "QDQ, 4-bit weights"),
        ("pools", "QOperator, per channel"),
        ("branches", "QDQ, signed, per channel"),
        ("branches", "QOperator"),
        ("rows", "QDQ"),
        ("rows", "QOperator, per channel"),
        ("images", "QDQ, signed, per channel"),
    ],
)
def test_every_difference_from_onnxruntime_is_a_step_near_a_tie(name: str, form: str, tmp_path: Path) -> None:
    """No bits are asked for."""
    rng = np.random.default_rng(0)
    data, x = (rng.normal(size=(n, *NETWORKS[name][1])).astype(np.float32) for n in (40, 60))
    assert_accounted(quantized(name, form, data, tmp_path), data, x)


def test_the_program_is_onnxruntimes_where_no_accumulator_loses_bits(tmp_path: Path) -> None:
    """And nothing lies at a tie, as averages of 4 do."""
    rng = np.random.default_rng(0)
    data, x = (rng.normal(size=(n, *NETWORKS["images"][1])).astype(np.float32) for n in (40, 60))
    assert assert_accounted(quantized("images", "QDQ, 4-bit weights", data, tmp_path), data, x) == 0


@pytest.mark.parametrize("name", ["dense", "convolutions"])
def test_a_network_that_torch_quantized_and_exported(name: str) -> None:
    """The float graph is torch's; of the integers, some of those that are made from accumulators wider than a table (18 bits
    of the convolutions) are a step away from onnxruntime's."""
    x, want = EXPORTED[f"{name}/x"], EXPORTED[f"{name}/y"]
    proto = onnx.load_from_string(EXPORTED[f"{name}/model"].tobytes())
    np.testing.assert_allclose(fheq.evaluate(fheq.import_onnx(proto), x), want, atol=2e-6 * np.abs(want).max())
    differences = assert_accounted(proto, x, x, kernels=(False,))  # those multiply unsigned by signed
    assert (differences > 0) == (name == "convolutions")
