"""RNN, GRU and LSTM: floats as in onnxruntime, whole or unrolled; integers as good as those of other layers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from build_models import model, node, reference
from models import as_tuple
from onnx import numpy_helper
from test_encrypted import assert_encrypted_is_simulated

import fheq
from fheq.errors import FheqError, UnsupportedError
from fheq.integers.integer_weights import quantize_weight
from fheq.planning.plan import plan
from fheq.rewrites import decompose
from fheq.steps import Linear

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def recurrent(
    op: str,
    *,
    time: int = 3,
    samples: int | str = 2,
    size: tuple[int, int] = (3, 2),
    bias: bool = True,
    lengths: list[int] | None = None,
    peepholes: bool = False,
    states: str = "",
    opset: int = 17,
    **attrs: Any,
) -> onnx.ModelProto:
    """A model of one node: x (time, samples, inputs), perhaps h and c, to y, yh (and yc).

    Args:
        states: "input", "known", "zero" or "" for absent ones.
    """
    rng = np.random.default_rng(0)
    inputs, hidden = size
    count, gates = 2 if attrs.get("direction") == "bidirectional" else 1, GATES[op]
    draw = lambda *shape: rng.normal(scale=0.7, size=shape).astype(np.float32)
    known = {"w": draw(count, gates * hidden, inputs), "r": draw(count, gates * hidden, hidden)}
    if bias:
        known["b"] = draw(count, 2 * gates * hidden)
    if lengths is not None:
        known["lengths"] = np.array(lengths, np.int32)
    names = ["x", "w", "r", "b" if bias else "", "lengths" if lengths else ""]
    given: dict[str, list] = {"x": [time, samples, inputs]}
    for name in ("h", "c")[: 1 + (op == "LSTM")]:
        names.append(name if states else "")
        if states == "input":
            given[name] = [count, samples, hidden]
        elif states:
            known[name] = draw(count, 2, hidden) * (states == "known")
    if peepholes:
        known["p"] = draw(count, 3 * hidden)
        names.append("p")
    outputs = ["y", "yh", "yc"][: 2 + (op == "LSTM")]
    made = node(op, names, outputs, hidden_size=hidden, **attrs)
    return model([made], given, outputs, known, opset=opset)


def data(proto: onnx.ModelProto, samples: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = [[d.dim_value or samples for d in v.type.tensor_type.shape.dim] for v in proto.graph.input]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


FORMS: dict[str, dict[str, Any]] = {
    "reverse, no bias": {"direction": "reverse", "bias": False, "opset": 7},
    "bidirectional, zero states": {"direction": "bidirectional", "states": "zero"},
    "states as inputs": {"states": "input"},
    "unequal lengths": {"direction": "bidirectional", "lengths": [1, 3], "states": "known"},
    "clip": {"clip": 0.4, "states": "known"},
}
ACTIVATIONS = {
    "relu family": (["HardSigmoid", "LeakyRelu", "Elu"], {"activation_alpha": [0.3, 0.2, 0.9], "activation_beta": [0.4]}),
    "defaults": (["HardSigmoid", "Softsign", "Relu"], {}),
    "affine": (["Affine", "ScaledTanh", "Softplus"], {"activation_alpha": [0.3, 0.8], "activation_beta": [0.1, 0.7]}),
}
CASES = {f"{op}, {name}": recurrent(op, **form) for op in GATES for name, form in FORMS.items()} | {
    f"{op}, {name}": recurrent(op, activations=names[:count], **attrs)
    for op, count in (("RNN", 1), ("GRU", 2), ("LSTM", 3))
    for name, (names, attrs) in ACTIVATIONS.items()
}
CASES |= {
    "GRU, linear before reset": recurrent("GRU", linear_before_reset=1, states="known"),
    "GRU, linear before reset, from zero": recurrent("GRU", linear_before_reset=1, clip=0.5),
    "LSTM, peepholes": recurrent("LSTM", peepholes=True, states="known", direction="bidirectional", clip=0.6),
    "LSTM, coupled gates": recurrent("LSTM", input_forget=1, states="input"),
}


@pytest.mark.parametrize("name", CASES)
def test_floats_are_those_of_onnxruntime_whole_and_unrolled(name: str) -> None:
    proto = CASES[name]
    graph, arrays = fheq.import_onnx(proto), data(proto, 2)
    wanted = reference(proto, *arrays)
    simple = decompose(graph)
    assert not {n.op for n in simple.nodes} & set(GATES)
    for form in (graph, simple):
        for got, want in zip(as_tuple(fheq.evaluate(form, *arrays)), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert fheq.check(graph) == []


@pytest.mark.parametrize(
    ("op", "attrs"), [("RNN", {}), ("GRU", {}), ("GRU", {"linear_before_reset": 1}), ("LSTM", {"states": "input"})]
)
def test_eight_bits_simulate_as_fake_quantized_and_near_the_floats(op: str, attrs: dict) -> None:
    """R2 of 0.995 is the bound of all other layers; a wrapped accumulator or a wrong table would cost far more."""
    proto = recurrent(op, samples="N", **attrs)
    graph = fheq.import_onnx(proto)
    arrays, test = data(proto, 200), data(proto, 100, seed=1)
    qparams = fheq.fit(graph, fheq.calibrate(graph, *arrays), 8)
    program = fheq.lower(graph, qparams)
    real = program.dequantize(*as_tuple(fheq.simulate(program, *program.quantize(*test))))
    faked = as_tuple(fheq.fake_quant(graph, qparams, *test))
    for got, fake, want in zip(real, faked, as_tuple(fheq.evaluate(graph, *test))):
        spread = np.sum((want - np.mean(want)) ** 2)
        assert 1 - np.sum((got - want) ** 2) / spread >= 0.995
        assert 1 - np.sum((got - fake) ** 2) / spread >= 0.999


def on_a_grid(proto: onnx.ModelProto, bits: int, per_channel: bool) -> onnx.ModelProto:
    """The model with w and r as integers, each with a scale of its own, or one per row, and DequantizeLinear."""
    made = onnx.ModelProto.FromString(proto.SerializeToString())
    top = 2 ** (bits - 1) - 1
    for stored in [t for t in made.graph.initializer if t.name in ("w", "r")]:
        values = numpy_helper.to_array(stored)
        scale = np.asarray(np.abs(values).max(axis=(0, 2) if per_channel else None) / top, np.float32)
        q = np.round(values / (scale[:, None] if per_channel else scale)).astype(np.int8)
        made.graph.initializer.remove(stored)
        parts = [f"{stored.name}/{part}" for part in ("q", "scale")]
        made.graph.initializer.extend(numpy_helper.from_array(v, n) for v, n in zip((q, scale), parts))
        made.graph.node.insert(0, node("DequantizeLinear", parts, [stored.name], axis=1))
    return made


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("op", GATES)
def test_weights_on_a_grid_stay_there_whatever_bits_are_asked_for(op: str, per_channel: bool) -> None:
    """w and r meet in one product: the grid that both get moves none by more than 1/16 of its own step, or 1/256 of the
    largest step; a weight of 2 bits would move by more than a step."""
    proto = on_a_grid(recurrent(op, samples="N", time=2), 5, per_channel)
    graph, arrays = fheq.import_onnx(proto), data(proto, 60)
    qparams = fheq.fit(graph, fheq.calibrate(graph, *arrays), {"op_inputs": 8, "op_weights": 2})
    layout = plan(graph)
    products = [step for step in layout.steps if isinstance(step, Linear)]
    assert len(products) > 1
    for step in products:
        found, stated = quantize_weight(layout, qparams, step), layout.graph.pinned[step.weight_name].expanded(2)
        units, ratio = qparams.weights[step.weight_name].expanded(2).scale, found.ratio[:, None]
        steps = np.broadcast_to(stated.scale, step.weight.shape) * ratio
        allowed = np.maximum(steps / 16, steps.max(axis=0) / 256) + 1e-5 * steps
        assert np.all(np.abs(found.integers * units - step.weight * ratio) <= allowed)


@pytest.mark.parametrize(("op", "per_step"), [("RNN", 1), ("LSTM", 13)])
def test_tables_per_unit_and_time_step(op: str, per_step: int) -> None:
    """Inputs and state enter one product: an RNN takes one table; an LSTM four gates, two more tables of c, one of h and
    two squares for each of three products."""
    counts = []
    for time in (3, 4):
        proto = recurrent(op, samples="N", time=time)
        graph = fheq.import_onnx(proto)
        arrays = data(proto, 50)
        program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, *arrays), 4))
        counts.append(sum(math.prod(program.values[lookup.out].shape) for lookup in program.lookups))
    assert counts[1] - counts[0] == per_step * 2


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (recurrent("RNN", activations=["Affine"]), "Affine without alpha and beta"),
        (recurrent("RNN", activations=["Sin"]), "activation 'Sin'"),
        (recurrent("RNN", direction="sideways"), "sideways"),
        (recurrent("RNN", lengths=[1, 9]), "sequence_lens"),
    ],
)
def test_malformed_nodes_are_named(proto: onnx.ModelProto, message: str) -> None:
    with pytest.raises(FheqError, match=message) as error:
        fheq.import_onnx(proto)
    assert "make_y" in str(error.value)


def test_computed_weights_are_refused_by_name() -> None:
    proto = recurrent("RNN")
    (w,) = [t for t in proto.graph.initializer if t.name == "w"]
    proto.graph.initializer.remove(w)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w", w.data_type, w.dims))
    (found,) = fheq.check(proto)
    assert "make_y" in found.node and "weights" in found.cause
    graph = fheq.import_onnx(proto)
    with pytest.raises(UnsupportedError, match="make_y"):
        decompose(graph)


@pytest.mark.encrypted
@pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
def test_encrypted_rnn_of_two_steps() -> None:
    proto = recurrent("RNN", time=2, samples="N", size=(2, 2))
    graph = fheq.import_onnx(proto)
    bits = {"op_inputs": 2, "op_weights": 2, "model_inputs": 2, "model_outputs": 3}
    (x,) = data(proto, 80)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), bits))
    assert_encrypted_is_simulated(program, fheq.compile(program, p_error=1e-6), x[:, :2])


@pytest.mark.encrypted
@pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
def test_encrypted_gru_with_a_state() -> None:
    """One step of one unit: the state enters a product with a gate."""
    proto = recurrent("GRU", time=1, samples="N", size=(1, 1), states="input")
    graph = fheq.import_onnx(proto)
    bits = {"op_inputs": 2, "op_weights": 2, "model_inputs": 2, "model_outputs": 3}
    arrays = data(proto, 80)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, *arrays), bits))
    circuit = fheq.compile(program, p_error=1e-6)
    assert_encrypted_is_simulated(program, circuit, *(a[:, :2] for a in arrays))
