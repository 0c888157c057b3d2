"""Quantizers that a model states: what is pinned, and that the values stay."""

from __future__ import annotations

import numpy as np
import pytest
from build_models import model, node, reference, tensor

import fheq
from fheq.affine import fake_quant, quantize, validate
from fheq.errors import ModelError, UnsupportedError
from fheq.graph import Graph, Node, Port, TensorType
from fheq.qat import normalise_quantizers
from fheq.spec import BitsError

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
BREVITAS = "onnx.brevitas"
QONNX = "qonnx.custom_op.general"
ATTRS = {"signed": 1, "narrow": 0, "rounding_mode": "ROUND"}


def quant(source, target, scale="s", zero="z", bits="bits", domain=BREVITAS, **attrs):
    return node("Quant", [source, scale, zero, bits], [target], domain=domain, **{**ATTRS, **attrs})


def known(scale=0.25, bits=4.0, zero=0.0, **more):
    return {"s": np.float32(scale), "z": np.float32(zero), "bits": np.float32(bits), **more}


def load(nodes, constants, shape=("N", 3), outputs=("y",)):
    return fheq.import_onnx(model(nodes, {"x": shape}, outputs, constants, domains={BREVITAS: 1, QONNX: 1}))


def limits(affine):
    return int(affine.qmin), int(affine.qmax)


@pytest.mark.parametrize(
    ("signed", "narrow", "range_"), [(1, 0, (-8, 7)), (1, 1, (-7, 7)), (0, 0, (0, 15)), (0, 1, (0, 14))]
)
@pytest.mark.parametrize("domain", [BREVITAS, QONNX])
def test_computed_tensor(domain, signed, narrow, range_):
    graph = load([quant("x", "y", domain=domain, signed=signed, narrow=narrow)], known())
    (only,) = graph.nodes
    assert (only.domain, only.op, only.version, only.outputs) == ("fheq", "FakeQuant", 1, ("y",))
    assert set(only.inputs[1:]) <= set(graph.constants)
    affine = graph.pinned["y"]
    assert (float(affine.scale), limits(affine), affine.axis, affine.signed) == (0.25, range_, None, bool(signed))
    x = tensor(50, 3, low=-6, high=6)
    want = 0.25 * np.clip(np.round(x / 0.25), *range_)
    np.testing.assert_allclose(fheq.evaluate(graph, x), want, atol=1e-6)
    np.testing.assert_allclose(fake_quant(affine, x), want, atol=1e-6)
    validate(affine, "y")


@pytest.mark.parametrize(("mode", "function"), [("FLOOR", np.floor), ("CEIL", np.ceil), ("ROUND_TO_ZERO", np.trunc)])
def test_rounding_modes(mode, function):
    graph = load([quant("x", "y", rounding_mode=mode)], known())
    x = tensor(50, 3, low=-3, high=3)
    np.testing.assert_allclose(fheq.evaluate(graph, x), 0.25 * np.clip(function(x / 0.25), -8, 7), atol=1e-6)
    with pytest.raises(UnsupportedError, match=r"'make_y'.*SIDEWAYS"):
        load([quant("x", "y", rounding_mode="SIDEWAYS")], known())


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("mode", ["ROUND", "FLOOR", "CEIL", "ROUND_TO_ZERO", "UP", "HALF_UP", "HALF_DOWN"])
def test_inputs_are_encoded_in_the_mode_that_the_model_states(mode, zero):
    """Quarters, eighths and what lies between: values on the grid, ties and others, of both signs."""
    graph = load([quant("x", "y", rounding_mode=mode)], known(zero=zero))
    x = np.concatenate([np.arange(-24, 25) / 8, tensor(48, low=-3, high=3), [0, 1]]).astype(np.float32).reshape(-1, 3)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), 5))
    assert not program.lookups
    (y,) = program.dequantize(fheq.simulate(program, *program.quantize(x)))
    np.testing.assert_allclose(y, fheq.evaluate(graph, x), atol=1e-6)
    np.testing.assert_allclose(fheq.fake_quant(graph, fheq.fit(graph, fheq.calibrate(graph, x), 5), x), y, atol=1e-6)


def test_known_tensor_through_transpose():
    scales = np.float32([[0.1], [0.2], [0.3]])
    weights = tensor(3, 2)
    nodes = [
        quant("w", "q", scale="sw", narrow=1),
        node("Transpose", ["q"], ["t"], perm=[1, 0]),
        node("MatMul", ["v", "t"], ["y"]),
    ]
    nodes.insert(0, node("MatMul", ["x", "u"], ["v"]))
    graph = load(nodes, known(w=weights, sw=scales, u=tensor(3, 2)))
    affine = graph.pinned["t"]
    assert [n.op for n in graph.nodes] == ["MatMul", "MatMul"]
    assert (affine.axis, limits(affine)) == (-1, (-7, 7))
    np.testing.assert_allclose(affine.scale, scales.ravel())
    want = (scales * np.clip(np.round(weights / scales), -7, 7)).T
    np.testing.assert_allclose(graph.constants["t"], want, atol=1e-6)
    np.testing.assert_allclose(affine.dequantize(quantize(affine, graph.constants["t"])), want, atol=1e-6)


def test_range_of_weights_that_brevitas_declares_wrongly():
    for integers, range_ in (([-8, 7, 0], (-8, 7)), ([-9, 3, 0], (-9, 7)), ([1, 5, 14], (0, 14))):
        weights = np.float32(integers)[:, None] * np.float32(0.25)
        graph = load([quant("w", "q", signed=0, narrow=1), node("MatMul", ["x", "q"], ["y"])], known(w=weights))
        np.testing.assert_array_equal(graph.constants["q"], weights)
        assert limits(graph.pinned["q"]) == range_
    weights = np.float32([[-0.3], [0.6], [9.0]])  # on no grid: clipped as declared
    graph = load([quant("w", "q", signed=0, narrow=1), node("MatMul", ["x", "q"], ["y"])], known(w=weights))
    np.testing.assert_array_equal(graph.constants["q"].ravel(), np.float32([0, 0.5, 3.5]))


def test_bias_is_folded_without_a_pin():
    nodes = [quant("b", "c"), node("Gemm", ["x", "w", "c"], ["y"])]
    graph = load(nodes, known(b=np.float32([0.3, 0.1]), w=tensor(3, 2)))
    np.testing.assert_array_equal(graph.constants["c"], np.float32([0.25, 0]))
    assert not graph.pinned


def test_batch_norm_leaves_pinned_weights():
    statistics = {name: tensor(2, low=0.5) for name in ("g", "be", "m", "v")}
    nodes = [quant("w", "q"), node("MatMul", ["x", "q"], ["h"]), node("BatchNormalization", ["h", *statistics], ["y"])]
    graph = load(nodes, known(w=tensor(3, 2), **statistics))
    assert [n.op for n in graph.nodes] == ["MatMul", "Mul", "Add"]
    assert "q" in graph.pinned


def test_bipolar():
    nodes = [node("BipolarQuant", ["x", "s"], ["h"], domain=QONNX), node("BipolarQuant", ["w", "s"], ["q"], domain=QONNX)]
    graph = load([*nodes, node("MatMul", ["h", "q"], ["y"])], known(w=tensor(3, 2)))
    assert [n.op for n in graph.nodes] == ["FakeQuant", "MatMul"]
    assert limits(graph.pinned["h"]) == limits(graph.pinned["q"]) == (-1, 1)
    x = tensor(5, 3)
    want = np.where(x >= 0, 0.25, -0.25) @ graph.constants["q"]
    np.testing.assert_allclose(fheq.evaluate(graph, x), want, atol=1e-6)
    np.testing.assert_array_equal(np.abs(graph.constants["q"]), 0.25)


QDQ = {
    "s": np.float32(0.05),
    "z": np.uint8(120),
    "w": np.int8([[1, -2], [127, 4], [-128, 6]]),
    "sw": np.float32([0.1, 0.02]),
    "zw": np.int8([0, 5]),
    "b": np.int32([100, -7]),
    "sb": np.float32([0.005, 0.001]),
}


def qdq_nodes():
    return [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("DequantizeLinear", ["w", "sw", "zw"], ["v"], axis=1),
        node("DequantizeLinear", ["b", "sb"], ["c"], axis=0),
        node("Gemm", ["d", "v", "c"], ["y"]),
    ]


def test_quantize_dequantize_pairs():
    proto = model(qdq_nodes(), {"x": ["N", 3]}, ["y"], QDQ)
    graph = fheq.import_onnx(proto)
    assert [n.op for n in graph.nodes] == ["FakeQuant", "Gemm"]
    assert set(graph.pinned) == {"d", "v"}
    assert (limits(graph.pinned["d"]), int(graph.pinned["d"].zero_point)) == ((0, 255), 120)
    assert (limits(graph.pinned["v"]), graph.pinned["v"].axis) == ((-128, 127), -1)
    np.testing.assert_array_equal(quantize(graph.pinned["v"], graph.constants["v"]), QDQ["w"])
    x = tensor(9, 3, low=-10, high=10)
    np.testing.assert_allclose(fheq.evaluate(graph, x), reference(proto, x)[0], rtol=1e-5, atol=1e-5)


def test_pairs_per_channel_and_integers_that_are_read_elsewhere():
    constants = {"s": np.float32([0.1, 0.2, 0.3]), "z": np.int8([0, 1, 2])}
    nodes = [
        node(op, [a, "s", "z"], [b], axis=1) for op, a, b in (("QuantizeLinear", "x", "q"), ("DequantizeLinear", "q", "y"))
    ]
    graph = load(nodes, constants, outputs=("y", "q"))
    assert [n.op for n in graph.nodes] == ["QuantizeLinear", "FakeQuant"]
    assert (graph.pinned["y"].axis, graph.pinned["y"].scale.shape) == (-1, (3,))
    values, integers = fheq.evaluate(graph, tensor(9, 3, low=-50, high=50))
    np.testing.assert_allclose(values, constants["s"] * (integers.astype(float) - constants["z"]), rtol=1e-6)


def test_a_pair_with_different_scales_is_none_but_integers_in_other_steps():
    constants = {"s": np.float32(0.1), "s2": np.float32(0.2), "z": np.int8(0)}
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s2", "z"], ["y"])]
    graph = load(nodes, constants)
    x = tensor(50, 3, low=-20, high=20)
    np.testing.assert_allclose(fheq.evaluate(graph, x), reference(model(nodes, {"x": ["N", 3]}, ["y"], constants), x)[0])
    assert float(graph.pinned["y"].scale) == constants["s2"] and limits(graph.pinned["y"]) == (-128, 127)


def test_refusals():
    for name, value, error in (
        ("bits", 2.5, UnsupportedError),
        ("bits", 64, UnsupportedError),
        ("s", 0, ModelError),
        ("s", -1, ModelError),
        ("s", np.inf, ModelError),
        ("z", 0.5, UnsupportedError),
        ("s", [[1, 2, 3]] * 2, UnsupportedError),
    ):
        with pytest.raises(error, match="'make_y'"):
            load([quant("x", "y")], known() | {name: np.float32(value)}, shape=(2, 3))
    with pytest.raises(UnsupportedError, match=r"'make_y'.*computed from data"):
        load([node("ReduceMax", ["x"], ["m"], keepdims=0), quant("x", "y", scale="m")], known())


def test_a_graph_made_by_hand():
    kind = TensorType((1, 2), np.dtype(np.float32))
    constants = {"w": np.float32([[0.3, -0.6]]), **known()}
    nodes = (
        Node("first", "Quant", ("w", "s", "z", "bits"), ("q",), ATTRS, BREVITAS, 1),
        Node("second", "Quant", ("x", "s", "z", "bits"), ("h",), ATTRS, BREVITAS, 1),
        Node("third", "Mul", ("h", "q"), ("y",), {}, "", 17),
    )
    types = {"x": kind, "q": kind, "h": kind, "y": kind}
    types |= {name: TensorType(value.shape, value.dtype) for name, value in constants.items()}
    graph = normalise_quantizers(Graph(nodes, (Port("x", kind),), (Port("y", kind),), constants, types))
    assert [n.op for n in graph.nodes] == ["FakeQuant", "Mul"]
    assert set(graph.pinned) == {"q", "h"}
    np.testing.assert_array_equal(graph.constants["q"], np.float32([[0.25, -0.5]]))


@pytest.mark.parametrize("bits", [None, {"n_bits": 4}])
@pytest.mark.parametrize(
    ("nodes", "named"),
    [
        ([node("MatMul", ["x", "w"], ["y"])], "tensor 'x' has no quantizer"),
        ([quant("x", "q"), node("MatMul", ["q", "w"], ["y"])], "weight 'w' of node 'make_y'"),
        ([quant("x", "q"), node("Sigmoid", ["q"], ["y"])], "tensor 'y', made by node 'make_y'"),
    ],
)
def test_what_the_model_leaves_open_needs_bits_and_is_named(nodes, named, bits):
    read = {name for n in nodes for name in n.input}
    graph, x = load(nodes, {k: v for k, v in known(w=tensor(3, 2)).items() if k in read}), tensor(60, 3)
    stats = fheq.calibrate(graph, x)
    if bits is None:
        with pytest.raises(BitsError, match=f"{named}.*give n_bits"):
            fheq.fit(graph, stats)
    else:
        fheq.fit(graph, stats, fheq.Spec(**bits))


def test_bits_of_an_override_are_bits_for_what_the_model_leaves_open():
    graph, x = load([quant("x", "q"), node("MatMul", ["q", "w"], ["y"])], known(w=tensor(3, 2))), tensor(60, 3)
    spec = fheq.Spec(None, overrides={"w": fheq.Override(n_bits=3)})
    weight = fheq.fit(graph, fheq.calibrate(graph, x), spec).weights["w"]
    assert np.max(weight.qmax - weight.qmin) < 2**3


@pytest.mark.parametrize("step", [2.0, 4.0])
@pytest.mark.parametrize("approximate", [False, True])
def test_powers_of_two_lose_ties_alone_to_rounding(step, approximate):
    """Cells end where the steps of the activation do, two or four cells to a step: a circuit that removes these bits answers
    as the exact one, but for halves, which it rounds up and not to the even."""
    rng = np.random.default_rng(0)
    weights = rng.integers(-7, 8, (6, 5)) / 16
    constants = known(2.0) | {"t": np.float32(step), "w": weights.astype(np.float32), "v": np.eye(5, dtype=np.float32)}
    constants |= {"b": (rng.integers(-20, 21, 5) / 8).astype(np.float32), "i": np.float32(1.0), "d": np.float32(1 / 16)}
    nodes = [
        quant("x", "xq"),
        quant("w", "wq", scale="d"),
        node("MatMul", ["xq", "wq"], ["m"]),
        node("Add", ["m", "b"], ["a"]),
        node("Relu", ["a"], ["r"]),
        quant("r", "q", scale="t"),
        quant("v", "vq", scale="i"),
        node("MatMul", ["q", "vq"], ["y"]),
    ]
    graph = load(nodes, constants, ("N", 6))
    x = (2.0 * rng.integers(-8, 8, (400, 6))).astype(np.float32)
    stats = fheq.calibrate(graph, x)
    answers, removed, tables = [], [], []
    for rounding in (None, fheq.Rounding(6, approximate=approximate)):
        qparams = fheq.fit(graph, stats, fheq.Spec(None, rounding=rounding))
        program = fheq.lower(graph, qparams)
        answers.append(program.dequantize(fheq.simulate(program, *program.quantize(x)))[0])
        removed.append(int(qparams.accumulators["m"].lsbs))
        tables.append([lookup.bits for lookup in program.lookups])
        np.testing.assert_array_equal(np.asarray(fheq.fake_quant(graph, qparams, x)), answers[-1])
    assert removed == [0, 3]  # of steps of 1/8
    assert tables[0] == [5, 5]  # of 9 bits, less 4: one table for the direction of ties, and one for what is left
    steps = np.round(np.maximum(x @ weights + constants["b"], 0) / step)
    np.testing.assert_array_equal(answers[0], step * np.minimum(steps, np.max(answers[0]) / step))
    halves = np.mod((x @ weights + constants["b"]) / step, 1) == 0.5
    np.testing.assert_array_equal(answers[0][~halves], answers[1][~halves])
    assert halves.any() and np.all(answers[1] - answers[0] <= step) and np.all(answers[1] >= answers[0])
