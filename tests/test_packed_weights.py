"""Weights of few bits in blocks, as onnxruntime's MatMulNBitsQuantizer writes them, packed or before DequantizeLinear."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build_models import model, node, tensor
from onnxruntime.quantization import QuantFormat
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime_models import session

import fheq
from fheq.errors import UnsupportedError

RNG = np.random.default_rng(0)
CASES = [(QuantFormat.QOperator, bits, symmetric) for bits in (4, 8) for symmetric in (True, False)]
CASES += [(QuantFormat.QDQ, 4, symmetric) for symmetric in (True, False)]


def quantized(form: QuantFormat, bits: int, symmetric: bool) -> onnx.ModelProto:
    """Two layers, of which the first has a last block that its rows do not fill."""
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["r"]), node("MatMul", ["r", "v"], ["y"])]
    proto = model(nodes, {"x": ["N", 40]}, ["y"], {"w": tensor(40, 32), "v": tensor(32, 3)}, opset=21)
    proto.ir_version = 10
    made = MatMulNBitsQuantizer(
        proto, bits=bits, block_size=16, is_symmetric=symmetric, accuracy_level=1, quant_format=form
    )  # level 1 computes in float32
    made.process()
    return made.model.model


@pytest.mark.parametrize(("form", "bits", "symmetric"), CASES)
def test_the_weights_are_those_of_onnxruntime(form: QuantFormat, bits: int, symmetric: bool) -> None:
    proto, x = quantized(form, bits, symmetric), RNG.normal(size=(200, 40)).astype(np.float32)
    assert all(n.op_type != "MatMul" for n in proto.graph.node) or form is QuantFormat.QDQ
    graph = fheq.import_onnx(proto)
    want = session(proto).run(None, {"x": x})[0]
    np.testing.assert_allclose(fheq.evaluate(graph, x), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    assert len(graph.pinned) == 2  # what the model states of its weights
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), {"op_inputs": 7, "op_weights": 2, "model_inputs": 7})
    program = fheq.lower(graph, qparams)
    got = program.dequantize(fheq.simulate(program, *program.quantize(x)))[0]
    assert np.mean((got - want) ** 2) < 1e-3 * np.var(want)  # weights of 2 bits would be off by a tenth


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_table_of_rows_in_blocks(symmetric: bool) -> None:
    nodes = [node("Gather", ["t", "ids"], ["e"]), node("Flatten", ["e"], ["f"]), node("MatMul", ["f", "w"], ["y"])]
    proto = model(nodes, {"ids": ["N", 3]}, ["y"], {"t": tensor(10, 32), "w": tensor(96, 4)}, opset=21, kinds={"ids": 7})
    proto.ir_version = 10
    kinds = ("Gather",)
    made = MatMulNBitsQuantizer(proto, bits=4, block_size=16, is_symmetric=symmetric, op_types_to_quantize=kinds)
    made.process()
    quantized, ids = made.model.model, RNG.integers(0, 10, (200, 3))
    assert quantized.graph.node[0].op_type == "GatherBlockQuantized"
    want = session(quantized).run(None, {"ids": ids})[0]
    np.testing.assert_allclose(fheq.evaluate(fheq.import_onnx(quantized), ids), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "attrs", "why"),
    [
        (["x", "q", "s", "", "order"], {}, "g_idx"),
        (["x", "q", "s", "zeros"], {}, "zero points that are no integers"),
        (["x", "q", "s"], {"bits": 3}, "weights of 3 bits"),
    ],
)
def test_other_packings_are_refused_by_name(inputs: list[str], attrs: dict[str, int], why: str) -> None:
    sizes = {"K": 16, "N": 2, "block_size": 16, "bits": 4, **attrs}
    product = node("MatMulNBits", inputs, ["y"], domain="com.microsoft", **sizes)
    known = {
        "q": np.zeros((2, 1, 8), np.uint8),
        "s": np.ones(2, np.float32),
        "order": np.zeros(16, np.int32),
        "zeros": np.zeros(2, np.float32),
    }
    proto = model([product], {"x": ["N", 16]}, ["y"], known, domains={"com.microsoft": 1})
    with pytest.raises(UnsupportedError, match=f"'make_y'.*{why}"):
        fheq.import_onnx(proto)
