"""Indices that depend on data: products of one-hot rows with what they index (rules of `fheq.rewriting.decompose`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from fheq.graph import Graph, Node, TensorType
from fheq.rewriting.edit import CODES, VERSION, Draft


def with_known_inputs(node: Node, types: Mapping[str, TensorType], known: Mapping[str, np.ndarray]) -> list[Node] | None:
    """A Gather, GatherElements or ArrayFeatureExtractor with computed indices as a product with one-hot rows; None for
    other nodes.

    New known tensors come as Constant nodes.
    """
    rule = KNOWN_INPUTS.get(node.op)
    if rule is None or any(name not in types for name in node.inputs):
        return None
    draft = Draft(Graph((), (), (), known, types))
    if not rule(draft, node):
        return None
    new = [(name, value) for name, value in draft.constants.items() if name not in known]
    constants = [Node(name, "Constant", (), (name,), MappingProxyType({"value": v}), "", VERSION) for name, v in new]
    return constants + draft.nodes


def _wrapped(draft: Draft, node: Node, indices: str, count: int) -> str:
    """Signed indices with the negative ones counted from the end."""
    kind = draft.types[indices].dtype
    if kind.kind != "i":
        return indices
    zero, size = (
        draft.constant(f"{node.outputs[0]}/{label}", value, kind) for label, value in (("zero", 0), ("size", count))
    )
    below = draft.cast(node, draft.apply(node, "Less", indices, zero), kind)
    return draft.apply(node, "Add", indices, draft.apply(node, "Mul", below, size))


def _hot(draft: Draft, node: Node, indices: str, count: int, axis: int) -> str:
    """Booleans: indices along a new axis, compared with 0 .. count - 1."""
    indices = _wrapped(draft, node, indices, count)
    axes = draft.constant(f"{node.outputs[0]}/axes", [axis], np.dtype(np.int64))
    wide = draft.apply(node, "Unsqueeze", indices, axes)
    rest = len(draft.types[wide].shape) - axis - 1
    numbers = np.arange(count).reshape((-1,) + (1,) * rest)
    return draft.apply(node, "Equal", wide, draft.constant(f"{node.outputs[0]}/numbers", numbers, draft.types[wide].dtype))


def _one_hot(draft: Draft, node: Node) -> bool:
    indices, depth, values = node.inputs
    if not draft.depends(indices) or depth not in draft.constants or values not in draft.constants:
        return False
    rank = len(draft.types[indices].shape) + 1
    off, on = draft.constants[values]
    hot = _hot(draft, node, indices, int(draft.constants[depth].reshape(())), node.attrs["axis"] % rank)
    names = [draft.constant(f"{node.outputs[0]}/{label}", value) for label, value in (("on", on), ("off", off))]
    draft.apply(node, "Where", hot, *names, out=node.outputs[0])
    return True


def _gather(draft: Draft, node: Node) -> bool:
    """Gather with computed indices: a product of one-hot rows with the table; of known numbers, one for each index, a
    function of the index."""
    table, indices = node.inputs
    shape, kind = draft.types[table].shape, draft.types[table].dtype
    if not draft.depends(indices) or kind.kind == "b":
        return False
    axis, places = node.attrs["axis"] % len(shape), draft.types[indices].shape
    before, after = shape[:axis], shape[axis + 1 :]
    if table in draft.constants and np.prod((*before, *after)) == 1 and shape[axis] > 2:
        _looked_up(draft, node, draft.constants[table].ravel(), indices, (*before, *places, *after))
        return True
    rows = _rows(draft, node, table, axis)
    hot = draft.cast(node, _hot(draft, node, indices, shape[axis], len(places)), kind)
    product = draft.apply(node, "MatMul", draft.reshape(node, hot, (-1, shape[axis])), rows)
    spread = (*places, *before, *after)
    p, b = len(places), len(before)
    order = (*range(p, p + b), *range(p), *range(p + b, len(spread)))
    done = order == tuple(range(len(spread)))
    product = draft.reshape(node, product, spread, out=node.outputs[0] if done else "")
    if not done:
        draft.apply(node, "Transpose", product, out=node.outputs[0], perm=order)
    return True


def _looked_up(draft: Draft, node: Node, values: np.ndarray, indices: str, shape: tuple[int, ...]) -> None:
    """Known numbers by computed indices, as an operator on each index; the result has the given shape."""
    out, kind = node.outputs[0], values.dtype
    wide = np.dtype(np.int64 if kind.kind in "iu" else np.float32)
    entries = "values_int64s" if wide.kind == "i" else "values_floats"
    attrs = {"keys_int64s": tuple(range(-len(values), len(values))), entries: tuple(np.tile(values, 2).tolist())}
    indices = draft.reshape(node, draft.cast(node, indices, np.int64), shape)
    found = out if wide == kind else draft.fresh(f"{out}/LabelEncoder")
    name = f"{node.name or out}/LabelEncoder"
    draft.write(Node(name, "LabelEncoder", (indices,), (found,), MappingProxyType(attrs), "ai.onnx.ml", 2))
    if found != out:
        draft.apply(node, "Cast", found, out=out, to=CODES[kind])


def _gather_elements(draft: Draft, node: Node) -> bool:
    """GatherElements with computed indices: for each of them a product of a one-hot row with the elements along the axis."""
    table, indices = node.inputs
    shape, places, kind = draft.types[table].shape, draft.types[indices].shape, draft.types[table].dtype
    rank = len(shape)
    axis = node.attrs["axis"] % max(rank, 1)
    if not draft.depends(indices) or kind.kind == "b":
        return False
    if any(a != b for i, (a, b) in enumerate(zip(shape, places)) if i != axis):
        return False
    order = (*(i for i in range(rank) if i != axis), axis)
    back = tuple(int(i) for i in np.argsort(order))
    table, indices = (draft.apply(node, "Transpose", name, perm=order) for name in (table, indices))
    hot = draft.cast(node, _hot(draft, node, indices, shape[axis], rank), kind)
    columns = draft.reshape(node, table, (*draft.types[table].shape, 1))
    found = draft.reshape(node, draft.apply(node, "MatMul", hot, columns), draft.types[indices].shape)
    draft.apply(node, "Transpose", found, out=node.outputs[0], perm=back)
    return True


def _extract(draft: Draft, node: Node) -> bool:
    """ArrayFeatureExtractor with computed indices, as a Gather along the last axis."""
    table, indices = node.inputs
    columns = draft.reshape(node, indices, (-1,))
    rank, out = len(draft.types[table].shape), node.outputs[0]
    picked = draft.fresh(f"{out}/Gather") if rank == 1 else out
    if not _gather(draft, replace(node, op="Gather", inputs=(table, columns), outputs=(picked,), attrs={"axis": -1})):
        return False
    if rank == 1:
        draft.reshape(node, picked, (1, -1), out=out)
    return True


def _rows(draft: Draft, node: Node, table: str, axis: int) -> str:
    """The table as a matrix with one row per index."""
    shape = draft.types[table].shape
    perm = (axis, *(i for i in range(len(shape)) if i != axis))
    if table in draft.constants:
        value = draft.constants[table].transpose(perm).reshape(shape[axis], -1)
        return draft.constant(f"{table}/rows", value)
    moved = table if axis == 0 else draft.apply(node, "Transpose", table, perm=perm)
    return draft.reshape(node, moved, (shape[axis], -1))


RULES = {"Gather": _gather, "OneHot": _one_hot}
KNOWN_INPUTS = {"ArrayFeatureExtractor": _extract, "Gather": _gather, "GatherElements": _gather_elements}
