"""Operators that compute on integers, as float operators between DequantizeLinear and QuantizeLinear.

ONNX' QLinearConv, QLinearMatMul, MatMulInteger, ConvInteger and DynamicQuantizeLinear, and onnxruntime's of com.microsoft
(github.com/microsoft/onnxruntime, docs/ContribOperators.md), which its `quantize_static`, `quantize_dynamic`
and `MatMulNBitsQuantizer` write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fheq.errors import UnsupportedError
from fheq.graph import Node, TensorType, describe
from fheq.onnx.body import VERSION, Body
from fheq.onnx.packed_weights import gather_of_blocks, matmul_of_packed

MICROSOFT = "com.microsoft"


def unpacked(node: Node, types: Mapping[str, TensorType]) -> list[Node] | None:
    """The nodes in place of an operator on integers, none where what it reads failed; None for other operators.

    Raises:
        UnsupportedError: a layout with channels last.
    """
    rule = (_MICROSOFT if node.domain == MICROSOFT else ONNX_RULES if not node.domain else {}).get(node.op)
    if rule is None:
        return None
    if any(name not in types for name in node.inputs if name):
        return []
    if node.attrs.get("channels_last", 0):
        raise UnsupportedError(f"{describe(node)}: channels_last is not supported; export the model with channels first")
    body = Body(node, types)
    rule(body)
    return body.nodes


def _bias(body: Body, bias: str, a: str, b: str, alpha: float = 1.0) -> str:
    """An int32 bias, whose scale is the product of two scales."""
    if not bias:
        return ""
    scale = body.write("Mul", a, b)
    if alpha != 1.0:
        scale = body.write("Mul", scale, body.constant(np.float32(alpha)))
    return body.decode(bias, scale, axis=len(body.types[bias].shape) - 1 if body.types[bias].shape else 0)


def _conv(body: Body) -> None:
    x, w = body.real(0), body.real(3, axis=0)
    bias = _bias(body, body.inputs[8], body.inputs[1], body.inputs[4])
    body.encode(body.write("Conv", x, w, bias, **body.node.attrs), 6)


def _matmul(body: Body) -> None:
    a, b = body.real(0, axis=max(body.rank(0) - 2, 0)), body.real(3, axis=max(body.rank(3) - 1, 0))
    body.encode(body.write("MatMul", a, b), 6)


def _gemm(body: Body) -> None:
    attrs = body.node.attrs
    a, b = body.real(0), body.real(3, axis=0 if attrs.get("transB", 0) else 1)
    bias = _bias(body, body.inputs[6], body.inputs[1], body.inputs[4], attrs.get("alpha", 1.0))
    if body.inputs[7]:
        body.encode(body.write("Gemm", a, b, bias, **attrs), 7)
    else:
        body.write("Gemm", a, b, bias, out=body.node.outputs[0], **attrs)


def _pairwise(op: str) -> Callable[[Body], None]:
    return lambda body: body.encode(body.write(op, body.real(0), body.real(3)), 6)


def _univariate(op: str, version: int = VERSION) -> Callable[[Body], None]:
    return lambda body: body.encode(body.write(op, body.real(0), version=version, **body.node.attrs), 3)


def _softmax(body: Body) -> None:
    opset = int(body.node.attrs.get("opset", 13))
    _univariate("Softmax", opset)(body)


def _reduce_mean(body: Body) -> None:
    _univariate("ReduceMean", 13)(body)


def _concat(body: Body) -> None:
    parts = [body.real(at) for at in range(2, len(body.node.inputs), 3)]
    body.encode(body.write("Concat", *parts, axis=body.node.attrs["axis"]), 0)


def _where(body: Body) -> None:
    body.encode(body.write("Where", body.inputs[0], body.real(1), body.real(4)), 7)


def _integer_product(op: str) -> Callable[[Body], None]:
    """MatMulInteger and ConvInteger: whole numbers, as the product of the inputs in steps of 1."""

    def rule(body: Body) -> None:
        one = body.constant(np.float32(1))
        a, b, za, zb = body.inputs[:4]
        axes = (max(body.rank(0) - 2, 0), max(body.rank(1) - 1, 0)) if op == "MatMul" else (1, 0)
        pair = []
        for name, zero, axis in ((a, za, axes[0]), (b, zb, axes[1])):
            wide = zero and int(np.prod(body.types[zero].shape)) > 1
            scale = body.write("Expand", one, body.write("Shape", zero)) if wide else one
            pair.append(body.decode(name, scale, zero, axis))
        product = body.write(op, *pair, **body.node.attrs)
        body.write("Whole", product, out=body.node.outputs[0], domain="fheq", version=1)

    return rule


def _to_float(body: Body) -> None:
    """MatMulIntegerToFloat."""
    a, b, a_scale, b_scale, a_zero, b_zero, bias = body.inputs[:7]
    axis = max(body.rank(1) - 1, 0)
    body.biased_product(body.decode(a, a_scale, a_zero), body.decode(b, b_scale, b_zero, axis), bias)


def _dynamic_matmul(body: Body) -> None:
    """DynamicQuantizeMatMul: its first input is float."""
    b, scale, zero, bias = body.inputs[1:5]
    body.biased_product(body.inputs[0], body.decode(b, scale, zero, max(body.rank(1) - 1, 0)), bias)


def _dynamic(body: Body) -> None:
    """DynamicQuantizeLinear: its values in steps of 1 from zero point 0. What reads them multiplies by the scale, so the
    values themselves stay, and calibration finds one static quantizer for them."""
    y, scale, zero = (*body.node.outputs, "", "")[:3]
    body.write("Whole", body.inputs[0], out=y, domain="fheq", version=1)
    if scale:
        body.write("Constant", out=scale, value=np.float32(1))
    if zero:
        body.write("Constant", out=zero, value=np.uint8(0))


def _dynamic_lstm(body: Body) -> None:
    """DynamicQuantizeLSTM: an LSTM whose weights are stored transposed, with a scale per direction or per column.

    Raises:
        UnsupportedError: scales per column of two directions.
    """
    weights = []
    for at, scales in ((1, 8), (2, 10)):
        q, scale, zero = body.inputs[at], *body.inputs[scales : scales + 2]
        shape, axis = body.types[scale].shape, 0
        if len(shape) > 1 and shape[0] > 1:
            raise UnsupportedError(
                f"{describe(body.node)}: scales per column of two directions; quantize them with one scale each "
                "(per_channel=False)"
            )
        if len(shape) > 1:
            flat, axis = body.constant(np.array([-1], np.int64)), 2
            scale, zero = (body.write("Reshape", name, flat) if name else "" for name in (scale, zero))
        weights.append(body.write("Transpose", body.decode(q, scale, zero, axis), perm=(0, 2, 1)))
    x, bias, lengths, h, c, p = (body.inputs[at] for at in (0, 3, 4, 5, 6, 7))
    body.copy("LSTM", (x, *weights, bias, lengths, h, c, p))


def _attention(body: Body) -> None:
    """QAttention: queries, keys and values by one product, softmax of the scaled products per head, no mask.

    Raises:
        UnsupportedError: a mask, earlier keys and values, or rotary embeddings.
    """
    node = body.node
    x, w, bias, x_scale, w_scale, mask, x_zero, w_zero, past = body.inputs[:9]
    other = [name for name in ("unidirectional", "do_rotary", "past_present_share_buffer") if node.attrs.get(name, 0)]
    other += [what for what, name in (("mask_index", mask), ("past", past), ("present", "".join(node.outputs[1:]))) if name]
    if other:
        raise UnsupportedError(f"{describe(node)}: {', '.join(other)} are not supported; export it as plain operators")
    (batch, length, _), width = body.types[x].shape, body.types[w].shape[1] // 3
    heads = int(node.attrs["num_heads"])
    known = lambda *values: body.constant(np.array(values, np.int64))
    product = body.write("MatMul", body.decode(x, x_scale, x_zero), body.decode(w, w_scale, w_zero, 1))
    every = body.write("Add", product, bias)
    parts = []
    for part in range(3):
        taken = body.write("Slice", every, known(part * width), known((part + 1) * width), known(2))
        apart = body.write("Reshape", taken, known(batch, length, heads, width // heads))
        parts.append(body.write("Transpose", apart, perm=(0, 2, 3, 1) if part == 1 else (0, 2, 1, 3)))
    scale = node.attrs.get("scale") or 1 / np.sqrt(width / heads)
    scores = body.write("Mul", body.write("MatMul", parts[0], parts[1]), body.constant(np.float32(scale)))
    mixed = body.write("MatMul", body.write("Softmax", scores, axis=-1), parts[2])
    joined = body.write("Transpose", mixed, perm=(0, 2, 1, 3))
    body.write("Reshape", joined, known(batch, length, width), out=node.outputs[0])


def _refused(advice: str) -> Callable[[Body], None]:
    def rule(body: Body) -> None:
        raise UnsupportedError(f"{describe(body.node)}: this operator on integers is not supported; {advice}")

    return rule


_AS_QDQ = "quantize with quant_format=QuantFormat.QDQ, whose operators are the float ones"


def _same(op: str) -> Callable[[Body], None]:
    """An operator of ai.onnx under another domain."""

    def rule(body: Body) -> None:
        body.write(op, *body.node.inputs, out=body.node.outputs[0], **body.node.attrs)

    return rule


ONNX_RULES: dict[str, Callable[[Body], None]] = {
    "ConvInteger": _integer_product("Conv"),
    "DynamicQuantizeLinear": _dynamic,
    "MatMulInteger": _integer_product("MatMul"),
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
}
_MICROSOFT: dict[str, Callable[[Body], None]] = {
    "DequantizeLinear": _same("DequantizeLinear"),
    "DynamicQuantizeLSTM": _dynamic_lstm,
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "GatherBlockQuantized": gather_of_blocks,
    "MatMulIntegerToFloat": _to_float,
    "MatMulNBits": matmul_of_packed,
    "QAttention": _attention,
    "QEmbedLayerNormalization": _refused(_AS_QDQ),
    "QGemm": _gemm,
    "QLinearAdd": _pairwise("Add"),
    "QLinearAveragePool": _univariate("AveragePool"),
    "QLinearConcat": _concat,
    "QLinearConvTranspose": _refused(_AS_QDQ),
    "QLinearConv": _conv,
    "QLinearGlobalAveragePool": _univariate("GlobalAveragePool"),
    "QLinearLeakyRelu": _univariate("LeakyRelu"),
    "QLinearMul": _pairwise("Mul"),
    "QLinearReduceMean": _reduce_mean,
    "QLinearSigmoid": _univariate("Sigmoid"),
    "QLinearSoftmax": _softmax,
    "QLinearWhere": _where,
    "QuantizeLinear": _same("QuantizeLinear"),
}
