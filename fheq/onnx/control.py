"""If, Loop and Scan as the nodes that they run, where conditions and trip counts are known."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from fheq.errors import ModelError, UnsupportedError
from fheq.graph import Node, TensorType, describe
from fheq.onnx.scanned_distances import scanned_distances
from fheq.onnx.subgraphs import Subgraph, constant

MAX_NODES = 200_000
_VERSION = 13
_ITERATION, _SCANNED = "fheq.iteration", "fheq.scanned"  # attributes of what is left of a Loop

Types = Mapping[str, TensorType]
Known = Mapping[str, np.ndarray]


def unrolled(node: Node, types: Types, known: Known, sequences: Container[str] = ()) -> list[Node]:
    """The nodes in place of an If, Loop or Scan; a Loop becomes its next iteration and a Loop for the rest.

    Raises:
        UnsupportedError: a condition or trip count that depends on data, or too many iterations.
    """
    if any(name and name not in types and name not in sequences for name in node.inputs):
        return []  # an earlier node failed, and was reported
    try:
        return {"If": _if, "Loop": _loop, "Scan": _scan}[node.op](node, types, known)
    except (ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{describe(node)}: its subgraph does not fit its inputs and outputs ({error})") from error


def _if(node: Node, types: Types, known: Known) -> list[Node]:
    condition = _value(node, 0, "condition", known, "compute both branches and choose with Where")
    branch: Subgraph = node.attrs["then_branch" if condition else "else_branch"]
    body, results = branch.instance(_prefix(node, "then" if condition else "else"), ())
    return body + _named(node, results)


def _loop(node: Node, types: Types, known: Known) -> list[Node]:
    """One iteration, and a Loop that is one further; at the end the outputs."""
    body: Subgraph = node.attrs["body"]
    iteration, scanned = node.attrs.get(_ITERATION, 0), node.attrs.get(_SCANNED, ())
    remedy = "export the model with a fixed number of iterations"
    trips = _value(node, 0, "trip count", known, remedy) if node.inputs[0] else None
    going = _value(node, 1, "condition", known, remedy) if len(node.inputs) > 1 and node.inputs[1] else True
    states = node.inputs[2:]
    if not going or (trips is not None and iteration >= int(trips)):
        stacks = zip(*scanned) if scanned else [()] * (len(node.outputs) - len(states))
        return _named(node, states) + _stacked(node, list(stacks), len(states), [0] * len(node.outputs))
    _guard(node, iteration * max(len(body.nodes), 1))
    prefix = _prefix(node, iteration)
    given = [f"{prefix}/iteration", f"{prefix}/condition"]
    nodes, results = body.instance(prefix, [*given, *states])
    values = [constant(given[0], np.int64(iteration)), constant(given[1], np.bool_(True))]
    rest = {**node.attrs, _ITERATION: iteration + 1, _SCANNED: (*scanned, tuple(results[1 + len(states) :]))}
    inputs = (node.inputs[0], results[0], *results[1 : 1 + len(states)])
    return [*values, *nodes, replace(node, inputs=inputs, attrs=MappingProxyType(rest))]


def _scan(node: Node, types: Types, known: Known) -> list[Node]:
    if node.version < 9:
        return _batched_scan(node, types, known)
    body: Subgraph = node.attrs["body"]
    if (found := scanned_distances(node, types)) is not None:
        return found
    count = node.attrs["num_scan_inputs"]
    states, scanned = node.inputs[: len(node.inputs) - count], node.inputs[len(node.inputs) - count :]
    axes = node.attrs.get("scan_input_axes") or (0,) * count
    backward = node.attrs.get("scan_input_directions") or (0,) * count
    lengths = {types[name].shape[axis] for name, axis in zip(scanned, axes)}
    if len(lengths) != 1:
        raise ModelError(f"{describe(node)}: its scan inputs have different lengths {sorted(lengths)}")
    (length,) = lengths
    _guard(node, length * len(body.nodes))
    nodes: list[Node] = []
    rows = []
    for t in range(length):
        prefix = _prefix(node, t)
        slices = [f"{prefix}/slice{i}" for i in range(count)]
        for name, part, axis, reverse in zip(scanned, slices, axes, backward):
            nodes += _taken(name, part, length - 1 - t if reverse else t, axis)
        more, results = body.instance(prefix, [*states, *slices])
        nodes += more
        states = tuple(results[: len(states)])
        rows.append(results[len(states) :])
    width = len(body.outputs) - len(states)
    columns = [[row[k] for row in rows] for k in range(width)]
    reversed_ = node.attrs.get("scan_output_directions") or (0,) * width
    columns = [column[::-1] if flag else column for column, flag in zip(columns, reversed_)]
    out_axes = node.attrs.get("scan_output_axes") or (0,) * width
    return nodes + _named(node, states) + _stacked(node, columns, len(states), [0] * len(states) + list(out_axes))


def _batched_scan(node: Node, types: Types, known: Known) -> list[Node]:
    """Scan of opset 8: every sample of a batch on its own."""
    lengths, inputs = node.inputs[0], node.inputs[1:]
    samples, time = types[inputs[-1]].shape[:2]
    if lengths and (lengths not in known or np.any(known[lengths] != time)):
        raise UnsupportedError(f"{describe(node)}: sequence_lens of Scan; give sequences of full length")
    nodes, rows = [], []
    for b in range(samples):
        prefix = _prefix(node, f"sample{b}")
        given = [f"{prefix}/in{i}" for i in range(len(inputs))]
        for name, part in zip(inputs, given):
            nodes += _taken(name, part, b, 0)
        results = tuple(f"{prefix}/out{i}" for i in range(len(node.outputs)))
        attrs = {**node.attrs, "scan_input_directions": node.attrs.get("directions")}
        nodes.append(replace(node, name=prefix, inputs=tuple(given), outputs=results, attrs=attrs, version=9))
        rows.append(results)
    return nodes + _stacked(node, [list(column) for column in zip(*rows)], 0, [0] * len(node.outputs))


def _value(node: Node, position: int, what: str, known: Known, remedy: str) -> Any:
    """A known scalar input."""
    name = node.inputs[position]
    if name not in known:
        raise UnsupportedError(f"{describe(node)}: its {what} {name!r} depends on the model's inputs; {remedy}")
    return np.asarray(known[name]).reshape(()).item()


def _guard(node: Node, count: int) -> None:
    if count > MAX_NODES:
        raise UnsupportedError(f"{describe(node)}: unrolls to more than {MAX_NODES} nodes; use fewer iterations")


def _prefix(node: Node, part: Any) -> str:
    return f"{node.name or next((o for o in node.outputs if o), node.op)}/{part}"


def _named(node: Node, results: Any) -> list[Node]:
    """Identity nodes that give the first results the node's output names."""
    if len(results) > len(node.outputs) and node.op == "If":
        raise ValueError(f"{len(results)} results for {len(node.outputs)} outputs")
    pairs = zip(results, node.outputs)
    return [Node(f"{out}/result", "Identity", (name,), (out,), {}, "", _VERSION) for name, out in pairs if out]


def _taken(name: str, out: str, index: int, axis: int) -> list[Node]:
    """One element along an axis, which is dropped."""
    attrs = MappingProxyType({"axis": axis})
    return [constant(f"{out}/at", np.int64(index)), Node(out, "Gather", (name, f"{out}/at"), (out,), attrs, "", _VERSION)]


def _stacked(node: Node, columns: list[Any], first: int, axes: list[int]) -> list[Node]:
    """Outputs from position `first` on: the tensors of each column along a new axis."""
    nodes: list[Node] = []
    for out, axis, column in zip(node.outputs[first:], axes[first:], columns):
        if not out:
            continue
        if not column:
            raise UnsupportedError(f"{describe(node)}: {out!r} has no element, as no iteration runs; remove the node")
        nodes.append(constant(f"{out}/axis", np.array([axis])))
        parts = [f"{out}/part{i}" for i in range(len(column))]
        for name, part in zip(column, parts):
            nodes.append(Node(part, "Unsqueeze", (name, f"{out}/axis"), (part,), {}, "", _VERSION))
        attrs = MappingProxyType({"axis": axis})
        nodes.append(Node(f"{out}/stack", "Concat", tuple(parts), (out,), attrs, "", _VERSION))
    return nodes
