"""Attributes with the schema's defaults, and what the schema asks of a node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx
from onnx import AttributeProto, defs

from fheq.errors import ModelError, UnsupportedError
from fheq.onnx.tensors import to_array, to_dense

_FIELDS: dict[int, str] = {
    AttributeProto.FLOAT: "f",
    AttributeProto.INT: "i",
    AttributeProto.STRING: "s",
    AttributeProto.TENSOR: "t",
    AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
    AttributeProto.TENSORS: "tensors",
}
_WITH_NAN = ("membership_values", "nodes_splits")  # of TreeEnsemble: the end of a set, and a place for it
_SUBGRAPHS = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
_OTHERS = (AttributeProto.TYPE_PROTO, AttributeProto.TYPE_PROTOS, AttributeProto.SPARSE_TENSORS)
_SINGULAR = ("f", "i", "s", "t", "sparse_tensor")


def schema_of(op: str, version: int, domain: str) -> defs.OpSchema | None:
    """The schema in force, or None where onnx does not know the operator."""
    try:
        return defs.get_schema(op, version, domain)
    except (defs.SchemaError, TypeError):
        return None


def check_arity(schema: defs.OpSchema, inputs: tuple[str, ...], outputs: tuple[str, ...], where: str) -> None:
    """Checks the numbers of inputs and outputs, and that required inputs are there.

    Raises:
        ModelError: naming the node and what is missing.
    """
    for what, names, low, high in (
        ("inputs", inputs, schema.min_input, schema.max_input),
        ("outputs", outputs, schema.min_output, schema.max_output),
    ):
        if not low <= len(names) <= high:
            wanted = f"{low}" if low == high else f"{low} to {high}" if high < 2**31 - 1 else f"at least {low}"
            raise ModelError(f"{where} has {len(names)} {what}; {schema.name} takes {wanted}")
    for position, (name, formal) in enumerate(zip(inputs, schema.inputs)):
        if not name and formal.option == defs.OpSchema.FormalParameterOption.Single:
            raise ModelError(f"{where} lacks its input {position} ({formal.name})")


def read_attributes(
    protos,
    schema: defs.OpSchema | None,
    where: str,
    bound: Mapping[str, Any] | None = None,
    subgraph: Callable[[onnx.GraphProto], Any] | None = None,
) -> dict[str, Any]:
    """Every attribute of a node, the schema's defaults included.

    Args:
        protos: the node's `AttributeProto`s.
        bound: attributes of the call, when the node is in a function's body and refers to them.
        subgraph: reads a subgraph.

    Raises:
        ModelError: missing, unknown or of a wrong type.
        UnsupportedError: a subgraph where none can be read.
    """
    attrs: dict[str, Any] = {}
    for proto in protos:
        if not proto.name or proto.name in attrs:
            raise ModelError(
                f"{where} has {'the attribute ' + repr(proto.name) + ' twice' if proto.name else 'an unnamed attribute'}"
            )
        if proto.ref_attr_name:
            if bound is None:
                raise ModelError(f"{where}: attribute {proto.name!r} refers to a function's attribute outside of a function")
            if proto.ref_attr_name in bound:
                attrs[proto.name] = bound[proto.ref_attr_name]
            continue
        wanted = None
        if schema is not None:
            if proto.name not in schema.attributes:
                raise ModelError(f"{where} has an attribute {proto.name!r}, which {schema.name} does not have at this opset")
            wanted = int(schema.attributes[proto.name].type.value)  # type: ignore[attr-defined]
        if kind_of(proto) == AttributeProto.GRAPH and subgraph is not None:
            attrs[proto.name] = subgraph(proto.g)
        else:
            attrs[proto.name] = _value(proto, wanted, where)
    for name, formal in (schema.attributes if schema is not None else {}).items():
        if name in attrs:
            continue
        if formal.required:
            raise ModelError(f"{where} lacks the attribute {name!r}, which {schema.name} requires")  # type: ignore[union-attr]
    return attrs if schema is None else {**defaults_of(schema), **attrs}


def defaults_of(schema: defs.OpSchema) -> dict[str, Any]:
    """The attributes that a schema has defaults for."""
    formals = schema.attributes.items()
    return {name: _value(formal.default_value, None, schema.name) for name, formal in formals if formal.default_value.name}


def kind_of(proto: AttributeProto) -> int:
    """The type that an attribute states, or that of its value."""
    found = proto.type or next((k for k, field in _FIELDS.items() if _is_set(proto, field)), 0)
    return found or (AttributeProto.GRAPH if proto.HasField("g") else 0)


def _value(proto: AttributeProto, wanted: int | None, where: str) -> Any:
    """One attribute as a Python value: str, numbers, tuples, numpy arrays."""
    kind = kind_of(proto) or wanted or 0
    label = f"{where}, attribute {proto.name!r}"
    if kind in _SUBGRAPHS:
        raise UnsupportedError(
            f"{where} has a subgraph; fheq takes those of If, Loop, Scan and SequenceMap: export it with loops unrolled"
        )
    if kind == wanted == AttributeProto.TYPE_PROTO:
        return None  # of Optional: what is absent has no type here
    if kind in _OTHERS:
        raise UnsupportedError(f"{label}: attributes that are types or lists of sparse tensors are not supported")
    others = [f for f in _SINGULAR if kind in _FIELDS and f != _FIELDS[kind] and _is_set(proto, f)]
    if kind not in _FIELDS or (wanted is not None and kind != wanted) or (others and not _is_set(proto, _FIELDS[kind])):
        names = AttributeProto.AttributeType
        got = names.Name(kind) if kind in names.values() else str(kind)
        hint = f"; {names.Name(wanted)} is due" if wanted is not None else ""
        raise ModelError(f"{label} has a wrong type ({got}){hint}")
    value = getattr(proto, _FIELDS[kind])
    if kind == AttributeProto.STRING:
        return _text(value)
    if kind == AttributeProto.TENSOR:
        return to_array(value, label, strings=True, nan=proto.name in _WITH_NAN)
    if kind == AttributeProto.SPARSE_TENSOR:
        return to_dense(value, label)
    if kind == AttributeProto.STRINGS:
        return tuple(_text(s) for s in value)
    if kind == AttributeProto.TENSORS:
        return tuple(to_array(t, label, strings=True) for t in value)
    return tuple(value) if kind in (AttributeProto.FLOATS, AttributeProto.INTS) else value


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()


def _is_set(proto: AttributeProto, field: str) -> bool:
    return proto.HasField(field) if field in _SINGULAR else len(getattr(proto, field)) > 0
