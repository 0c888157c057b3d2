"""Quantized tensors that meet, move and are read on several grids: the program has the integers of onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build_models import model, node, tensor
from onnxruntime_models import CALIBRATION, SAMPLES, answers, qdq, session

import fheq
from fheq.post_training import PostTrainingQATImporter

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
RNG = np.random.default_rng(1)


def test_integers_that_are_clipped_and_moved_stay_on_their_grid():
    """QCDQ, as Brevitas exports it: 4 bits in an 8-bit container, here flattened and pooled as integers."""
    known = {"s": np.float32(0.25), "z": np.int8(1), "lo": np.int8(-8), "hi": np.int8(7), "w": tensor(2, 3)}
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("Clip", ["q", "lo", "hi"], ["k"]),
        node("MaxPool", ["k"], ["p"], kernel_shape=[4, 4]),
        node("Flatten", ["p"], ["f"]),
        node("DequantizeLinear", ["f", "s", "z"], ["d"]),
        node("MatMul", ["d", "w"], ["y"]),
    ]
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 2, 4, 4]}, ["y"], known))
    (pinned,) = graph.pinned.values()
    assert (int(pinned.qmin), int(pinned.qmax)) == (-8, 7)
    q = np.clip(np.round(SAMPLES / 0.25) + 1, -8, 7).max(axis=(2, 3))
    np.testing.assert_allclose(fheq.evaluate(graph, SAMPLES), 0.25 * (q - 1) @ known["w"], atol=1e-5)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {n.op for n in graph.nodes}


MEETINGS = {
    "Max": ([node("Max", ["d", "e"], ["m"])], 3),
    "Min": ([node("Min", ["d", "e"], ["m"])], 3),
    "Concat": ([node("Concat", ["d", "e"], ["m"], axis=1)], 2),
    "Where": ([node("Greater", ["d", "zero"], ["c"]), node("Where", ["c", "d", "e"], ["m"])], 4),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_integers_on_different_grids_meet_on_the_grid_that_follows(name):
    """No multiple of their scales lies midway between two of the last one's, so the answer is onnxruntime's. Each tensor
    takes both quantizers in one table."""
    nodes, tables = MEETINGS[name]
    known = {f"s{i}": np.float32(s) for i, s in enumerate((0.021, 0.037, 0.031))}
    known |= {f"z{i}": np.uint8(z) for i, z in enumerate((100, 61, 120))} | {"zero": np.float32(0)}
    pairs = [
        node(op, [source, f"s{i}", f"z{i}"], [target])
        for i, (x, y) in enumerate((("x", "d"), ("w", "e"), ("m", "y")))
        for op, source, target in (("QuantizeLinear", x, f"{y}_q"), ("DequantizeLinear", f"{y}_q", y))
    ]
    known = {key: value for key, value in known.items() if key != "zero" or name == "Where"}
    proto = model([*pairs[:4], *nodes, *pairs[4:]], {"x": ["N", 5], "w": ["N", 5]}, ["y"], known)
    data = tensor(200, 5, low=-2, high=4), tensor(200, 5, low=-2, high=4)
    graph = fheq.import_onnx(proto)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, *data), 2))
    (got,) = program.dequantize(fheq.simulate(program, *program.quantize(*data)))
    (want,) = session(proto).run(None, dict(zip(("x", "w"), data)))
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert len(program.lookups) == tables


def test_a_maximum_of_an_input_takes_over_the_quantizer_that_follows():
    """The model pools floats and quantizes then: quantizing first gives the same, and takes no table but comparisons."""
    known = {"s": np.float32(0.03), "z": np.uint8(120)}
    nodes = [node("MaxPool", ["x"], ["p"], kernel_shape=[2, 2]), *qdq("p", "y")]
    proto = model(nodes, {"x": ["N", 2, 4, 4]}, ["y"], known)
    graph = fheq.import_onnx(proto)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, CALIBRATION), 3))
    np.testing.assert_allclose(answers(program, SAMPLES), session(proto).run(None, {"x": SAMPLES})[0], atol=1e-5)
    assert all(table.origin == "make_p" for table in program.lookups)


def read_on_two_grids(*, last: bool = False, real: bool = False) -> onnx.ModelProto:
    """An input that meets two quantizers, the finer one first or last, and perhaps a product that reads the real values."""
    grids = {"d": ("s", "z", "w"), "e": ("t", "u", "v")}
    chains = []
    for made, (scale, zero, weight) in grids.items():
        pair = [node("QuantizeLinear", ["f", scale, zero], [f"{made}_q"])]
        pair.append(node("DequantizeLinear", [f"{made}_q", scale, zero], [made]))
        chains.append([*pair, node("MatMul", [made, f"{weight}_real"], [f"{made}_y"])])
    weights = [node("DequantizeLinear", [name, "k"], [f"{name}_real"]) for name in ("w", "v")]
    first, second = reversed(chains) if last else chains
    nodes = [*weights, node("Flatten", ["x"], ["f"]), *first, *second]
    known = {"s": np.float32(0.021), "z": np.uint8(200), "t": np.float32(0.05), "u": np.uint8(30), "k": np.float32(0.11)}
    known |= {"w": RNG.integers(-7, 8, (32, 2)).astype(np.int8), "v": RNG.integers(-7, 8, (32, 3)).astype(np.int8)}
    outputs = ["d_y", "e_y"]
    if real:
        nodes.append(node("MatMul", ["f", "a"], ["r_y"]))
        known["a"], outputs = tensor(32, 2), [*outputs, "r_y"]
    return model(nodes, {"x": ["N", 2, 4, 4]}, outputs, known)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("real", [False, True])
def test_an_input_that_meets_two_quantizers_is_encoded_by_each(last, real):
    """As onnxruntime has them, in any order and without tables; what reads the real values has an encoding of its own."""
    proto = read_on_two_grids(last=last, real=real)
    graph = fheq.import_onnx(proto)
    qparams = fheq.fit(graph, fheq.calibrate(graph, CALIBRATION), 8)
    program = fheq.lower(graph, qparams)
    assert len(program.inputs) == 2 + real and not program.lookups
    assert [port.name for port in program.given] == ["x"]
    got = program.dequantize(*fheq.simulate(program, *program.quantize(2 * SAMPLES)))
    want = session(proto).run(None, {"x": 2 * SAMPLES})
    for ours, theirs, faked in zip(got, want[:2], fheq.fake_quant(graph, qparams, 2 * SAMPLES)):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        np.testing.assert_allclose(ours, faked, atol=1e-4)
    module = PostTrainingQATImporter(6, proto)
    if not real:
        np.testing.assert_allclose(module.quantize_module(CALIBRATION).forward(2 * SAMPLES)[1], got[1])
    exported = fheq.export_qdq(graph, qparams)
    for ours, theirs in zip(got, session(exported).run(None, {"x": 2 * SAMPLES[:1]})):
        np.testing.assert_allclose(ours[:1], theirs, atol=1e-4)


def test_a_circuit_takes_an_input_with_two_encodings_once():
    graph = fheq.import_onnx(read_on_two_grids())
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, CALIBRATION)))
    circuit = fheq.compile(program)
    for got, want in zip(circuit.evaluate(SAMPLES[:3]), fheq.evaluate(graph, SAMPLES[:3])):
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_meets_a_finer_stated_grid_keeps_its_range(bits):
    """x - mean(x), where the model states 16 bits of x alone: the mean has its own few bits, in whole multiples of them."""
    known = {"s": np.float32(1e-4), "z": np.int16(0), "axes": np.array([1])}
    nodes = [*qdq("x", "d"), node("ReduceMean", ["d", "axes"], ["m"]), node("Sub", ["d", "m"], ["y"])]
    proto = model(nodes, {"x": ["N", 6]}, ["y"], known, opset=21)
    x = RNG.normal(size=(200, 6)).astype(np.float32)
    graph = fheq.import_onnx(proto)
    spec = fheq.Spec(bits, observer=fheq.MinMax())
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), spec))
    step = np.ptp(x.mean(axis=1)) / (2**bits - 1) + 1e-4
    np.testing.assert_allclose(answers(program, x), session(proto).run(None, {"x": x})[0], rtol=0, atol=step / 2 + 1e-4)
