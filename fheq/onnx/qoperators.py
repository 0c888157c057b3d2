"""Operators that compute on integers, as float operators between DequantizeLinear and QuantizeLinear.

ONNX' QLinearConv, QLinearMatMul, MatMulInteger, ConvInteger and DynamicQuantizeLinear, and onnxruntime's of com.microsoft
(github.com/microsoft/onnxruntime, docs/ContribOperators.md), which its `quantize_static` and `quantize_dynamic` write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from fheq.errors import UnsupportedError, describe
from fheq.graph import Node, TensorType
from fheq.onnx.attributes import defaults_of, schema_of

VERSION = 21
MICROSOFT = "com.microsoft"


class _Body:
    """The nodes in place of one integer operator, under construction."""

    def __init__(self, node: Node, types: Mapping[str, TensorType]):
        self.node, self.types = node, types
        self.nodes: list[Node] = []
        self.inputs = (*node.inputs, *[""] * 16)

    def write(self, op: str, *inputs: str, out: str = "", version: int = VERSION, domain: str = "", **attrs: Any) -> str:
        """Adds a node with the schema's default attributes; its output."""
        base = next(o for o in self.node.outputs if o)
        out = out or f"{base}/{op}_{len(self.nodes)}"
        schema = schema_of(op, version, domain)
        defaults = {} if schema is None else defaults_of(schema)
        known = attrs if schema is None else {k: v for k, v in attrs.items() if k in schema.attributes}
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        merged = MappingProxyType({**defaults, **known})
        self.nodes.append(Node(f"{self.node.name or base}/{op}", op, inputs, (out,), merged, domain, version))
        return out

    def constant(self, value: Any) -> str:
        """Adds a known tensor."""
        return self.write("Constant", value=value)

    def real(self, at: int, axis: int = 1, out: str = "") -> str:
        """The real values of the integers at input `at`, whose scale and zero point follow; channels lie along `axis`."""
        x, scale, zero_point = self.inputs[at : at + 3]
        return self.decode(x, scale, zero_point, axis, out)

    def decode(self, x: str, scale: str, zero_point: str = "", axis: int = 1, out: str = "") -> str:
        """DequantizeLinear."""
        return self.write("DequantizeLinear", x, scale, zero_point, out=out, axis=axis)

    def encode(self, x: str, at: int) -> None:
        """QuantizeLinear to the node's output, by the scale and zero point at input `at`."""
        self.write("QuantizeLinear", x, *self.inputs[at : at + 2], out=self.node.outputs[0])

    def rank(self, at: int) -> int:
        """Axes of input `at`."""
        return len(self.types[self.inputs[at]].shape)


def unpacked(node: Node, types: Mapping[str, TensorType]) -> list[Node] | None:
    """The nodes in place of an operator on integers; None for other operators.

    Raises:
        UnsupportedError: a layout with channels last.
    """
    rule = (_MICROSOFT if node.domain == MICROSOFT else ONNX_RULES if not node.domain else {}).get(node.op)
    if rule is None or any(name not in types for name in node.inputs if name):
        return None
    if node.attrs.get("channels_last", 0):
        raise UnsupportedError(f"{describe(node)}: channels_last is not supported; export the model with channels first")
    body = _Body(node, types)
    rule(body)
    return body.nodes


def _bias(body: _Body, bias: str, a: str, b: str, alpha: float = 1.0) -> str:
    """An int32 bias, whose scale is the product of two scales."""
    if not bias:
        return ""
    scale = body.write("Mul", a, b)
    if alpha != 1.0:
        scale = body.write("Mul", scale, body.constant(np.float32(alpha)))
    return body.decode(bias, scale, axis=len(body.types[bias].shape) - 1 if body.types[bias].shape else 0)


def _conv(body: _Body) -> None:
    x, w = body.real(0), body.real(3, axis=0)
    bias = _bias(body, body.inputs[8], body.inputs[1], body.inputs[4])
    body.encode(body.write("Conv", x, w, bias, **body.node.attrs), 6)


def _matmul(body: _Body) -> None:
    a, b = body.real(0, axis=max(body.rank(0) - 2, 0)), body.real(3, axis=max(body.rank(3) - 1, 0))
    body.encode(body.write("MatMul", a, b), 6)


def _gemm(body: _Body) -> None:
    attrs = body.node.attrs
    a, b = body.real(0), body.real(3, axis=0 if attrs.get("transB", 0) else 1)
    bias = _bias(body, body.inputs[6], body.inputs[1], body.inputs[4], attrs.get("alpha", 1.0))
    if body.inputs[7]:
        body.encode(body.write("Gemm", a, b, bias, **attrs), 7)
    else:
        body.write("Gemm", a, b, bias, out=body.node.outputs[0], **attrs)


def _pairwise(op: str) -> Callable[[_Body], None]:
    return lambda body: body.encode(body.write(op, body.real(0), body.real(3)), 6)


def _univariate(op: str, version: int = VERSION) -> Callable[[_Body], None]:
    return lambda body: body.encode(body.write(op, body.real(0), version=version, **body.node.attrs), 3)


def _softmax(body: _Body) -> None:
    opset = int(body.node.attrs.get("opset", 13))
    _univariate("Softmax", opset)(body)


def _reduce_mean(body: _Body) -> None:
    _univariate("ReduceMean", 13)(body)


def _concat(body: _Body) -> None:
    parts = [body.real(at) for at in range(2, len(body.node.inputs), 3)]
    body.encode(body.write("Concat", *parts, axis=body.node.attrs["axis"]), 0)


def _where(body: _Body) -> None:
    body.encode(body.write("Where", body.inputs[0], body.real(1), body.real(4)), 7)


def _integer_product(op: str) -> Callable[[_Body], None]:
    """MatMulInteger and ConvInteger: whole numbers, as the product of the inputs in steps of 1."""

    def rule(body: _Body) -> None:
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


def _to_float(body: _Body) -> None:
    """MatMulIntegerToFloat."""
    a, b, a_scale, b_scale, a_zero, b_zero, bias = body.inputs[:7]
    axis = max(body.rank(1) - 1, 0)
    _biased_product(body, body.decode(a, a_scale, a_zero), body.decode(b, b_scale, b_zero, axis), bias)


def _dynamic_matmul(body: _Body) -> None:
    """DynamicQuantizeMatMul: its first input is float."""
    b, scale, zero, bias = body.inputs[1:5]
    _biased_product(body, body.inputs[0], body.decode(b, scale, zero, max(body.rank(1) - 1, 0)), bias)


def _biased_product(body: _Body, a: str, b: str, bias: str) -> None:
    out = body.node.outputs[0]
    if bias:
        body.write("Add", body.write("MatMul", a, b), bias, out=out)
    else:
        body.write("MatMul", a, b, out=out)


def _dynamic(body: _Body) -> None:
    """DynamicQuantizeLinear: its values in steps of 1 from zero point 0. What reads them multiplies by the scale, so the
    values themselves stay, and calibration finds one static quantizer for them."""
    y, scale, zero = (*body.node.outputs, "", "")[:3]
    body.write("Whole", body.inputs[0], out=y, domain="fheq", version=1)
    if scale:
        body.write("Constant", out=scale, value=np.float32(1))
    if zero:
        body.write("Constant", out=zero, value=np.uint8(0))


def _same(op: str) -> Callable[[_Body], None]:
    """An operator of ai.onnx under another domain."""

    def rule(body: _Body) -> None:
        body.write(op, *body.node.inputs, out=body.node.outputs[0], **body.node.attrs)

    return rule


ONNX_RULES: dict[str, Callable[[_Body], None]] = {
    "ConvInteger": _integer_product("Conv"),
    "DynamicQuantizeLinear": _dynamic,
    "MatMulInteger": _integer_product("MatMul"),
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
}
_MICROSOFT: dict[str, Callable[[_Body], None]] = {
    "DequantizeLinear": _same("DequantizeLinear"),
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "MatMulIntegerToFloat": _to_float,
    "QGemm": _gemm,
    "QLinearAdd": _pairwise("Add"),
    "QLinearAveragePool": _univariate("AveragePool"),
    "QLinearConcat": _concat,
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
