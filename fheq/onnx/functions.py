"""Operators without a row, or in a form that their row does not take, as other operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fheq.graph import Node, TensorType, describe
from fheq.onnx.attributes import schema_of
from fheq.onnx.control import unrolled
from fheq.onnx.loading import reading
from fheq.onnx.parse import inline
from fheq.onnx.qoperators import unpacked
from fheq.onnx.sequences import Elements, without_sequences
from fheq.onnx.subgraphs import CONTROL_FLOW
from fheq.ops.table import find
from fheq.rewriting.fold import HOLDERS
from fheq.rewriting.gather import with_known_inputs


def expand(
    node: Node, types: Mapping[str, TensorType], known: Mapping[str, np.ndarray], sequences: Elements
) -> list[Node] | None:
    """Nodes in place of one: the parts of an operator on integers, what control flow runs, the tensors of a sequence, the
    body of its schema's function, or what avoids a computed index; None for others."""
    parts = without_sequences(node, types, known, sequences)
    if parts is not None or (node.op in HOLDERS and not node.domain):
        return parts
    if find(node) is not None:
        return with_known_inputs(node, types, known)
    if node.op in CONTROL_FLOW and not node.domain:
        return unrolled(node, types, known, sequences)
    parts = unpacked(node, types)
    if parts is not None:
        return parts
    schema: Any = schema_of(node.op, node.version, node.domain)
    if schema is None:
        return None
    with reading(f"the function for {describe(node)}"):
        return _from_schema(schema, node, types)


def _from_schema(schema: Any, node: Node, types: Mapping[str, TensorType]) -> list[Node] | None:
    found = b""
    if schema.has_function:
        version = max((v for v in schema.function_opset_versions if v <= node.version), default=None)
        found = b"" if version is None else schema.get_function_with_opset_version(version)
    elif schema.has_context_dependent_function:
        if any(name not in types for name in node.inputs if name):
            return []  # what it reads failed
        version = max((v for v in schema.context_dependent_function_opset_versions if v <= node.version), default=None)
        found = b"" if version is None else _in_context(schema, version, node, types)
    if not found:
        return None
    body = onnx.FunctionProto()
    body.ParseFromString(found)
    return inline(body, node)


def _in_context(schema: Any, version: int, node: Node, types: Mapping[str, TensorType]) -> bytes:
    """The body that fits the types of the inputs; empty when the schema has none for them."""
    proto = helper.make_node(node.op, node.inputs, node.outputs, node.name, domain=node.domain)
    proto.attribute.extend(_attribute(name, value) for name, value in node.attrs.items())
    given = [_type_proto(types[name]).SerializeToString() if name else b"" for name in node.inputs]
    return schema.get_context_dependent_function_with_opset_version(version, proto.SerializeToString(), given)


def _attribute(name: str, value: Any) -> onnx.AttributeProto:
    return helper.make_attribute(name, numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value)


def _type_proto(kind: TensorType) -> onnx.TypeProto:
    return helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(kind.dtype), kind.shape)
