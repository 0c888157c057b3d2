"""Float inputs that hold whole numbers (categories, counts, pixels) are quantized without error."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from build_models import model, node, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CASES, as_tuple

import fheq
from fheq import MinMax, Spec
from fheq.fitting.whole_numbers import holding, in_steps_of_one, is_whole
from fheq.observing.statistics import FRACTION, init, update

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
RNG = np.random.default_rng(0)
CATEGORIES = RNG.integers(0, 4, (200, 3)).astype(np.float32)
REAL = RNG.normal(size=(200, 3)).astype(np.float32)


def fitted(nodes: list, spec: Any, **inputs: np.ndarray) -> fheq.QParams:
    known = {"w": RNG.normal(size=(3, 2)).astype(np.float32)}
    known = {name: value for name, value in known.items() if any(name in n.input for n in nodes)}
    proto = model(nodes, {name: ["N", *x.shape[1:]] for name, x in inputs.items()}, [nodes[-1].output[0]], known)
    graph = fheq.import_onnx(proto)
    return fheq.fit(graph, fheq.calibrate(graph, *inputs.values()), spec)


@pytest.mark.parametrize("spec", [2, 8, Spec(8, input_observer=MinMax())], ids=["2 bits", "8 bits", "MinMax"])
def test_categories_take_no_more_bits_than_they_need(spec: Any) -> None:
    """A quarter of them are at either end, which is a limit then."""
    quantizer = fitted([node("MatMul", ["x", "w"], ["y"])], spec, x=CATEGORIES).tensors["x"]
    np.testing.assert_array_equal(quantizer.dequantize(quantizer.quantize(CATEGORIES)), CATEGORIES)
    assert np.all(quantizer.scale == 1) and np.all(quantizer.qmax == 3)


def test_columns_that_are_not_whole_keep_their_bits() -> None:
    mixed = np.where([True, False, True], CATEGORIES, REAL)
    quantizer = fitted([node("MatMul", ["x", "w"], ["y"])], 8, x=mixed).tensors["x"]
    back = quantizer.dequantize(quantizer.quantize(mixed))
    np.testing.assert_allclose(back[:, [0, 2]], mixed[:, [0, 2]], rtol=2.0**-24)  # scales are float32
    assert quantizer.scale[1] < 0.1 and quantizer.qmax[1] > 200


def test_weights_of_whole_columns_leave_bits_to_those_of_others() -> None:
    """Pixels of which some are hardly ever set: equal weights stay equal, so all columns fill about the same integers."""
    pixels = RNG.uniform(0, 1, (200, 3)) * [1, 1, 0]
    pixels[0] = 1
    spec = Spec(6, input_observer=MinMax())
    quantizer = fitted([node("MatMul", ["x", "w"], ["y"])], spec, x=pixels.astype(np.float32)).tensors["x"]
    assert np.max(quantizer.scale) < np.min(quantizer.scale) * (1 + 1 / 63)  # one step more or less for the range


def test_a_column_of_nothing_takes_no_bits_from_others() -> None:
    blank = np.where([True, False, True], REAL, 0).astype(np.float32)
    quantizer = fitted([node("MatMul", ["x", "w"], ["y"])], 6, x=blank).tensors["x"]
    assert quantizer.scale[1] < 2 * np.max(quantizer.scale[[0, 2]])


def test_too_many_numbers_for_the_bits_are_rounded_as_any() -> None:
    pixels = RNG.integers(0, 256, (200, 3)).astype(np.float32)
    quantizer = fitted([node("MatMul", ["x", "w"], ["y"])], 5, x=pixels).tensors["x"]
    assert np.all(quantizer.scale > 4) and np.all(quantizer.qmax == 31)


def test_added_to_other_numbers_they_stay_exact_and_cost_them_no_precision() -> None:
    nodes = [node("Add", ["x", "z"], ["s"]), node("MatMul", ["s", "w"], ["y"])]
    found = fitted(nodes, 8, x=CATEGORIES, z=REAL).tensors
    back = found["x"].dequantize(found["x"].quantize(CATEGORIES))
    np.testing.assert_allclose(back, CATEGORIES, rtol=2.0**-24)
    assert np.all(found["z"].scale < 2 * np.ptp(REAL, axis=0) / 255 * 1.5)


INTEGERS = {"x": onnx.TensorProto.INT64}
NUMBERS = RNG.integers(0, 20, (200, 3))
COARSE = {
    "w": RNG.normal(size=(3, 3)).astype(np.float32),
    "c": np.int64(7),
    "E": RNG.normal(size=(20, 4)).astype(np.float32),
}
SUMMED = [node("Cast", ["x"], ["f"], to=1), node("MatMul", ["f", "w"], ["l"]), node("Relu", ["l"], ["r"])]
SUMMED += [node("Sub", ["r", "f"], ["d"])]
READ_OTHERWISE = {
    "row": [node("Gather", ["E", "x"], ["y"])],
    "constant": [node("Equal", ["x", "c"], ["b"]), node("Cast", ["b"], ["y"], to=1)],
    "each other": [
        node("Split", ["x"], ["first", "second", "third"], axis=1),
        node("Less", ["first", "second"], ["b"]),
        node("Cast", ["b"], ["y"], to=1),
    ],
}


@pytest.mark.parametrize("bits", [3, 5, 8])
@pytest.mark.parametrize("read", READ_OTHERWISE)
def test_integers_that_coarser_numbers_are_added_to_still_are_what_they_are(read: str, bits: int) -> None:
    """As rows of a table, or in comparisons, where a wrong one is wrong altogether."""
    proto = model(SUMMED + READ_OTHERWISE[read], {"x": ["N", 3]}, ["y", "d"], COARSE, kinds=INTEGERS)
    graph = fheq.import_onnx(proto)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, NUMBERS), Spec(bits, observer=MinMax())))
    y, d = program.dequantize(*fheq.simulate(program, *program.quantize(NUMBERS)))
    exact, real = reference(proto, NUMBERS)
    np.testing.assert_allclose(y, exact, atol=0.5001 * np.max(program.outputs[0].affine.scale) if read == "row" else 0)
    assert np.sqrt(np.mean((d - real) ** 2)) < 2.0 ** (1 - bits) * np.ptp(real)


FEW = {
    "decisions": [node("Greater", ["z", "zero"], ["b"]), node("Cast", ["b"], ["f"], to=1), node("Add", ["u", "f"], ["s"])],
    "integers": [node("Cast", ["x"], ["f"], to=1), node("Add", ["u", "f"], ["s"])],
    "decisions summed with others": [
        node("Greater", ["z", "zero"], ["b"]),
        node("Cast", ["b"], ["f"], to=1),
        *(node("Unsqueeze", [name, "axis"], [f"{name}1"]) for name in "fu"),
        node("Concat", ["f1", "u1"], ["both"], axis=1),
        node("ReduceSum", ["both", "axis"], ["s"], keepdims=0),
    ],
}


@pytest.mark.parametrize("few", FEW)
def test_few_whole_numbers_cost_what_is_added_to_them_no_bits(few: str) -> None:
    """Steps of 1, of which a decision has no more than one, are no reason for others to have such steps."""
    arrays = {"u": REAL, "x": NUMBERS % 3} if few == "integers" else {"u": REAL, "z": RNG.normal(size=(200, 3)).astype("f")}
    nodes = [*FEW[few], node("Sigmoid", ["s"], ["t"]), node("MatMul", ["t", "w"], ["y"])]
    known = {"w": COARSE["w"], "zero": np.float32(0), "axis": np.array([1])}
    graph = fheq.import_onnx(model(nodes, {name: ["N", 3] for name in arrays}, ["y"], known, kinds=INTEGERS))
    exact, errors = np.asarray(fheq.evaluate(graph, *arrays.values())), []
    for bits in (5, 8):
        program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, *arrays.values()), bits))
        y = program.dequantize(fheq.simulate(program, *program.quantize(*arrays.values())))[0]
        errors.append(np.sqrt(np.mean((y - exact) ** 2) / np.var(exact)))
    assert errors[1] < errors[0] / 3  # 8 by the bits alone, less where steps are parts of 1
    assert errors[1] < 0.02


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_a_part_of_integers_meets_others_in_a_difference(bits: int) -> None:
    """The whole tensor has a quantizer for each channel, which a layer absorbs, and its parts share one."""
    nodes = [
        node("Cast", ["x"], ["f"], to=1),
        node("MatMul", ["f", "w"], ["l"]),
        node("Greater", ["l", "zero"], ["g"]),
        node("Cast", ["g"], ["n"], to=7),
        node("Mul", ["n", "three"], ["b"]),
        node("Slice", ["x", "first", "last", "axes"], ["part"]),
        node("Sub", ["b", "part"], ["y"]),
    ]
    known = {"w": COARSE["w"][:, :2], "zero": np.float32(0), "three": np.int64(3)}
    known |= {name: np.array([at]) for name, at in (("first", 0), ("last", 2), ("axes", 1))}
    proto = model(nodes, {"x": ["N", 3]}, ["y"], known, kinds=INTEGERS | {"y": onnx.TensorProto.INT64})
    graph = fheq.import_onnx(proto)
    spec = {"op_inputs": bits, "op_weights": 8, "model_inputs": 5}
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, NUMBERS), spec))
    y = program.dequantize(fheq.simulate(program, *program.quantize(NUMBERS)))[0]
    (exact,) = reference(proto, NUMBERS)
    assert np.mean(y != exact) < 0.05  # where rounded weights put a sum on the other side of 0


@pytest.mark.parametrize("bits", [3, 5, 6, 8])
def test_integers_compared_with_other_numbers_share_whole_steps(bits: int) -> None:
    nodes = [node("Cast", ["x"], ["f"], to=1), node("Max", ["f", "u"], ["y"])]
    real = (20 * RNG.normal(size=(200, 3))).astype(np.float32)
    proto = model(nodes, {"x": ["N", 3], "u": ["N", 3]}, ["y"], kinds=INTEGERS)
    graph = fheq.import_onnx(proto)
    qparams = fheq.fit(graph, fheq.calibrate(graph, NUMBERS, real), bits)
    program = fheq.lower(graph, qparams)
    y = program.dequantize(fheq.simulate(program, *program.quantize(NUMBERS, real)))[0]
    np.testing.assert_allclose(y, fheq.fake_quant(graph, qparams, NUMBERS, real), rtol=1e-6)
    assert np.max(np.abs(y - np.maximum(NUMBERS, real))) < 1.5 * np.ptp(real) / 2**bits + np.max(qparams.tensors["x"].scale)


@given(st.lists(st.integers(-300, 300), min_size=1, max_size=40), st.integers(1, 9), st.floats(-20, 0), st.floats(0, 20))
@settings(deadline=None, max_examples=60)
def test_every_number_seen_is_held(values: list[int], bits: int, below: float, above: float) -> None:
    """Whatever range an observer asks for: the steps are 1, as many as bits allow, and nothing seen saturates."""
    x = np.array(values, np.float32)
    seen = update(init(1, (FRACTION,)), x[:, None, None], np.ones(len(x), bool))
    whole = is_whole(seen, bits)
    assert whole[0] == (0 < np.ptp(x) < 2**bits)
    asked = np.array([x.min() + below + above / 2]), np.array([x.max() + above + below / 2])
    low, high = in_steps_of_one(seen, holding(seen, asked, whole), bits, whole)
    if whole[0]:
        assert low[0] <= x.min() and high[0] >= x.max() and low[0] == round(low[0])
        assert np.log2(high[0] - low[0] + 1) in range(1, bits + 1)
    else:
        assert (low[0], high[0]) == (asked[0][0], asked[1][0])


def test_a_tree_on_categories_decides_as_scikit_learn_does() -> None:
    tree = pytest.importorskip("sklearn.tree")
    pytest.importorskip("skl2onnx")
    wide = RNG.integers(0, 13, (300, 3)).astype(np.float32)
    estimator = tree.DecisionTreeClassifier(random_state=0).fit(wide, (wide[:, 0] * wide[:, 1] + wide[:, 2]) % 5)
    graph = fheq.from_sklearn(estimator, wide)
    program = fheq.lower(
        graph, fheq.fit(graph, fheq.calibrate(graph, wide), {"op_inputs": 4, "op_weights": 4, "model_inputs": 4})
    )
    labels, _ = program.dequantize(*as_tuple(fheq.simulate(program, *program.quantize(wide))))
    np.testing.assert_array_equal(labels, estimator.predict(wide))


@pytest.mark.parametrize(("bits", "step"), [(8, 1), (6, 4), (5, 8)])
def test_integers_that_weights_alone_read_lose_low_bits(bits: int, step: int) -> None:
    """Pixels in as many bits as inputs are to have; fake quantization, which keeps their type, takes the same ones."""
    case = CASES["normalized_pixels"]
    graph, (x,) = fheq.import_onnx(case.build()), case.data(200)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), bits)
    assert np.all(qparams.tensors["x"].scale == step) and np.all(qparams.tensors["x"].qmax == 2**bits - 1)
    program = fheq.lower(graph, qparams)
    got = program.dequantize(fheq.simulate(program, *program.quantize(x)))[0]
    np.testing.assert_allclose(got, np.asarray(fheq.fake_quant(graph, qparams, x)), atol=1e-4)


def test_integers_that_are_compared_keep_all_bits() -> None:
    nodes = [node("Equal", ["x", "k"], ["e"]), node("Cast", ["e"], ["f"], to=1), node("MatMul", ["f", "w"], ["y"])]
    known = {"k": np.array(200), "w": RNG.normal(size=(3, 2)).astype(np.float32)}
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 3]}, ["y"], known, kinds={"x": 7, "y": 1}))
    x = RNG.integers(0, 256, (300, 3))
    assert np.all(fheq.fit(graph, fheq.calibrate(graph, x), 4).tensors["x"].scale == 1)


def test_integers_of_too_few_bits_stay_integers() -> None:
    """In whole steps that a sum and a maximum share: in fake quantization, in circuits and in what is exported."""
    nodes = [
        node("Mul", ["a", "k"], ["m"]),
        node("Add", ["m", "b"], ["s"]),
        node("Mod", ["s", "seven"], ["r"]),
        node("Max", ["r", "b"], ["y"]),
    ]
    known = {"k": np.array([2, 3, 5]), "seven": np.array(7)}
    proto = model(nodes, {"a": ["N", 3], "b": ["N", 3]}, ["y"], known, kinds=dict.fromkeys("aby", 7))
    graph, inputs = fheq.import_onnx(proto), (RNG.integers(0, 15, (300, 3)), RNG.integers(0, 8, (300, 3)))
    qparams = fheq.fit(graph, fheq.calibrate(graph, *inputs), 6)
    assert qparams.tensors["b"].scale > 1 and qparams.tensors["b"].scale % 1 == 0
    program = fheq.lower(graph, qparams)
    got = program.dequantize(fheq.simulate(program, *program.quantize(*inputs)))[0]
    np.testing.assert_array_equal(got, np.asarray(fheq.fake_quant(graph, qparams, *inputs)))
    np.testing.assert_array_equal(got, reference(fheq.export_qdq(graph, qparams), *inputs)[0])


def test_quotients_of_integers_are_cut_off() -> None:
    """Toward 0; what reads them beside a table: weights, a sum, the remainder."""
    nodes = [
        node("Div", ["x", "k"], ["q"]),
        node("ReduceSum", ["q", "last"], ["s"], keepdims=1),
        node("Cast", ["q"], ["f"], to=1),
        node("MatMul", ["f", "w"], ["y"]),
    ]
    known = {"k": np.array(7), "last": np.array([1]), "w": np.float32([[1], [-1], [1]])}
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 3]}, ["q", "s", "y"], known, kinds={"x": 7, "q": 7, "s": 7, "y": 1}))
    x = RNG.integers(-27, 28, (300, 3))
    quotients = np.trunc(x / 7)
    want = (quotients, quotients.sum(axis=1, keepdims=True), quotients @ known["w"])
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 8)
    program = fheq.lower(graph, qparams)
    for found in (fheq.fake_quant(graph, qparams, x), program.dequantize(*fheq.simulate(program, *program.quantize(x)))):
        for got, exact in zip(found, want, strict=True):
            np.testing.assert_allclose(got, exact, atol=1e-4)
