"""Sequences and optionals as the tensors that they hold: lengths, and whether a value is there, are known at import.

`fheq.rewriting.fold.infer` keeps the names of the elements of each sequence. Operators on sequences become operators on
these tensors here; what makes a sequence becomes a SequenceConstruct, which no graph contains after import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from fheq.errors import ModelError, UnsupportedError
from fheq.graph import Node, TensorType, describe
from fheq.onnx.subgraphs import Subgraph, constant

OPS = (
    *("ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement", "SequenceAt", "SequenceConstruct"),
    *("SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap", "SplitToSequence"),
)
_VERSION = 13

Types = Mapping[str, TensorType]
Known = Mapping[str, np.ndarray]
Elements = Mapping[str, "tuple[str, ...] | None"]


def without_sequences(node: Node, types: Types, known: Known, sequences: Elements) -> list[Node] | None:
    """Nodes on tensors in place of one on a sequence or optional; None for other nodes, and for what `infer` notes.

    Raises:
        UnsupportedError: a position or length that depends on data.
        ModelError: a position outside of the sequence, or the value of an optional that has none.
    """
    held = any(name in sequences for name in node.inputs)
    if node.domain or not (node.op in OPS or (held and node.op == "Identity")):
        return None
    if any(name and name not in types and name not in sequences for name in node.inputs):
        return []  # an earlier node failed, and was reported
    if node.op == "SequenceConstruct" or (node.op == "Optional" and not node.inputs):
        return None
    if node.op in ("Identity", "Optional", "OptionalGetElement", "OptionalHasElement"):
        return _alias(node, sequences)
    if node.op == "SplitToSequence":
        return _split(node, types, known)
    if node.op == "SequenceEmpty":
        return [_construct(node, ())]
    elements = sequences.get(node.inputs[0])
    if elements is None:
        raise ModelError(f"{describe(node)}: its input {node.inputs[0]!r} is no sequence; export the model again")
    return _on_elements(node, elements, types, known, sequences)


def _on_elements(
    node: Node,
    elements: tuple[str, ...],
    types: Types,
    known: Known,
    sequences: Elements,
) -> list[Node]:
    """An operator whose first input is a sequence."""
    count = len(elements)
    if node.op == "SequenceLength":
        return [constant(node.outputs[0], np.int64(count))]
    if node.op == "SequenceAt":
        return [_identity(elements[_position(node, 1, known, count, count)], node.outputs[0])]
    if node.op == "SequenceInsert":
        at = _position(node, 2, known, count, count + 1, absent=count)
        return [_construct(node, (*elements[:at], node.inputs[1], *elements[at:]))]
    if node.op == "SequenceErase":
        at = _position(node, 1, known, count, count, absent=count - 1)
        return [_construct(node, (*elements[:at], *elements[at + 1 :]))]
    if node.op == "SequenceMap":
        return _mapped(node, count, sequences)
    return _concatenated(node, elements, types)


def _alias(node: Node, sequences: Elements) -> list[Node]:
    """An optional is its value, or absent: then its elements are None."""
    name, out = node.inputs[0] if node.inputs else "", node.outputs[0]
    absent = not name or (name in sequences and sequences[name] is None)
    if node.op == "OptionalHasElement":
        return [constant(out, np.bool_(not absent))]
    if node.op == "OptionalGetElement" and absent:
        raise ModelError(f"{describe(node)}: takes the value of an optional that has none; export the model again")
    elements = sequences.get(name)
    if elements is not None:
        return [_construct(node, elements)]
    return [replace(node, op="Optional", inputs=(), attrs={}) if absent else _identity(name, out)]


def _split(node: Node, types: Types, known: Known) -> list[Node]:
    """SplitToSequence: parts of the given sizes, of one size, or of size 1, which may be dropped."""
    x, (out,) = node.inputs[0], node.outputs
    shape = types[x].shape
    axis = node.attrs["axis"] % max(len(shape), 1)
    given = _value(node, 1, known) if len(node.inputs) > 1 else None
    if given is None or given.ndim == 0:
        step = 1 if given is None else int(given)
        if step < 1:
            raise ModelError(f"{describe(node)}: splits into parts of size {step}; a size must be positive")
        sizes = [min(step, shape[axis] - start) for start in range(0, shape[axis], step)]
    else:
        sizes = given.astype(np.int64).tolist()
    parts = tuple(f"{out}/part{i}" for i in range(len(sizes)))
    drop = given is None and not node.attrs["keepdims"]
    split = tuple(f"{name}/kept" for name in parts) if drop else parts
    attrs = MappingProxyType({"axis": axis})
    nodes = [
        constant(f"{out}/sizes", np.asarray(sizes, np.int64)),
        Node(f"{out}/split", "Split", (x, f"{out}/sizes"), split, attrs, "", _VERSION),
    ]
    if drop:
        nodes.append(constant(f"{out}/axis", np.array([axis])))
        nodes += [
            Node(part, "Squeeze", (whole, f"{out}/axis"), (part,), {}, "", _VERSION) for whole, part in zip(split, parts)
        ]
    return [*nodes, _construct(node, parts)]


def _concatenated(node: Node, elements: tuple[str, ...], types: Types) -> list[Node]:
    """ConcatFromSequence, along an axis that is there or a new one."""
    out = node.outputs[0]
    if not elements:
        raise UnsupportedError(f"{describe(node)}: joins a sequence of no elements; remove the node")
    new = node.attrs.get("new_axis", 0)
    axis = node.attrs["axis"] % (len(types[elements[0]].shape) + new)
    nodes: list[Node] = []
    if new:
        nodes.append(constant(f"{out}/axis", np.array([axis])))
        wide = tuple(f"{out}/element{i}" for i in range(len(elements)))
        nodes += [Node(w, "Unsqueeze", (e, f"{out}/axis"), (w,), {}, "", _VERSION) for e, w in zip(elements, wide)]
        elements = wide
    return [*nodes, Node(f"{out}/joined", "Concat", elements, (out,), MappingProxyType({"axis": axis}), "", _VERSION)]


def _mapped(node: Node, count: int, sequences: Elements) -> list[Node]:
    """SequenceMap: its body once for each element."""
    body: Subgraph = node.attrs["body"]
    nodes: list[Node] = []
    rows = []
    for i in range(count):
        given = []
        for name in node.inputs:
            held = sequences.get(name)
            if held is not None and i >= len(held):
                raise ModelError(f"{describe(node)}: {name!r} has {len(held)} elements where {count} are due")
            given.append(name if held is None else held[i])
        more, results = body.instance(f"{node.name or node.outputs[0]}/{i}", given)
        nodes += more
        rows.append(results)
    outputs = [(k, out) for k, out in enumerate(node.outputs) if out]
    return nodes + [_construct(replace(node, outputs=(out,)), tuple(row[k] for row in rows)) for k, out in outputs]


def _construct(node: Node, elements: Sequence[str]) -> Node:
    return Node(f"{node.outputs[0]}/elements", "SequenceConstruct", tuple(elements), node.outputs[:1], {}, "", _VERSION)


def _identity(name: str, out: str) -> Node:
    return Node(f"{out}/element", "Identity", (name,), (out,), {}, "", _VERSION)


def _value(node: Node, index: int, known: Known) -> Any:
    """A known input."""
    name = node.inputs[index]
    if name not in known:
        raise UnsupportedError(
            f"{describe(node)}: its input {name!r} depends on the model's inputs; fheq takes sequences of known lengths and "
            "known positions in them"
        )
    return np.asarray(known[name])


def _position(node: Node, index: int, known: Known, count: int, places: int, absent: int | None = None) -> int:
    """A place in a sequence of `count` elements, negative ones counted from the end; one of `places`."""
    if len(node.inputs) <= index or not node.inputs[index]:
        at = -1 if absent is None else absent
    else:
        at = int(_value(node, index, known).reshape(()))
        at = at + count if at < 0 else at
    if not 0 <= at < places:
        raise ModelError(f"{describe(node)}: position {at} is outside of a sequence of {count}; export the model again")
    return at
