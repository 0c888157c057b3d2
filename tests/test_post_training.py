"""The converters and the quantized module."""

from __future__ import annotations

import dataclasses
from typing import Any

import build_models
import numpy as np
import onnx
import pytest

import fheq
from fheq.errors import ArgumentError, DataError, FheqError
from fheq.post_training import (
    DEFAULT_MODEL_BITS,
    ONNX_OPS_TO_JAX_IMPL,
    ONNX_OPS_TO_NUMPY_IMPL,
    ONNX_OPS_TO_QUANTIZED_IMPL,
    MissingQuantizerError,
    NotCompiledError,
    ONNXConverter,
    PostTrainingAffineQuantization,
    PostTrainingQATImporter,
    QuantizedModule,
    get_n_bits_dict,
)

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
RNG = np.random.default_rng(1)
X = RNG.normal(size=(80, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def mlp() -> onnx.ModelProto:
    return build_models.mlp()


@pytest.fixture(scope="module")
def graph(mlp: onnx.ModelProto) -> fheq.Graph:
    """One graph for all tests: what is jitted for it once is not compiled again."""
    return fheq.import_onnx(mlp)


@pytest.fixture(scope="module")
def module(graph: fheq.Graph) -> QuantizedModule:
    return PostTrainingAffineQuantization(3, graph, {"n_bits": 4, "method": "APPROXIMATE"}).quantize_module(X)


# n_bits

GOOD_BITS = [
    (2, (2, 2, 5, 5)),
    (5, (5, 5, 5, 5)),
    (8, (8, 8, 8, 8)),
    (np.int64(3), (3, 3, 5, 5)),
    ({"op_inputs": 3, "op_weights": 2}, (3, 2, 5, 5)),
    ({"op_inputs": 7, "op_weights": 2}, (7, 2, 5, 7)),
    ({"op_inputs": 3, "op_weights": 2, "model_inputs": 2}, (3, 2, 2, 5)),
    ({"op_inputs": 3, "op_weights": 2, "model_inputs": 8, "model_outputs": 3}, (3, 2, 8, 3)),
]
BAD_BITS = [
    (0, "at least 1"),
    (-3, "at least 1"),
    (2.0, "integer"),
    ("4", "integer"),
    (None, "integer"),
    (True, "integer"),
    ([4, 4], "integer"),
    ({}, "missing"),
    ({"op_inputs": 3}, "op_weights"),
    ({"op_weights": 3}, "op_inputs"),
    ({"op_inputs": 3, "op_weights": 3, "weights": 3}, "unknown keys"),
    ({"op_inputs": 3, "op_weights": 3.5}, "integer"),
    ({"op_inputs": 0, "op_weights": 3}, "at least 1"),
    ({"op_inputs": 3, "op_weights": 3, "model_inputs": None}, "integer"),
    ({"op_inputs": 6, "op_weights": 3, "model_outputs": 5}, "must not be below"),
]


@pytest.mark.parametrize(("n_bits", "expected"), GOOD_BITS)
def test_n_bits(graph: fheq.Graph, n_bits: Any, expected: tuple[int, ...]):
    assert tuple(get_n_bits_dict(n_bits).values()) == expected
    c = PostTrainingAffineQuantization(n_bits, graph)
    assert (c.n_bits_op_inputs, c.n_bits_op_weights, c.n_bits_model_inputs, c.n_bits_model_outputs) == expected


@pytest.mark.parametrize(("n_bits", "words"), BAD_BITS)
@pytest.mark.parametrize("converter", [PostTrainingAffineQuantization, PostTrainingQATImporter])
def test_wrong_n_bits(graph: fheq.Graph, converter: type[ONNXConverter], n_bits: Any, words: str):
    for make in (get_n_bits_dict, lambda b: converter(b, graph)):
        with pytest.raises(ValueError, match=words) as caught:
            make(n_bits)
        assert isinstance(caught.value, FheqError)


def test_n_bits_are_those_of_the_quantizers(graph: fheq.Graph):
    bits = {"op_inputs": 3, "op_weights": 4, "model_inputs": 6}
    qparams = PostTrainingAffineQuantization(bits, graph).quantize_module(X).qparams
    assert np.max(qparams.tensors["x"].qmax) == 63
    assert np.max(qparams.tensors["r"].qmax) == 7
    assert all(np.max(w.qmax - w.qmin) <= 15 for w in qparams.weights.values())
    assert DEFAULT_MODEL_BITS == 5


# Converters


def test_nothing_is_mutable(graph: fheq.Graph, module: QuantizedModule):
    bits = {"op_inputs": 3, "op_weights": 2}
    converter = PostTrainingAffineQuantization(bits, graph)
    bits["op_inputs"] = 7
    assert converter.n_bits_op_inputs == 3
    for thing, name in ((converter, "n_bits"), (converter, "model"), (module, "circuit"), (module, "qparams")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, None)
    with pytest.raises(TypeError):
        converter.n_bits["op_inputs"] = 7  # type: ignore[index]
    before = converter.graph
    first, second = converter.quantize_module(X), converter.quantize_module(X[:60])
    assert converter.graph is before
    assert first is not second
    assert dataclasses.replace(converter, n_bits=4).n_bits_op_inputs == 4


def test_models_in_all_forms(mlp: onnx.ModelProto, graph: fheq.Graph, tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(mlp, path)
    assert PostTrainingAffineQuantization(4, graph).graph is graph
    for form in (mlp, mlp.SerializeToString(), path, str(path)):
        made = PostTrainingAffineQuantization(4, form)
        assert [node.op for node in made.graph.nodes] == [node.op for node in graph.nodes]
        assert repr(made).startswith("PostTrainingAffineQuantization(n_bits=")


@pytest.mark.parametrize("model", [None, 3, b"no model", "no/such/file.onnx"])
def test_what_is_no_model(model: Any):
    with pytest.raises(FheqError):
        PostTrainingAffineQuantization(4, model)


def test_the_base_class_quantizes_nothing(graph: fheq.Graph):
    with pytest.raises(NotImplementedError):
        ONNXConverter(4, graph).quantize_module(X)


@pytest.mark.parametrize("data", [(), (X[:0],), (X.astype(int),), (X[:, :3],), (X, X), (X * np.nan,)])
def test_wrong_calibration_data(graph: fheq.Graph, data: tuple):
    with pytest.raises(DataError):
        PostTrainingAffineQuantization(4, graph).quantize_module(*data)


# The quantized module


def test_forward_is_quantize_run_dequantize(graph: fheq.Graph):
    module = PostTrainingAffineQuantization(8, graph).quantize_module(X)
    y = module.forward(X)
    q = module.quantize_input(X)
    assert q.dtype == np.int64
    assert q.shape == X.shape
    assert y.dtype == np.float64
    np.testing.assert_array_equal(module.dequantize_output(module.quantized_forward(q)), y)
    wanted = np.asarray(fheq.evaluate(module.graph, X))
    assert 1 - np.sum((y - wanted) ** 2) / np.sum((wanted - wanted.mean(0)) ** 2) > 0.999


def test_several_inputs_and_outputs():
    nodes = [
        build_models.node("MatMul", ["a", "w"], ["m"]),
        build_models.node("Relu", ["m"], ["p"]),
        build_models.node("Add", ["p", "b"], ["q"]),
    ]
    proto = build_models.model(nodes, {"a": ["N", 4], "b": ["N", 3]}, ["p", "q"], {"w": build_models.tensor(4, 3)})
    data = (X, RNG.normal(size=(80, 3)).astype(np.float32))
    module = PostTrainingAffineQuantization(6, proto).quantize_module(*data)
    assert [v.shape for v in module.forward(*data)] == [(80, 3), (80, 3)]
    assert [v.shape for v in module.quantize_input(*data)] == [(80, 4), (80, 3)]
    assert set(module.bitwidth_and_range_report()) >= {"a", "b", "p", "q"}
    with pytest.raises(DataError):
        module.forward(X)
    with pytest.raises(DataError):
        module.dequantize_output(np.zeros((1, 3), np.int64))


def test_modes(module: QuantizedModule):
    for mode in ("simulate", "execute"):
        with pytest.raises(NotCompiledError, match="compile") as caught:
            module.forward(X, fhe=mode)
        assert isinstance(caught.value, FheqError)
        with pytest.raises(NotCompiledError):
            module.quantized_forward(module.quantize_input(X), fhe=mode)
    for mode in ("", "clear", None, True):
        with pytest.raises(ArgumentError, match="fhe must be one of"):
            module.forward(X, fhe=mode)  # type: ignore[arg-type]


def test_report_before_compiling(module: QuantizedModule):
    report = module.bitwidth_and_range_report()
    assert module.circuit is None
    assert next(iter(report)) == "x"
    assert report["x"] == {"range": (0, 31), "bitwidth": 5}
    assert report["r"]["bitwidth"] <= 3
    for row in report.values():
        low, high = row["range"]
        assert 0 <= low <= high < 2 ** row["bitwidth"]
    for name, known in module.program.accumulators.items():
        assert report[name]["bitwidth"] == known.bits


def test_compile_gives_another_module(module: QuantizedModule):
    compiled = module.compile(X, p_error=0.01)
    assert module.circuit is None
    assert compiled.program is module.program
    assert compiled.circuit is not None
    assert compiled.circuit.p_error == 0.01
    x = X[:4]
    np.testing.assert_array_equal(compiled.circuit.evaluate(x), module.forward(x))
    simulated = compiled.forward(x, fhe="simulate")
    assert simulated.shape == (4, 2)
    assert np.all(np.isfinite(simulated))
    with pytest.raises(DataError):
        module.compile(X[:, :2])
    with pytest.raises(ValueError, match="either"):
        module.compile(p_error=0.1, global_p_error=0.1)


@pytest.mark.encrypted
def test_encrypted_run():
    nodes = [build_models.node("MatMul", ["x", "w"], ["h"]), build_models.node("Relu", ["h"], ["y"])]
    proto = build_models.model(nodes, {"x": ["N", 2]}, ["y"], {"w": build_models.tensor(2, 2)})
    bits = {"op_inputs": 2, "op_weights": 2, "model_inputs": 2, "model_outputs": 2}
    module = PostTrainingAffineQuantization(bits, proto, 3).quantize_module(X[:, :2]).compile(p_error=1e-6)
    x = X[:3, :2]
    np.testing.assert_array_equal(module.forward(x, fhe="execute"), module.forward(x))


# Quantization-aware models


def quant(x: str, y: str, scale: float, bits: float = 4.0, signed: int = 0, narrow: int = 0) -> tuple[onnx.NodeProto, dict]:
    known = {f"{y}_scale": np.float32(scale), f"{y}_zero": np.float32(0), f"{y}_bits": np.float32(bits)}
    attrs = {"signed": signed, "narrow": narrow, "rounding_mode": "ROUND", "domain": "onnx.brevitas"}
    return build_models.node("Quant", [x, *known], [y], **attrs), known


def qat(*nodes: onnx.NodeProto | tuple[onnx.NodeProto, dict], known: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A model from x (N, 4) to y, of plain nodes and of what `quant` gives."""
    plain = [n[0] if isinstance(n, tuple) else n for n in nodes]
    extra = {k: v for n in nodes if isinstance(n, tuple) for k, v in n[1].items()}
    return build_models.model(plain, {"x": ["N", 4]}, ["y"], known | extra, domains={"onnx.brevitas": 1})


def two_layers(*between: onnx.NodeProto | tuple[onnx.NodeProto, dict], first: bool = True) -> onnx.ModelProto:
    """Two products with 3-bit weights, with `between` from r to a."""
    start = [quant("x", "xq", 0.1, 5.0, signed=1)] if first else []
    nodes = [
        *start,
        quant("w1", "w1q", 0.25, 3.0, signed=1, narrow=1),
        build_models.node("MatMul", ["xq" if first else "x", "w1q"], ["h"]),
        build_models.node("Relu", ["h"], ["r"]),
        *between,
        quant("w2", "w2q", 0.25, 3.0, signed=1, narrow=1),
        build_models.node("MatMul", ["a", "w2q"], ["y"]),
    ]
    return qat(*nodes, known={"w1": build_models.tensor(4, 4), "w2": build_models.tensor(4, 2)})


REACHED = {
    "plain": [quant("r", "a", 0.1357)],
    "movement": [
        quant("r", "q", 0.1357),
        build_models.node("Transpose", ["q"], ["t"], perm=[1, 0]),
        build_models.node("Transpose", ["t"], ["a"], perm=[1, 0]),
    ],
    "relu": [quant("h", "q", 0.1357, signed=1), build_models.node("Relu", ["q"], ["a"])],
}


@pytest.mark.parametrize("between", REACHED)
def test_qat_import_keeps_the_models_quantizers(between: str):
    proto = two_layers(*REACHED[between])
    graph = fheq.import_onnx(proto)
    wanted = np.asarray(fheq.evaluate(graph, X))
    for n_bits in (2, 8) if between == "plain" else (2,):
        module = PostTrainingQATImporter(n_bits, graph).quantize_module(X)
        np.testing.assert_allclose(module.forward(X), wanted, atol=1e-4)
        (stated,) = (module.qparams.tensors["x"],)
        assert (float(stated.scale), float(stated.qmin), float(stated.qmax)) == (pytest.approx(0.1), -16, 15)
        assert stated.signed
        inside = next(a for name, a in module.qparams.tensors.items() if name != "x")
        assert float(inside.scale) == pytest.approx(0.1357)
        assert {(float(np.min(w.qmin)), float(np.max(w.qmax))) for w in module.qparams.weights.values()} == {(-3.0, 3.0)}


def test_qat_linear_without_quantizer():
    unquantized = two_layers(build_models.node("Sigmoid", ["r"], ["a"]))
    with pytest.raises(MissingQuantizerError, match=r"tensor 'a', input of node 'make_y' \(MatMul, output 'y'\)") as caught:
        PostTrainingQATImporter(4, unquantized).quantize_module(X)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, FheqError)
    with pytest.raises(MissingQuantizerError, match=r"tensor 'x', input of node 'make_h'"):
        PostTrainingQATImporter(4, two_layers(quant("r", "a", 0.1357), first=False)).quantize_module(X)
    assert PostTrainingAffineQuantization(4, unquantized).quantize_module(X).forward(X).shape == (80, 2)


def test_qat_open_tensors_take_n_bits():
    nodes = [
        quant("x", "q", 0.1, 5.0, signed=1),
        build_models.node("MatMul", ["q", "w"], ["h"]),
        build_models.node("Sigmoid", ["h"], ["y"]),
    ]
    proto = qat(*nodes, known={"w": build_models.tensor(4, 4)})
    graph = fheq.import_onnx(proto)
    for bits in (3, 6):
        qparams = PostTrainingQATImporter(bits, graph).quantize_module(X).qparams
        assert np.max(qparams.tensors["y"].qmax) == 2 ** max(bits, 5) - 1
        assert np.max(qparams.weights["w"].qmax - qparams.weights["w"].qmin) <= 2**bits - 1
        assert float(qparams.tensors["x"].scale) == pytest.approx(0.1)


# The op table by name


def test_op_maps():
    assert ONNX_OPS_TO_NUMPY_IMPL is ONNX_OPS_TO_JAX_IMPL
    assert set(ONNX_OPS_TO_QUANTIZED_IMPL) < set(ONNX_OPS_TO_JAX_IMPL)
    assert "FakeQuant" not in ONNX_OPS_TO_JAX_IMPL
    assert "ArgMax" not in ONNX_OPS_TO_QUANTIZED_IMPL
    assert all(row.name in ONNX_OPS_TO_JAX_IMPL for row in fheq.ops.rows() if row.domain != "fheq")
    assert ONNX_OPS_TO_QUANTIZED_IMPL["Gemm"] is fheq.ops.Kind.LINEAR
    x = np.array([-1.0, 2.0], np.float32)
    np.testing.assert_allclose(ONNX_OPS_TO_JAX_IMPL["LeakyRelu"](x), [-0.01, 2])
    np.testing.assert_allclose(ONNX_OPS_TO_JAX_IMPL["LeakyRelu"](x, alpha=0.5), [-0.5, 2])
    np.testing.assert_allclose(ONNX_OPS_TO_JAX_IMPL["Clip"](x, None, np.float32(1)), [-1, 1])
    np.testing.assert_allclose(ONNX_OPS_TO_JAX_IMPL["Transpose"](np.eye(2, 3), perm=[1, 0]), np.eye(3, 2))
    first, second = ONNX_OPS_TO_JAX_IMPL["Split"](np.arange(4.0), np.array([1, 3]), outputs=2)
    assert (len(first), len(second)) == (1, 3)
    with pytest.raises(KeyError):
        ONNX_OPS_TO_JAX_IMPL["NoSuchOp"]
    with pytest.raises(FheqError, match="slope"):
        ONNX_OPS_TO_JAX_IMPL["LeakyRelu"](x, slope=1.0)
