"""Maxima of accumulators: max(a, b) = b + relu(a - b) on what layers make, before it is quantized.

A maximum compares quantized tensors: pooling 2x2 results of a layer takes a table for each of the four, and three for the
comparisons, which are exact and as wide as a difference. As sums the comparisons read accumulators, rounded as those of
other tables are, and what is quantized is their result alone: four tables in all. Each rounding adds its error, so that it
pays where accumulators are rounded approximately; where tables read whole accumulators, it costs more than it saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fheq.client.outputs import rejoined
from fheq.graph import Graph, Node, is_float
from fheq.ops.reductions import axes_of
from fheq.ops.table import Kind, find, lookup
from fheq.ops.windows import window_of
from fheq.planning.plan import plan
from fheq.regions import COPIES
from fheq.rewriting.affine_regions import Search
from fheq.rewriting.edit import Draft
from fheq.rewriting.monotone import non_decreasing


def maxima_as_sums(graph: Graph) -> Graph:
    """The graph with maxima and minima of layers' results as sums of accumulators, where nothing else reads these.

    Non-decreasing functions before a maximum come after it. The results are the same; circuits whose accumulators are
    rounded approximately take fewer and narrower tables, each with its own error (`search` tries both). Maxima of tensors
    that the model states quantizers of stay as they are.

    Args:
        graph: what `import_onnx` or `prune` gives.

    Returns:
        The graph itself where it has no such maxima.
    """
    planned = plan(graph).graph
    changed = planned
    while (found := _first(changed)) is not None:
        changed = _replaced(changed, found)
    return graph if changed is planned else rejoined(graph, changed)


class _Maximum(NamedTuple):
    """A maximum or minimum, the layers' results that it compares, and the functions between."""

    node: Node
    compared: tuple[str, ...]
    functions: tuple[Node, ...]


def _first(graph: Graph) -> _Maximum | None:
    search = Search(graph)
    return next((found for node in graph.nodes if (found := _maximum(search, node)) is not None), None)


def _maximum(search: Search, node: Node) -> _Maximum | None:
    op, names = find(node), search.computed(node)
    shapes = {search.graph.types[name].shape for name in (*node.inputs, *node.outputs) if name}
    if op is None or len(node.outputs) > 1 or not is_float(search.graph.types[node.outputs[0]].dtype):
        return None
    if node.op in ("Max", "Min"):
        two = len(names) == 2 == len(node.inputs) and len(shapes) == 1 and search.is_step(node)
        return _Maximum(node, tuple(names), ()) if two and all(_is_layer(search, name) for name in names) else None
    if op.kind is not Kind.MAX:
        return None
    (name,), functions = names, list[Node]()
    while not _is_layer(search, name):
        function = search.producers.get(name)
        if function is None or not _alone(search, name) or len(search.computed(function)) != 1:
            return None
        (read,) = search.computed(function)
        if not non_decreasing(search.graph, node, function, read):
            return None
        name, functions = read, [function, *functions]
    return _Maximum(node, (name,), tuple(functions))


def _is_layer(search: Search, name: str) -> bool:
    """Whether a tensor is an accumulator, moved perhaps, that nothing else reads."""
    while (node := search.producers.get(name)) is not None and _alone(search, name):
        if lookup(node).kind is Kind.LINEAR or node.op in ("Add", "Sub"):
            return search.is_step(node)
        if node.op not in COPIES or len(search.computed(node)) != 1:
            return False
        (name,) = search.computed(node)
    return False


def _alone(search: Search, name: str) -> bool:
    """Whether a tensor has one reader, and no quantizer of the model's."""
    kept = name in search.outputs or name in search.graph.pinned
    return not kept and len(search.consumers.get(name, [])) == 1


def _replaced(graph: Graph, found: _Maximum) -> Graph:
    draft, moved = Draft(graph), {id(function) for function in found.functions}
    for node in graph.nodes:
        if node is found.node:
            _write(draft, found)
        elif id(node) not in moved:
            draft.write(node)
    return draft.finish()


def _write(draft: Draft, found: _Maximum) -> None:
    node, out = found.node, found.node.outputs[0]
    shape = draft.types[out].shape
    if len(found.compared) == 2:
        value = _larger(draft, node, *found.compared)
    else:
        (value,) = found.compared
        for axis, places in _windows(draft.graph, node):
            value = _along(draft, node, value, axis, places)
    if not found.functions:
        draft.reshape(node, value, shape, out=out)
        return
    value, read = draft.reshape(node, value, shape), found.compared[0]
    for function in found.functions:
        made = out if function is found.functions[-1] else draft.fresh(f"{function.outputs[0]}/after")
        inputs = tuple(value if name == read else name for name in function.inputs)
        draft.write(replace(function, inputs=inputs, outputs=(made,)))
        read, value = function.outputs[0], made


def _larger(draft: Draft, node: Node, a: str, b: str) -> str:
    """The maximum of two tensors, or their minimum for operators that take that."""
    above = draft.apply(node, "Relu", draft.apply(node, "Sub", a, b))
    return draft.apply(node, "Sub", a, above) if node.op in ("Min", "ReduceMin") else draft.apply(node, "Add", b, above)


def _along(draft: Draft, node: Node, x: str, axis: int, places: np.ndarray) -> str:
    """The maxima of windows along an axis.

    Args:
        places: `(out, k)`, the elements of each window.
    """
    pick = lambda x, at: draft.apply(node, "Gather", x, draft.constant(f"{x}/places", at), axis=axis)
    out, left = len(places), places.shape[1]
    x, rest = pick(x, places.T.ravel()), []  # first elements of all windows, then second ones, ...
    while left > 1:
        half = left // 2 * out
        if left % 2:
            rest.append(pick(x, np.arange(2 * half, left * out)))
        x, left = _larger(draft, node, pick(x, np.arange(half)), pick(x, np.arange(half, 2 * half))), left // 2
    for other in rest:
        x = _larger(draft, node, x, other)
    return x


def _windows(graph: Graph, node: Node) -> Iterator[tuple[int, np.ndarray]]:
    """The axes along which a node compares, each with the elements of its windows."""
    shape = graph.types[node.inputs[0]].shape
    if node.op != "MaxPool":
        for axis in axes_of(node, len(shape), graph.constants) or ():
            yield axis, np.arange(shape[axis])[None, :]
        return
    window = window_of(node, shape[2:], node.attrs["kernel_shape"])
    for i, out in enumerate(graph.types[node.outputs[0]].shape[2:]):
        places = window.places(i, out)
        inside = (places >= 0) & (places < shape[2 + i])
        first = np.take_along_axis(places, np.argmax(inside, axis=1)[:, None], axis=1)
        yield 2 + i, np.where(inside, places, first)  # a pad never wins: an element of the window again
