"""Models that onnxruntime has quantized: the imported program computes their integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import pytest
from build_models import model, node, tensor
from onnx import TensorProto
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime_models import CALIBRATION, SAMPLES, answers, qdq, session

import fheq
from fheq.errors import QuantizationError, UnsupportedError
from fheq.post_training import PostTrainingQATImporter

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
RNG = np.random.default_rng(0)


def network() -> onnx.ModelProto:
    """Convolution, pooling, an activation, a concatenation and dense layers."""
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], kernel_shape=[2, 2]),
        node("Relu", ["c"], ["r"]),
        node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "u", "d"], ["h"]),
        node("Sigmoid", ["h"], ["s"]),
        node("Concat", ["s", "f"], ["j"], axis=1),
        node("MatMul", ["j", "v"], ["y"]),
    ]
    known = {"w": tensor(2, 2, 2, 2), "b": tensor(2), "u": tensor(8, 3), "d": tensor(3), "v": tensor(11, 2)}
    return model(nodes, {"x": ["N", 2, 4, 4]}, ["y"], known)


class Reader(CalibrationDataReader):
    def __init__(self) -> None:
        self.rest = iter(np.split(CALIBRATION[:64], 4))

    def get_next(self):
        x = next(self.rest, None)
        return None if x is None else {"x": x}


def program_of(proto: onnx.ModelProto) -> fheq.IntProgram:
    graph = fheq.import_onnx(proto)
    return fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, CALIBRATION), 3))


def quantized(directory: Path, form: QuantFormat, activations: QuantType, weights: QuantType, per_channel: bool):
    onnx.save(network(), directory / "float.onnx")
    kinds = {"activation_type": activations, "weight_type": weights}
    quantize_static(
        directory / "float.onnx", directory / "out.onnx", Reader(), form, per_channel=per_channel, reduce_range=True, **kinds
    )
    return onnx.load(directory / "out.onnx")


@pytest.mark.parametrize(
    ("form", "activations", "weights", "per_channel"),
    [
        (QuantFormat.QDQ, QuantType.QUInt8, QuantType.QInt8, False),
        (QuantFormat.QDQ, QuantType.QInt8, QuantType.QInt8, True),
        (QuantFormat.QDQ, QuantType.QUInt8, QuantType.QInt4, True),
        (QuantFormat.QOperator, QuantType.QUInt8, QuantType.QUInt8, False),
        (QuantFormat.QOperator, QuantType.QInt8, QuantType.QInt8, True),
    ],
)
def test_static_quantization_is_computed_integer_for_integer(tmp_path, form, activations, weights, per_channel):
    """A step apart at rounding ties, which float32 decides, and where an accumulator too wide for tables loses low bits."""
    proto = quantized(tmp_path, form, activations, weights, per_channel)
    program = program_of(proto)
    step = float(np.max(program.outputs[0].affine.scale))
    steps = np.abs(answers(program, SAMPLES) - session(proto).run(None, {"x": SAMPLES})[0]) / step
    assert steps.max() < 1.01
    assert np.mean(steps > 0.01) <= 0.05
    module = PostTrainingQATImporter(6, fheq.import_onnx(proto)).quantize_module(CALIBRATION)
    np.testing.assert_allclose(module.forward(SAMPLES), answers(program, SAMPLES), atol=1e-5)


FOUR_BITS = RNG.integers(-7, 8, (2, 2, 2, 2)).astype(np.int8)
OPERATORS = {
    "Conv": ([node("Conv", ["d", "w", "b"], ["p"], kernel_shape=[2, 2])], FOUR_BITS),
    "Gemm": ([node("Flatten", ["d"], ["f"]), node("Gemm", ["f", "w"], ["p"])], np.resize(FOUR_BITS, (32, 3))),
    "MatMul": ([node("MatMul", ["d", "w"], ["p"])], FOUR_BITS.reshape(4, 4)),
    "Add": ([node("Add", ["d", "e"], ["p"])], None),
    "Mul": ([node("Mul", ["d", "e"], ["p"])], None),
    "Concat": ([node("Concat", ["d", "e"], ["p"], axis=1)], None),
    "Sigmoid": ([node("Sigmoid", ["d"], ["p"])], None),
    "HardSwish": ([node("HardSwish", ["d"], ["p"])], None),
    "AveragePool": ([node("AveragePool", ["d"], ["p"], kernel_shape=[2, 2])], None),
    "padded AveragePool": ([node("AveragePool", ["d"], ["p"], kernel_shape=[2, 2], pads=[1, 1, 1, 1])], None),
    "GlobalAveragePool": ([node("GlobalAveragePool", ["d"], ["p"])], None),
}
TIES = {"AveragePool", "padded AveragePool", "GlobalAveragePool", "Concat"}


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, np.int8) for name in OPERATORS), ("Gemm", np.uint8), ("padded AveragePool", np.uint8)]
)
def test_a_step_apart_from_onnxruntime_is_a_tie_of_its_own_values(name, kind):
    """What onnxruntime itself rounds, in units of the scale, is then within float32 error of a half. Means of 4 or 16
    integers on the grid of the result often are, others are not once in a thousand values."""
    nodes, integers = OPERATORS[name]
    zero = {np.uint8: 120, np.int8: 3}[kind]
    known = {"s": np.float32(0.03), "z": kind(zero), "t": np.float32(0.03 if name in TIES else 0.0271), "u": kind(zero)}
    if integers is not None:
        known |= {"q": integers, "v": np.float32(0.11), "b": tensor(2)}
        nodes = [node("DequantizeLinear", ["q", "v"], ["w"]), *nodes]
    if any("e" in n.input for n in nodes):
        nodes = [node("Sin", ["d"], ["k"]), *(n for n in qdq("k", "e")), *nodes]
    last = [node("QuantizeLinear", ["p", "t", "u"], ["r"]), node("DequantizeLinear", ["r", "t", "u"], ["y"])]
    nodes = [*qdq("x", "d"), *nodes, *last]
    known = {k: v for k, v in known.items() if any(k in n.input for n in nodes)}
    proto = model(nodes, {"x": ["N", 2, 4, 4]}, ["y", "p"], known)
    want, rounded = session(proto).run(None, {"x": 2 * SAMPLES})
    del proto.graph.output[1]
    graph = fheq.import_onnx(proto)
    spec = fheq.Spec(8, accumulators=fheq.AccumulatorRange.WORST_CASE)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, 2 * CALIBRATION), spec))
    steps = np.abs(answers(program, 2 * SAMPLES) - want) / known["t"]
    ties = np.abs(rounded / known["t"] % 1 - 0.5) < 1e-3
    apart = steps > 0.01
    assert steps.max() < 1.01 and not np.any(apart & ~ties)
    assert np.mean(apart) <= (0.1 if name in TIES else 1e-3)


def channels(*last: onnx.NodeProto) -> tuple[onnx.ModelProto, np.ndarray]:
    """A tensor with a scale per channel, and one with one scale, read by the given nodes."""
    known = {"s": np.float32([0.05, 0.2]), "z": np.int8([0, 3]), "t": np.float32(0.07), "u": np.int8(1)}
    known |= {"w": tensor(2, 3), "v": tensor(4, 3), "k": tensor(2, 2, 2, 2), "axis": np.array([1])}
    second = [node("QuantizeLinear", ["x2", "t", "u"], ["r"]), node("DequantizeLinear", ["r", "t", "u"], ["e"])]
    nodes = [*qdq("x", "d"), *second, *last]
    read = {name for n in nodes for name in n.input}
    shape = ["N", 2, 4, 4]
    return model(nodes, {"x": shape, "x2": shape}, ["y"], {k: v for k, v in known.items() if k in read})


KEPT_APART = [
    [node("Conv", ["d", "k"], ["y"], kernel_shape=[2, 2], pads=[1, 1, 0, 0])],
    [node("Transpose", ["d"], ["m"], perm=[0, 2, 3, 1]), node("MatMul", ["m", "w"], ["y"])],
    [node("MaxPool", ["d"], ["y"], kernel_shape=[2, 2])],
    [node("Concat", ["d", "e"], ["m"], axis=1), node("AveragePool", ["m"], ["y"], kernel_shape=[2, 2])],
    [node("Mul", ["d", "e"], ["y"])],
]
TOGETHER = [
    [node("MatMul", ["d", "v"], ["y"])],
    [node("Concat", ["d", "e"], ["m"], axis=1), node("ReduceSum", ["m", "axis"], ["y"])],
    [node("ReduceMax", ["d"], ["y"], axes=[1])],
    [node("Max", ["d", "e"], ["y"])],
]


@pytest.mark.parametrize("last", KEPT_APART, ids=lambda nodes: nodes[-1].op_type)
def test_scales_per_channel_are_exact_where_the_reader_keeps_channels_apart(last):
    graph = fheq.import_onnx(channels(*last))
    data = CALIBRATION[:100], CALIBRATION[100:200]
    spec = fheq.Spec({"op_inputs": 8, "op_weights": 12}, accumulators=fheq.AccumulatorRange.WORST_CASE)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, *data), spec))
    (got,) = program.dequantize(fheq.simulate(program, *program.quantize(*data)))
    want = np.asarray(fheq.evaluate(graph, *data))
    np.testing.assert_allclose(got, want, atol=8 * 2 / 2**12 * np.abs(want).max())  # weights of 12 bits, 8 of them


@pytest.mark.parametrize("last", TOGETHER, ids=lambda nodes: nodes[-1].op_type)
def test_scales_that_a_reader_would_mix_are_refused_by_its_name(last):
    graph = fheq.import_onnx(channels(*last))
    stats = fheq.calibrate(graph, CALIBRATION[:20], CALIBRATION[20:40])
    with pytest.raises(QuantizationError, match=r"'make_y'.*different scales"):
        fheq.fit(graph, stats, 8)


@pytest.mark.parametrize("weights", [QuantType.QUInt8, QuantType.QInt8])
def test_dynamic_quantization_becomes_a_static_one_that_keeps_the_weights(tmp_path, weights):
    onnx.save(network(), tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "out.onnx", weight_type=weights)
    proto = onnx.load(tmp_path / "out.onnx")
    graph = fheq.import_onnx(proto)
    (want,) = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": SAMPLES[:1]})
    got = np.asarray(fheq.evaluate(graph, SAMPLES[:1]))
    assert np.abs(got - want).max() < 0.02 * np.ptp(want) + 0.05  # its activations are rounded to 8 bits
    linear = [n for n in graph.nodes if n.op in ("Conv", "MatMul", "Gemm")]
    assert len(linear) == 3 and all(n.inputs[1] in graph.pinned for n in linear)
    assert fheq.check(graph) == []


def test_a_scale_per_input_channel_is_exact_where_the_input_undoes_it():
    """The integers of the input have scales 1/s where those of the weight have s."""
    scales = np.float32([0.5, 0.125, 1.0])
    known = {"s": scales, "z": np.uint8([7, 8, 9]), "t": 1 / scales, "w": np.int8([[3, -4], [5, 6], [-7, 1]])}
    nodes = [*qdq("x", "d"), node("DequantizeLinear", ["w", "t"], ["v"], axis=0), node("MatMul", ["d", "v"], ["y"])]
    proto = model(nodes, {"x": ["N", 3]}, ["y"], known)
    x = tensor(80, 3, low=-3, high=9)
    graph = fheq.import_onnx(proto)
    for bits in (2, 7):
        program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), bits))
        np.testing.assert_allclose(answers(program, x), fheq.evaluate(graph, x), atol=1e-4)


@pytest.mark.parametrize("square", [np.float32([[0.5], [0.1], [0.3]]), np.float32([[0.5, 0.1, 0.3]])])
def test_scales_of_a_square_weight_are_those_of_the_axis_that_is_stated(square):
    axis = 0 if square.shape[0] == 3 else 1
    known = {"s": np.float32(0.25), "z": np.int8(0), "t": square.ravel(), "w": np.int8([[3, -4, 2], [5, 6, 1], [-7, 1, 0]])}
    nodes = [*qdq("x", "d"), node("DequantizeLinear", ["w", "t"], ["v"], axis=axis), node("MatMul", ["d", "v"], ["y"])]
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 3]}, ["y"], known))
    x = tensor(80, 3, low=-3, high=3)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), {"op_inputs": 8, "op_weights": 10}))
    want = np.asarray(fheq.evaluate(graph, x))
    tolerance = 1e-5 if axis == 1 else 3 * 4 * np.abs(known["w"] * square).max() / 2**10
    np.testing.assert_allclose(answers(program, x), want, atol=tolerance)


def dequantized(*last: onnx.NodeProto, opset: int = 23, **known: np.ndarray) -> onnx.ModelProto:
    """x (N, 4) through a quantizer of 8 bits and the given nodes to y."""
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), *last]
    known |= {"s": np.float32(0.0123), "z": np.int8(3)}
    return model(nodes, {"x": ["N", 4]}, ["y"], known, opset=opset)


WEIGHT = RNG.integers(-100, 100, (4, 3)).astype(np.int8)
PRECISIONS = {
    "weights in float16": [
        node("DequantizeLinear", ["w", "t"], ["h"], output_dtype=TensorProto.FLOAT16),
        node("Cast", ["h"], ["v"], to=TensorProto.FLOAT),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("MatMul", ["d", "v"], ["y"]),
    ],
    "scales in float16": [
        node("Cast", ["t"], ["t16"], to=TensorProto.FLOAT16),
        node("DequantizeLinear", ["w", "t16"], ["v"], output_dtype=TensorProto.FLOAT),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("MatMul", ["d", "v"], ["y"]),
    ],
    "activations in float16": [
        node("DequantizeLinear", ["w", "t"], ["v"]),
        node("DequantizeLinear", ["q", "s", "z"], ["h"], output_dtype=TensorProto.FLOAT16),
        node("Cast", ["h"], ["d"], to=TensorProto.FLOAT),
        node("MatMul", ["d", "v"], ["y"]),
    ],
    "values scaled before a product": [
        node("DequantizeLinear", ["w", "t"], ["v"]),
        node("DequantizeLinear", ["q", "s", "z"], ["h"]),
        node("Mul", ["h", "c"], ["d"]),
        node("MatMul", ["d", "v"], ["y"]),
    ],
    "integers read in other steps": [
        node("DequantizeLinear", ["w", "t"], ["v"]),
        node("DequantizeLinear", ["q", "t"], ["d"]),
        node("MatMul", ["d", "v"], ["y"]),
    ],
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_grids_survive_other_precisions_and_other_steps(name):
    """To the error of float16: no weight is quantized again, and no table is needed."""
    nodes = PRECISIONS[name]
    factor = {"c": np.float32(1.7)} if "Mul" in {n.op_type for n in nodes} else {}
    proto = dequantized(*nodes, w=WEIGHT, t=np.float32(0.0625 / 3), **factor)
    graph, x = fheq.import_onnx(proto), tensor(60, 4, low=-2, high=2)
    (want,) = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x})
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x)))
    assert not program.lookups
    np.testing.assert_allclose(fheq.evaluate(graph, x), want, atol=1e-4)
    np.testing.assert_allclose(answers(program, x), want, atol=2e-3 * np.abs(want).max())


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("scale", [2.0, 1.5])
def test_integers_that_are_interpolated_are_cut_off(kind, scale):
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("Resize", ["q", "", "by"], ["r"], mode="linear"),
        node("DequantizeLinear", ["r", "s", "z"], ["y"]),
    ]
    known = {"s": np.float32(1 / 32), "z": kind(100), "by": np.float32([1, 1, scale, scale])}
    proto = model(nodes, {"x": ["N", 1, 4, 4]}, ["y"], known, opset=19)
    x = RNG.normal(size=(60, 1, 4, 4)).astype(np.float32)
    want = session(proto).run(None, {"x": x})[0]
    graph = fheq.import_onnx(proto)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), 8))
    evaluated, simulated = np.asarray(fheq.evaluate(graph, x)), answers(program, x)
    if kind is np.int8:  # cut off toward an integer that is not the real 0: the model states no quantizer of this kind
        assert np.max(np.abs(simulated - want)) < 2 / 32
    for got in (evaluated, simulated) if kind is np.uint8 else (evaluated,):
        apart = np.abs(got - want)
        assert np.max(apart) < 1.01 / 32  # a step, where whole numbers of thirds are a little less in floating point
        assert np.mean(apart > 1e-6) < (0.02 if scale == 1.5 else 1e-9)


def test_quotients_of_low_precision_are_refused_by_name():
    first = node("QuantizeLinear", ["x", "t", "u"], ["r"], precision=TensorProto.FLOAT16)
    last = node("DequantizeLinear", ["r", "t", "u"], ["y"])
    with pytest.raises(UnsupportedError, match=r"'make_r'.*float16.*precision.*make it FLOAT"):
        fheq.import_onnx(dequantized(first, last, t=np.float32(0.1), u=np.int8(0)))


def test_a_scale_per_block_of_channels_is_one_per_channel():
    last = {"axis": 1, "block_size": 2}
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], **last),
        node("DequantizeLinear", ["q", "s", "z"], ["d"], **last),
        node("MatMul", ["d", "w"], ["y"]),
    ]
    known = {"s": np.float32([[0.01, 0.02]]), "z": np.int8([[0, 3]]), "w": np.eye(4, dtype=np.float32)}
    graph, x = fheq.import_onnx(model(nodes, {"x": [1, 4]}, ["y"], known, opset=21)), tensor(60, 4, low=-2, high=2)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), {"op_inputs": 8, "op_weights": 12}))
    scale, zero = np.repeat(known["s"], 2, axis=1), np.repeat(known["z"], 2, axis=1)
    want = scale * (np.clip(np.round(x / scale) + zero, -128, 127) - zero)
    np.testing.assert_allclose(answers(program, x), want, atol=2e-3)


def recurrent_or_attention(op: str) -> onnx.ModelProto:
    """x (N, 3, 4) through an LSTM or an attention of two heads to y."""
    if op == "LSTM":
        nodes = [
            node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
            node("LSTM", ["t", "w", "r", "b"], ["", "h"], hidden_size=3),
            node("Squeeze", ["h", "axis"], ["y"]),
        ]
        known = {"w": tensor(1, 12, 4), "r": tensor(1, 12, 3), "b": tensor(1, 24), "axis": np.array([0])}
    else:
        nodes = [node("Attention", ["x", "w", "b"], ["y"], domain="com.microsoft", num_heads=2)]
        known = {"w": tensor(4, 12), "b": tensor(12)}
    return model(nodes, {"x": ["N", 3, 4]}, ["y"], known, domains={"com.microsoft": 1})


@pytest.mark.parametrize(("op", "per_channel"), [("LSTM", False), ("LSTM", True), ("Attention", False)])
def test_recurrence_and_attention_that_onnxruntime_quantized(tmp_path, op, per_channel):
    """Against onnxruntime on the float model: weights are off by half of one step in 255, activations by as much."""
    proto = recurrent_or_attention(op)
    onnx.save(proto, tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "out.onnx", weight_type=QuantType.QUInt8, per_channel=per_channel)
    graph = fheq.import_onnx(tmp_path / "out.onnx")
    x = tensor(40, 3, 4)
    (want,) = session(proto).run(None, {"x": x})
    assert np.abs(np.asarray(fheq.evaluate(graph, x)) - want).max() <= 0.03 * np.ptp(want)
    assert any(name in graph.pinned for name in graph.constants)
    assert fheq.check(graph) == []


def test_what_has_no_parts_is_refused_with_what_to_do():
    made = node("QLinearConvTranspose", ["x"], ["y"], domain="com.microsoft")
    with pytest.raises(UnsupportedError, match=r"'make_y'.*QDQ"):
        fheq.import_onnx(model([made], {"x": ["N", 3]}, ["y"], domains={"com.microsoft": 1}))


@pytest.mark.parametrize("n_bits", [None, 8])
@pytest.mark.parametrize("op", ["MatMulInteger", "ConvInteger"])
def test_integers_that_a_model_gives_are_accumulators_themselves(op: str, n_bits: int | None) -> None:
    """Of 16 bits and more: a table could not hold them."""
    rng = np.random.default_rng(0)
    shape, weight = ((4,), (4, 3)) if op == "MatMulInteger" else ((2, 4, 4), (3, 2, 3, 3))
    known = {"s": np.float32(0.02), "z": np.uint8(120), "w": rng.integers(-128, 128, weight).astype(np.int8)}
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node(op, ["q", "w", "z"], ["y"])]
    proto = model(nodes, {"x": ["N", *shape]}, ["y"], known, opset=21, kinds={"y": TensorProto.INT32})
    x = rng.normal(size=(200, *shape)).astype(np.float32)
    graph = fheq.import_onnx(proto)
    spec = fheq.Spec(n_bits, accumulators=fheq.AccumulatorRange.WORST_CASE)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), spec))
    (got,) = program.dequantize(fheq.simulate(program, *program.quantize(x)))
    (want,) = session(proto).run(None, {"x": x})
    assert not program.lookups and got.dtype == np.int32
    np.testing.assert_array_equal(got, want)
