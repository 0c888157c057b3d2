"""Functions of joined results of linear operators before the join.

Integers that are joined must be quantized: a sum of products would take a table for the join, and the function behind it
another one. Before the join they are one table, of each part.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fheq.graph import Graph, Node
from fheq.ops.table import Kind, find
from fheq.origins import elementwise_source
from fheq.rewriting.affine_regions import Search
from fheq.rewriting.edit import Draft
from fheq.rewriting.evaluation import evaluated


class _Joined(NamedTuple):
    """A tensor that lies in parts along an axis, counted from the end.

    Args:
        root: a Concat that it comes from.
        sizes: of the parts, along the axis.
    """

    root: str
    axis: int
    sizes: tuple[int, ...]


def apply_before_joins(graph: Graph) -> Graph:
    """The graph with elementwise functions of a Concat moved to what it joins, where some of that is an accumulator.

    Functions of which more than one tensor is used later stay: each would take a table of the accumulator, which may be
    wide, and has one of its quantized values.
    """
    joined = _moved(graph)
    draft, parts = Draft(graph), dict[str, tuple[str, ...]]()
    for node in graph.nodes:
        out = node.outputs[0]
        if out not in joined:
            draft.write(node)
        elif node.op == "Concat":
            draft.write(node)
            parts[out] = node.inputs
        else:
            parts[out] = tuple(_part(draft, node, joined[out], parts, i) for i in range(len(joined[out].sizes)))
            rank = len(graph.types[out].shape)
            draft.apply(node, "Concat", *parts[out], out=out, axis=rank + joined[out].axis)
    return apply_before_joins(draft.finish()) if joined else graph  # what is joined may be joined itself


def _moved(graph: Graph) -> dict[str, _Joined]:
    """The joined tensors, and functions of them, of which one is used by anything else."""
    search, joined, stated = Search(graph), dict[str, _Joined](), _stated(graph)
    for node in graph.nodes:
        out = node.outputs[0]
        if (node.op, node.domain) == ("Concat", ""):
            if out not in stated and any(map(search.is_requantized, node.inputs)):
                axis = node.attrs["axis"] % len(graph.types[out].shape) - len(graph.types[out].shape)
                joined[out] = _Joined(out, axis, tuple(graph.types[name].shape[axis] for name in node.inputs))
        elif _is_function(graph, node, joined):
            first, *others = {joined[name].root for name in node.inputs if name in joined}
            joined[out] = joined[next(name for name in node.inputs if name in joined)]
            joined = {n: j._replace(root=first) if j.root in {first, *others} else j for n, j in joined.items()}
    inner = {node.outputs[0] for node in graph.nodes if node.outputs[0] in joined and node.op != "Concat"}
    used = {name for node in graph.nodes if node.outputs[0] not in inner for name in node.inputs if name in joined}
    used |= {port.name for port in graph.outputs if port.name in joined}
    ends = [joined[name].root for name in used]
    alone = {joined[name].root for name in used & inner if ends.count(joined[name].root) == 1}
    return {name: whole for name, whole in joined.items() if whole.root in alone}


def _stated(graph: Graph) -> set[str]:
    """Joined tensors with a stated quantizer or accumulator behind them that is not one for all places."""
    nodes = [node for node in graph.nodes if node.domain and not _is_one_quantizer(graph, node)]
    return {elementwise_source(graph, name) for node in nodes for name in node.inputs if name not in graph.constants}


def _is_one_quantizer(graph: Graph, node: Node) -> bool:
    affine = graph.pinned.get(node.outputs[0])
    alike = all(graph.constants[name].size == 1 for name in node.inputs if name in graph.constants)
    return node.op == "FakeQuant" and alike and (affine is None or affine.axis is None)


def _is_function(graph: Graph, node: Node, joined: dict[str, _Joined]) -> bool:
    """Whether a node is an elementwise function of tensors that are joined alike."""
    op, computed = find(node), [name for name in node.inputs if name and name not in graph.constants]
    if op is None or op.kind is not Kind.ELEMENTWISE or (node.domain and not _is_one_quantizer(graph, node)):
        return False
    if len(node.outputs) != 1 or not computed or any(name not in joined for name in computed):
        return False
    shapes = {graph.types[name].shape for name in (*computed, *node.outputs)}
    return len(shapes) == 1 and len({joined[name][1:] for name in computed}) == 1


def _part(draft: Draft, node: Node, whole: _Joined, parts: dict[str, tuple[str, ...]], i: int) -> str:
    """What a node computes of part `i` of the tensors that it reads."""
    inputs = tuple(parts[name][i] if name in parts else _cut(draft, name, whole, i) for name in node.inputs)
    out = draft.fresh(f"{node.outputs[0]}/each")
    each = replace(node, inputs=inputs, outputs=(out,))
    if all(name in draft.constants for name in inputs if name):
        return draft.constant(out, evaluated(each, draft.constants, draft.types)[out])
    draft.write(each)
    if node.outputs[0] in draft.pinned:
        draft.pinned[out] = draft.pinned[node.outputs[0]]
    return out


def _cut(draft: Draft, name: str, whole: _Joined, i: int) -> str:
    """What part `i` meets of a known tensor."""
    value = draft.constants[name] if name else np.zeros(())
    if value.ndim < -whole.axis or value.shape[whole.axis] == 1:
        return name
    return draft.constant(f"{name}/part", np.split(value, np.cumsum(whole.sizes)[:-1], axis=whole.axis)[i])
