"""Strings of a model as numbers.

Class labels and categories are the strings of models: no arithmetic is done on them. Every string that occurs in a model
gets a number, its place in a sorted list; nodes and known tensors hold numbers from then on. Inputs and outputs of strings
keep the list (`Port.labels`): the client numbers its categories before encryption and names labels after decryption.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fheq.errors import UnsupportedError
from fheq.graph import Node, describe

STRING = 8  # TensorProto.STRING
ML = "ai.onnx.ml"
_LISTS = ("cats_strings", "classes_strings", "classlabels_strings", "keys_strings", "values_strings", "value_strings")
_SINGLE = ("default_string", "value_string")
_TENSORS = ("keys_tensor", "values_tensor", "default_tensor", "value")
_CARRIERS = (
    *("ArrayFeatureExtractor", "Cast", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape"),
    *("Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
)
_READERS = ("CategoryMapper", "Concat", "Equal", "LabelEncoder", "OneHotEncoder", "Where")


class Numbered(NamedTuple):
    """Nodes and known tensors without strings, the list of strings, and the names of tensors that hold their numbers."""

    nodes: tuple[Node, ...]
    constants: dict[str, np.ndarray]
    strings: tuple[str, ...]
    holders: frozenset[str]


def number_strings(nodes: Sequence[Node], constants: Mapping[str, np.ndarray], inputs: Collection[str] = ()) -> Numbered:
    """Numbers in place of strings.

    Args:
        inputs: names of the model's inputs that hold strings.

    Raises:
        UnsupportedError: a number is cast to a string, or the strings of an input meet an operator that computes on them.
    """
    found = {s for value in constants.values() for s in _of_array(value)} | {s for n in nodes for s in _of_node(n)}
    strings = tuple(sorted(found))
    number = {s: i for i, s in enumerate(strings)}
    known = {name: _numbered(value, number) for name, value in constants.items()}
    holders = {name for name, value in constants.items() if value.dtype == object} | set(inputs)
    given = set(inputs)
    changed = []
    for node in nodes:
        if not given.isdisjoint(node.inputs):
            _refuse_computing(node, given)
        if _makes_strings(node, holders):
            holders.add(node.outputs[0])
            if node.op == "Split":
                holders.update(node.outputs)
            if not given.isdisjoint(node.inputs):
                given.update(holders.intersection(node.outputs))
        changed.append(_rewritten(node, number, holders))
    return Numbered(tuple(changed), known, strings, frozenset(holders))


def _refuse_computing(node: Node, given: set[str]) -> None:
    """Refuses a node that does more with strings of the data than to compare and to move them."""
    to_number = node.op == "Cast" and node.attrs["to"] != STRING
    if node.op not in (*_CARRIERS, *_READERS) or to_number:
        name = next(name for name in node.inputs if name in given)
        what = "casts them to numbers" if to_number else f"{node.op} does not compare them with known ones"
        raise UnsupportedError(
            f"{describe(node)}: its input {name!r} holds strings of the data, and {what}; give the model numbers there, and "
            "leave this step to whoever encrypts"
        )


def _of_array(value: Any) -> Iterator[str]:
    if isinstance(value, np.ndarray) and value.dtype == object:
        yield from (str(s) for s in value.ravel())


def _of_node(node: Node) -> Iterator[str]:
    for name in (*_LISTS, *_SINGLE):
        value = node.attrs.get(name)
        if name == "default_string" and not _gives_strings(node):  # the schema's default, "_Unused"
            continue
        if value is not None and (node.domain == ML or node.op == "Constant"):
            yield from [value] if isinstance(value, str) else value
    for name in _TENSORS:
        yield from _of_array(node.attrs.get(name))


def _gives_strings(node: Node) -> bool:
    """Whether a map's values, and so its default, may be strings."""
    tensor = node.attrs.get("values_tensor")
    of_objects = isinstance(tensor, np.ndarray) and tensor.dtype == object
    return of_objects or any(node.attrs.get(name) for name in ("cats_strings", "classes_strings", "values_strings"))


def _numbered(value: Any, number: Mapping[str, int]) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype != object:
            return value
        return np.array([number[str(s)] for s in value.ravel()], np.int64).reshape(value.shape)
    if isinstance(value, str):
        return number.get(value, -1)
    return tuple(number[s] for s in value)


def _makes_strings(node: Node, holders: set[str]) -> bool:
    """Whether the first output holds strings."""
    if node.domain == ML and node.op != "ArrayFeatureExtractor":
        tensor = node.attrs.get("values_tensor")
        to_strings = node.op in ("LabelEncoder", "CategoryMapper") and (
            bool(node.attrs.get("values_strings"))
            or (isinstance(tensor, np.ndarray) and tensor.dtype == object)
            or (("classes_strings" in node.attrs or node.op == "CategoryMapper") and node.inputs[0] not in holders)
        )
        return to_strings or (bool(node.attrs.get("classlabels_strings")) and node.op != "ZipMap")
    if node.op == "Constant":
        return any(_of_node(node))
    if node.op in _CARRIERS:
        return node.inputs[0] in holders
    if node.op == "Where":
        return any(name in holders for name in node.inputs[1:])
    return node.op == "Concat" and any(name in holders for name in node.inputs)


def _rewritten(node: Node, number: Mapping[str, int], holders: set[str]) -> Node:
    if node.op == "Cast" and not node.domain and node.attrs["to"] == STRING:
        if node.inputs[0] not in holders:
            raise UnsupportedError(
                f"{describe(node)}: casts numbers to strings; fheq takes strings as labels of classes only: leave them "
                "numbers"
            )
        return replace(node, op="Identity", attrs=MappingProxyType({}))
    attrs = {}
    for name, value in node.attrs.items():
        listed = name in (*_LISTS, *_SINGLE) and (node.domain == ML or node.op == "Constant")
        tensor = name in _TENSORS and isinstance(value, np.ndarray) and value.dtype == object
        attrs[name] = _numbered(value, number) if listed or tensor else value
    if node.op in ("LabelEncoder", "CategoryMapper"):
        attrs["of_strings"] = node.inputs[0] in holders
    if node.op == "Constant" and ("value_string" in attrs or "value_strings" in attrs):
        attrs = {"value": np.asarray(attrs.get("value_string", attrs.get("value_strings")), np.int64)}
    return replace(node, attrs=MappingProxyType(attrs))
