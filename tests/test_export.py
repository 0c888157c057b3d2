"""Quantized models out and in again: onnxruntime computes what fake_quant does, and import finds the same program."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
from build_models import mlp, model, node, tensor
from exported_models import MODELS
from ml_dtypes import bfloat16
from models import as_tuple

import fheq
from fheq import AccumulatorRange, Granularity, Rounding, Spec
from fheq.affine import LEAVES
from fheq.errors import ModelError, UnsupportedError
from fheq.planning.plan import plan

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")


def differences(a: fheq.IntProgram, b: fheq.IntProgram) -> list[str]:
    """Where two programs differ, the names of their values apart; decoders by no more than float32, in which a model says
    what they are made from."""
    names = ("out", "args", "origin", "accumulator")
    if [type(i) for i in a.instructions] != [type(i) for i in b.instructions]:
        return ["instructions"]
    whole = lambda entry: entry.affine.expanded(len(entry.port.type.shape))
    leaves = lambda e: [np.broadcast_to(getattr(whole(e), leaf), e.port.type.shape) for leaf in LEAVES]
    close = lambda x, y: np.allclose(x, y, rtol=2.0**-24, atol=0)
    ports = zip((*a.inputs, *a.outputs), (*b.inputs, *b.outputs), strict=True)
    return [
        f"{type(i).__name__}.{f.name}"
        for i, j in zip(a.instructions, b.instructions)
        for f in dataclasses.fields(i)
        if f.name not in names and not np.array_equal(getattr(i, f.name), getattr(j, f.name))
    ] + [i.port.name for i, j in ports if not all(map(close, leaves(i), leaves(j)))]


def run(proto: onnx.ModelProto, x: np.ndarray, *, optimised: bool = False) -> np.ndarray:
    """onnxruntime on all samples at once, as the nodes say or with all that it makes of them by default."""
    options = onnxruntime.SessionOptions()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


SPECS = {
    "3 bits, worst case": Spec(3, accumulators=AccumulatorRange.WORST_CASE),
    "4 bits, per tensor": Spec(4, activations=Granularity.PER_TENSOR),
    "7 bits, both per tensor": Spec(7, activations=Granularity.PER_TENSOR, weights=Granularity.PER_TENSOR),
    "8 bits": Spec(8),
    "8 bits, rounded": Spec(8, rounding=Rounding(5)),
    "6 bits, rounded approximately": Spec(6, rounding=Rounding(4, approximate=True)),
}


TRIED = [
    *(("mlp", how) for how in SPECS),
    ("cnn", "4 bits, per tensor"),
    ("cnn", "8 bits, rounded"),
    ("residual", "3 bits, worst case"),
    ("residual", "8 bits"),
    ("joined", "6 bits, rounded approximately"),
    ("looked up", "4 bits, per tensor"),
    ("opposite columns", "8 bits"),
    ("several forms", "8 bits, rounded"),
    ("layers added", "6 bits, rounded approximately"),
    ("layers added", "8 bits, rounded"),
    ("dead channel", "6 bits, rounded approximately"),
    ("dead channel", "7 bits, both per tensor"),
    ("skips", "6 bits, rounded approximately"),
    ("decrypted", "8 bits, rounded"),
    ("pads", "8 bits, rounded"),
    ("known channels", "8 bits, rounded"),
    ("pixels", "8 bits"),
    ("pixels", "4 bits, per tensor"),
    ("token", "8 bits, rounded"),
    ("recurrent", "8 bits"),
    ("whole results", "6 bits, rounded approximately"),
    ("choice of functions", "6 bits, rounded approximately"),
    ("quantized by the client", "6 bits, rounded approximately"),
    ("sign of a difference", "4 bits, per tensor"),
    ("pooled", "8 bits"),
    ("pooled", "6 bits, rounded approximately"),
    ("bottlenecks", "8 bits"),
    ("bottlenecks", "6 bits, rounded approximately"),
    ("heads", "8 bits, rounded"),
    ("heads", "6 bits, rounded approximately"),
    ("functions of joined layers", "4 bits, per tensor"),
    ("functions of joined layers", "6 bits, rounded approximately"),
    ("weighed inputs", "8 bits"),
    ("negated sums", "8 bits"),
    ("negated sums", "6 bits, rounded approximately"),
]


@pytest.mark.parametrize(("name", "how"), TRIED)
def test_the_exported_model_is_the_quantized_one_and_comes_back_as_the_same_program(name, how):
    proto, shape = MODELS[name]
    graph = fheq.import_onnx(proto)
    kind, rng = graph.inputs[0].type.dtype, np.random.default_rng(0)
    whole = kind.kind in "iu"
    x = rng.integers(0, 5 if kind.kind == "i" else 256, (60, *shape)) if whole else rng.normal(size=(60, *shape))
    x = x.astype(kind)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), SPECS[how])
    exported = fheq.export_qdq(graph, qparams)
    onnx.checker.check_model(exported, full_check=True)
    want = np.asarray(as_tuple(fheq.fake_quant(graph, qparams, x))[0])
    again = fheq.import_onnx(exported)
    for got in (run(exported, x), run(exported, x, optimised=True), np.asarray(as_tuple(fheq.evaluate(again, x))[0])):
        wrong = np.abs(got - want) > 1e-5 * np.abs(want).max()
        assert wrong.mean() <= 0.01  # a value on a rounding tie, which float32 decides
    other = Spec(5, activations=Granularity.PER_TENSOR)  # nothing is left for it to decide
    program = fheq.lower(again, fheq.fit(again, fheq.calibrate(again, x[:8]), other))
    assert differences(fheq.lower(graph, qparams), program) == []


@pytest.mark.parametrize("mode", ["FLOOR", "CEIL", "SIGN"])
def test_inputs_that_are_not_rounded_to_the_nearest_stay_so(mode):
    domain = "qonnx.custom_op.general"
    if mode == "SIGN":
        first = node("BipolarQuant", ["x", "s"], ["q"], domain=domain)
    else:
        first = node("Quant", ["x", "s", "z", "bits"], ["q"], domain=domain, signed=1, narrow=0, rounding_mode=mode)
    known = {"s": np.float32(0.3), "z": np.float32(0), "bits": np.float32(4), "w": tensor(4, 2)}
    known = {name: value for name, value in known.items() if name in first.input or name == "w"}
    proto = model([first, node("MatMul", ["q", "w"], ["y"])], {"x": ["N", 4]}, ["y"], known, domains={domain: 1})
    graph, x = fheq.import_onnx(proto), tensor(60, 4, low=-2, high=2)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 6)
    exported = fheq.export_qdq(graph, qparams)
    np.testing.assert_allclose(run(exported, x), fheq.fake_quant(graph, qparams, x), atol=1e-5)
    again = fheq.import_onnx(exported)
    program = fheq.lower(again, fheq.fit(again, fheq.calibrate(again, x[:2]), 3))
    assert differences(fheq.lower(graph, qparams), program) == []


@pytest.mark.parametrize(
    ("part", "value"), [("cell", np.float64(3)), ("scale", np.float64(-1)), ("qmax", np.float64(-1))], ids=str
)
def test_a_damaged_accumulator_is_refused_by_name(part, value):
    graph = fheq.import_onnx(mlp())
    exported = fheq.export_qdq(graph, fheq.fit(graph, fheq.calibrate(graph, tensor(60, 4)), 8))
    damaged = next(t for t in exported.graph.initializer if t.name == f"h/{part}")
    damaged.CopyFrom(onnx.numpy_helper.from_array(value, damaged.name))
    with pytest.raises(ModelError, match=r"'h'.*export the model again"):
        plan(fheq.import_onnx(exported))


def test_an_accumulator_stated_in_other_steps_than_its_sums_is_fitted_anew():
    """The weights of the file were exchanged; what was said of the range of their sums holds no longer."""
    graph, x = fheq.import_onnx(mlp()), tensor(60, 4)
    exported = fheq.export_qdq(graph, fheq.fit(graph, fheq.calibrate(graph, x), 4))
    scale = next(t for t in exported.graph.initializer if t.name == "w1/real/scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(scale), scale.name))
    again = fheq.import_onnx(exported)
    stats = fheq.calibrate(again, x)
    plain = fheq.fit(graph, fheq.calibrate(graph, x), 4).accumulators["h"]
    found = fheq.fit(again, stats, 4).accumulators["h/sum"]
    np.testing.assert_allclose(found.scale, 2 * plain.scale)


def test_an_exported_model_needs_no_bits():
    """Also not for integers in steps of 1, for the scores of a softmax, and for inputs that nothing reads."""
    nodes = [
        node("Gather", ["table", "ids"], ["e"]),
        node("Softmax", ["e"], ["p"]),
        node("MatMul", ["p", "w"], ["m"]),
        node("Mod", ["ids", "k"], ["r"]),
        node("ReduceMax", ["r"], ["top"], keepdims=1),
        node("Cast", ["top"], ["f"], to=1),
        node("ReduceSum", ["m", "last"], ["s"], keepdims=0),
        node("Add", ["s", "f"], ["y"]),
    ]
    known = {"table": tensor(5, 3), "w": tensor(3, 2), "k": np.array(3), "last": np.array([2])}
    inputs = {"ids": ["N", 2], "unread": ["N", 4]}
    graph = fheq.import_onnx(model(nodes, inputs, ["y"], known, kinds={"ids": onnx.TensorProto.INT64}))
    ids, unread = np.random.default_rng(0).integers(0, 5, (60, 2)), tensor(60, 4)
    qparams = fheq.fit(graph, fheq.calibrate(graph, ids, unread), 6)
    again = fheq.import_onnx(fheq.export_qdq(graph, qparams))
    programs = [
        fheq.lower(graph, qparams),
        fheq.lower(again, fheq.fit(again, fheq.calibrate(again, ids, unread))),
    ]
    a, b = (fheq.simulate(program, *program.quantize(ids, unread)) for program in programs)
    np.testing.assert_array_equal(a, b)


def test_zero_points_far_from_the_range_need_more_than_sixteen_bits():
    """Gates that hardly vary: 0.5 is some 10^6 of their steps."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("HardSigmoid", ["a"], ["g"]),
        node("MatMul", ["g", "v"], ["y"]),
    ]
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 4]}, ["y"], {"w": 1e-4 * tensor(4, 4), "v": tensor(4, 2)}))
    x = tensor(60, 4)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 8)
    assert np.max(np.abs(qparams.tensors["g"].zero_point)) > 2**16
    exported = fheq.export_qdq(graph, qparams)
    want = np.asarray(fheq.fake_quant(graph, qparams, x))
    assert np.mean(np.abs(run(exported, x) - want) > 1e-2 * np.abs(want).max()) <= 0.01
    again = fheq.import_onnx(exported)
    program = fheq.lower(again, fheq.fit(again, fheq.calibrate(again, x[:2]), 3))
    assert differences(fheq.lower(graph, qparams), program) == []


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_precisions_and_an_output_that_is_an_input(dtype):
    """They come out in the model's type; the input keeps its name, and the output gets another one."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Tanh", ["m"], ["t"]), node("Softmax", ["t"], ["y"])]
    kinds = {"x": kind, "y": kind}
    proto = model(nodes, {"x": ["N", 4]}, ["y", "x"], {"w": tensor(4, 3).astype(dtype)}, kinds=kinds)
    graph, x = fheq.import_onnx(proto), tensor(60, 4).astype(dtype)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 6)
    session = onnxruntime.InferenceSession(fheq.export_qdq(graph, qparams).SerializeToString())
    assert [o.name for o in session.get_outputs()] == ["y", "x/decrypted"]
    for got, want in zip(session.run(None, {"x": x[:1]}), fheq.fake_quant(graph, qparams, x[:1]), strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got, want, atol=2e-3)


def test_bfloat16_is_computed_in_float32():
    """onnxruntime quantizes none of it; its bindings give no arrays of it either, so that the output is cast here."""
    kind = onnx.TensorProto.BFLOAT16
    proto = model(
        [node("MatMul", ["x", "w"], ["m"]), node("Relu", ["m"], ["y"])],
        {"x": ["N", 4]},
        ["y"],
        {"w": tensor(4, 3).astype(bfloat16)},
        kinds={"x": kind, "y": kind},
    )
    graph, x = fheq.import_onnx(proto), tensor(60, 4).astype(bfloat16)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 6)
    exported = fheq.export_qdq(graph, qparams)
    exported.graph.node.append(node("Cast", ["y"], ["z"], to=onnx.TensorProto.FLOAT))
    exported.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["N", 3]))
    session = onnxruntime.InferenceSession(exported.SerializeToString())
    given = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(x.view(np.uint16), kind)
    (got,) = session.run_with_ort_values(["z"], {"x": given})
    want = np.asarray(fheq.fake_quant(graph, qparams, x)).astype(bfloat16)
    np.testing.assert_allclose(got.numpy(), want.astype(np.float32), rtol=2**-8)


def test_samples_along_another_axis_of_the_output_stay_there():
    known = {"w": tensor(4, 3), "first": np.array([0])}
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Relu", ["m"], ["r"]), node("Unsqueeze", ["r", "first"], ["y"])]
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 4]}, ["y"], known))
    again = fheq.import_onnx(fheq.export_qdq(graph, fheq.fit(graph, fheq.calibrate(graph, tensor(60, 4)), 3)))
    assert [port.batch_axis for port in again.outputs] == [port.batch_axis for port in graph.outputs] == [1]


MIXED = {
    "softmax": [node("Softmax", ["h"], ["y"], axis=0)],
    "in order of time": [
        node("Relu", ["h"], ["n"]),
        node("Reshape", ["n", "apart"], ["a"]),
        node("Transpose", ["a"], ["t"], perm=[1, 0, 2]),
        node("Reshape", ["t", "rows"], ["r"]),
        node("MatMul", ["r", "v"], ["m"]),
        node("Relu", ["m"], ["y"]),
    ],
}


@pytest.mark.parametrize("nodes", MIXED.values(), ids=MIXED)
def test_a_model_that_joins_samples_is_exported_for_one(nodes):
    known = {"w": tensor(3, 4), "v": tensor(2, 2), "apart": np.array([1, 2, 2]), "rows": np.array([2, 2])}
    known = {name: value for name, value in known.items() if name == "w" or any(name in n.input for n in nodes)}
    proto = model([node("MatMul", ["x", "w"], ["h"]), *nodes], {"x": [1, 3]}, ["y"], known)
    graph, x = fheq.import_onnx(proto), tensor(60, 3)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 6)
    session = onnxruntime.InferenceSession(fheq.export_qdq(graph, qparams).SerializeToString())
    assert session.get_inputs()[0].shape == [1, 3]
    got = [session.run(None, {"x": row[None]})[0] for row in x]
    want = np.asarray(fheq.fake_quant(graph, qparams, x))
    np.testing.assert_allclose(np.reshape(got, want.shape), want, atol=1e-5 * np.abs(want).max())


APART = {
    "rows in order of time": [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        node("Reshape", ["t", "rows"], ["f"]),
        node("MatMul", ["f", "w"], ["m"]),
        node("Relu", ["m"], ["r"]),
        node("Reshape", ["r", "steps"], ["s"]),
        node("Transpose", ["s"], ["y"], perm=[1, 0, 2]),
    ],
    "scores on top of each other": [
        node("ReduceMax", ["x", "last"], ["a"], keepdims=0),
        node("ReduceMin", ["x", "last"], ["b"], keepdims=0),
        node("MatMul", ["a", "v"], ["c"]),
        node("MatMul", ["b", "v"], ["d"]),
        node("Concat", ["c", "d"], ["e"], axis=0),
        node("Reshape", ["e", "pair"], ["f"]),
        node("Transpose", ["f"], ["g"], perm=[1, 0]),
        node("Relu", ["g"], ["y"]),
    ],
    "a slice that names every axis": [
        node("Slice", ["x", "starts", "ends"], ["s"]),
        node("MatMul", ["s", "w"], ["m"]),
        node("Relu", ["m"], ["y"]),
    ],
    "one-hot of the best": [
        node("ReduceMax", ["x", "last"], ["a"], keepdims=0),
        node("ArgMax", ["a"], ["i"], axis=1, keepdims=0),
        node("OneHot", ["i", "depth", "ends_of_it"], ["o"], axis=-1),
        node("Mul", ["o", "a"], ["y"]),
    ],
}
PLACES = {
    "rows": np.array([3, 2]),
    "steps": np.array([3, 1, 2]),
    "w": tensor(2, 2),
    "v": tensor(3, 1),
    "last": np.array([2]),
    "pair": np.array([2, -1]),
    "starts": np.array([0, 0, 0]),
    "ends": np.array([1, 2, 2]),
    "depth": np.array(3),
    "ends_of_it": np.float32([0, 1]),
}


@pytest.mark.parametrize("nodes", APART.values(), ids=APART)
def test_samples_are_kept_apart_wherever_they_lie(nodes):
    known = {name: value for name, value in PLACES.items() if any(name in n.input for n in nodes)}
    proto = model(nodes, {"x": [1, 3, 2]}, ["y"], known, opset=18)
    graph, x = fheq.import_onnx(proto), tensor(60, 3, 2)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 6)
    session = onnxruntime.InferenceSession(fheq.export_qdq(graph, qparams).SerializeToString())
    (got,) = session.run(None, {"x": x})
    want = np.asarray(fheq.fake_quant(graph, qparams, x))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_onnxruntime_runs_an_exported_product_as_it_does_by_default():
    """Of pairs of 8 bits with a scale per channel its fusions make a product that it then refuses."""
    graph = fheq.import_onnx(model([node("MatMul", ["a", "b"], ["y"])], {"a": ["N", 2, 3], "b": ["N", 3, 2]}, ["y"]))
    a, b = tensor(60, 2, 3), tensor(60, 3, 2)
    qparams = fheq.fit(graph, fheq.calibrate(graph, a, b), 4)
    session = onnxruntime.InferenceSession(fheq.export_qdq(graph, qparams).SerializeToString())
    (got,) = session.run(None, {"a": a, "b": b})
    np.testing.assert_allclose(got, fheq.fake_quant(graph, qparams, a, b), atol=1e-5)


def test_a_tensor_named_as_what_is_written_for_another_is_refused_by_name():
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Sigmoid", ["h"], ["h/scale"]), node("MatMul", ["h/scale", "w"], ["y"])]
    graph, x = fheq.import_onnx(model(nodes, {"x": ["N", 3]}, ["y"], {"w": tensor(3, 3)})), tensor(20, 3)
    with pytest.raises(UnsupportedError, match=r"'h/scale' .*'h': rename it"):
        fheq.export_qdq(graph, fheq.fit(graph, fheq.calibrate(graph, x), 6))


def test_outputs_that_are_known_need_no_encryption() -> None:
    nodes = [node("MatMul", ["x", "w"], ["y"]), node("Relu", ["k"], ["z"])]
    proto = model(nodes, {"x": ["N", 4]}, ["y", "z"], {"w": tensor(4, 3), "k": tensor(3)})
    graph, x = fheq.import_onnx(proto), tensor(60, 4)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 8)
    program = fheq.lower(graph, qparams)
    assert [entry.name for entry in program.outputs] == ["y"]
    circuit, exported = fheq.compile(program), fheq.export_qdq(graph, qparams)
    known, again = (
        onnxruntime.InferenceSession(m.SerializeToString()).run(["z"], {"x": x[:1]})[0] for m in (proto, exported)
    )
    decrypted = program.dequantize(fheq.simulate(program, *program.quantize(x)))
    for outputs in (decrypted, circuit.evaluate(x), fheq.fake_quant(graph, qparams, x)):
        np.testing.assert_array_equal(outputs[1][0], known)
    np.testing.assert_array_equal(again, known)


def test_operators_that_only_fheq_has_are_functions_of_the_exported_model():
    """SOFTMAX_ZERO, which the client computes, PROBIT and codes by key between tables; onnxruntime runs both models.

    Coupled probabilities are in test_estimators.py.
    """
    ml, known = "ai.onnx.ml", {"w": tensor(4, 3), "v": tensor(1, 2), "u": tensor(3, 2)}
    named = {"classlabels_ints": [0, 1, 2], "coefficients": tensor(12).tolist(), "intercepts": [0.1, 0.2, 0.3], "domain": ml}
    codes = {"keys_floats": [-1.0, 0.0, 1.0], "values_floats": [0.4, 2.0, -1.0], "default_float": 0.0, "domain": ml}
    share = {"coefficients": [0.3, 0.3, 0.3], "intercepts": [0.05], "post_transform": "PROBIT", "domain": ml}
    nodes = [
        node("LinearClassifier", ["x"], ["label", "scores"], post_transform="SOFTMAX_ZERO", **named),
        node("MatMul", ["x", "w"], ["h"]),
        node("Sigmoid", ["h"], ["s"]),
        node("LinearRegressor", ["s"], ["p"], **share),
        node("MatMul", ["p", "v"], ["y"]),
        node("Round", ["h"], ["r"]),
        node("LabelEncoder", ["r"], ["c"], **codes),
        node("MatMul", ["c", "u"], ["z"]),
    ]
    kinds = {"label": onnx.TensorProto.INT64}
    proto = model(nodes, {"x": ["N", 4]}, ["label", "scores", "y", "z"], known, kinds=kinds, domains={ml: 2})
    graph, x = fheq.import_onnx(proto), tensor(100, 4)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 8)
    exported = fheq.export_qdq(graph, qparams)
    onnx.checker.check_model(exported, full_check=True)
    session = onnxruntime.InferenceSession(exported.SerializeToString())
    want = fheq.fake_quant(graph, qparams, x)
    model_says = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})
    for got, quantized, real in zip(session.run(None, {"x": x}), want, model_says, strict=True):
        assert np.mean(np.abs(got - quantized) > 1e-4) <= 0.01
        assert np.mean(np.abs(got - real) > 0.1) <= 0.06  # of codes and labels those next to an edge are others
    again = fheq.import_onnx(exported)
    program = fheq.lower(again, fheq.fit(again, fheq.calibrate(again, x[:2]), 3))
    assert differences(fheq.lower(graph, qparams), program) == []
