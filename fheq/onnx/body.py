"""The nodes in place of one operator."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fheq.graph import Node, TensorType
from fheq.onnx.attributes import defaults_of, schema_of

VERSION = 21


class Body:
    """The nodes in place of one operator, under construction."""

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

    def copy(self, op: str, inputs: tuple[str, ...]) -> None:
        """Adds an operator of ai.onnx with the outputs and attributes of the node."""
        schema: Any = schema_of(op, VERSION, "")
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        known = {k: v for k, v in self.node.attrs.items() if k in schema.attributes}
        attrs = MappingProxyType({**defaults_of(schema), **known})
        self.nodes.append(Node(self.node.name, op, inputs, self.node.outputs, attrs, "", VERSION))

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

    def biased_product(self, a: str, b: str, bias: str) -> None:
        """MatMul to the node's output, with a bias where there is one."""
        if bias:
            self.write("Add", self.write("MatMul", a, b), bias, out=self.node.outputs[0])
        else:
            self.write("MatMul", a, b, out=self.node.outputs[0])
