"""Types of all tensors, and known tensors folded: the pass that import and rewrites share.

Every node whose inputs are known is evaluated by its row, and so is every node that needs shapes alone (`Shape`). All other
outputs get a type by abstract evaluation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from fheq.affine import Affine
from fheq.errors import FheqError, UnsupportedError
from fheq.graph import Graph, Node, TensorType, describe
from fheq.ops.table import Kind, Op, find, lookup
from fheq.rewriting.evaluation import evaluated, guarded, output_types, type_of
from fheq.rewriting.pins import passed_on
from fheq.rewriting.prune import prune

HOLDERS = ("SequenceConstruct", "Optional")
"""What is noted instead of computed: the elements of a sequence, and that an optional is absent."""

Sequences = Mapping[str, "tuple[str, ...] | None"]
Expand = Callable[[Node, Mapping[str, TensorType], Mapping[str, np.ndarray], Sequences], "list[Node] | None"]
Quantizer = Callable[[Node, Mapping[str, np.ndarray]], "tuple[np.ndarray, Affine | None] | None"]
Report = Callable[[FheqError], None]


@dataclass(frozen=True)
class Inferred:
    """What `infer` finds.

    Args:
        nodes: the nodes that stay, in topological order.
        trace: all given nodes, the folded ones included, with the axes of each Squeeze stated.
        sequences: the elements of each sequence, by name; None for an optional that is absent.
    """

    nodes: tuple[Node, ...]
    trace: tuple[Node, ...]
    constants: dict[str, np.ndarray]
    types: dict[str, TensorType]
    pinned: dict[str, Affine]
    sequences: dict[str, tuple[str, ...] | None]


def infer(
    nodes: Iterable[Node],
    inputs: Mapping[str, TensorType],
    constants: Mapping[str, np.ndarray],
    *,
    pinned: Mapping[str, Affine] | None = None,
    expand: Expand | None = None,
    quantizer: Quantizer | None = None,
    reuse: Inferred | None = None,
    report: Report | None = None,
) -> Inferred:
    """Folds what is known and finds the type of every tensor.

    Args:
        nodes: in topological order.
        expand: gives nodes in place of one without a row, or with a computed input that must be known, or a sequence; or
            None.
        quantizer: gives the value and the quantizer of a quantizer node on a known tensor, or None for other nodes.
        reuse: an earlier result; constants that depend on the same known tensors are taken from it.
        report: takes errors instead of raising them; nodes that depend on a failed one are then only looked up.

    Raises:
        UnsupportedError: a node has no row.
        ShapeError: a node does not fit its inputs, or a tensor has more than 2**28 elements.
    """
    known = dict(constants)
    types = {**{name: type_of(value) for name, value in known.items()}, **inputs}
    pins = dict(pinned or {})
    kept: list[Node] = []
    trace: list[Node] = []
    sequences: dict[str, tuple[str, ...] | None] = {}
    queue = deque((node, True) for node in nodes)
    while queue:
        node, given = queue.popleft()
        try:
            fits = _fits_row(node, known) and not any(name in sequences for name in node.inputs)
            body = expand(node, types, known, sequences) if expand is not None and not fits else None
            if body is not None:
                queue.extendleft((part, False) for part in reversed(body))
                trace += [node] * given
                continue
            if node.op in HOLDERS and not node.domain:
                trace += [node] * given
                sequences[node.outputs[0]] = node.inputs if node.op == "SequenceConstruct" else None
                continue
            op = lookup(node)
            if not _readable(node, types, sequences, kept, report):
                continue
            node = _state_axes(node, types)
            trace += [node] * given
            values = _known_outputs(node, op, known, types, pins, quantizer, reuse)
            if values is None:
                types.update(output_types(node, known, types))
                kept.append(node)
            else:
                known.update(values)
                types.update({name: type_of(value) for name, value in values.items()})
        except FheqError as error:
            if report is None:
                raise
            report(error)
    return Inferred(tuple(kept), tuple(trace), known, types, pins, sequences)


def fold(graph: Graph, quantizer: Quantizer | None = None) -> Graph:
    """The graph with everything known folded, dead nodes and constants dropped, and the types complete."""
    inputs = {port.name: port.type for port in graph.inputs}
    found = infer(graph.nodes, inputs, graph.constants, pinned=graph.pinned, quantizer=quantizer)
    return prune(graph.replace(nodes=found.nodes, constants=found.constants, types=found.types, pinned=found.pinned))


def _fits_row(node: Node, known: Mapping[str, np.ndarray]) -> bool:
    """Whether the node has a row, and the inputs that it wants known are."""
    op = find(node)
    return op is not None and all(not op.is_static(i) or n in known for i, n in enumerate(node.inputs) if n)


def _readable(
    node: Node, types: Mapping[str, TensorType], sequences: Sequences, earlier: list[Node], report: Report | None
) -> bool:
    """Whether every input has a type; only after an error that was reported may one lack it."""
    for name in node.inputs:
        if not name or name in types:
            continue
        if name in sequences:
            raise UnsupportedError(
                f"{describe(node)} reads {name!r}, a sequence or an absent optional, where fheq takes a tensor; take an "
                "element with SequenceAt, or join them with ConcatFromSequence"
            )
        for other in earlier:
            if name in other.outputs and any(o in types for o in other.outputs):
                raise UnsupportedError(
                    f"{describe(node)} reads {name!r}, but fheq does not compute output {other.outputs.index(name)} of "
                    f"{describe(other)}; export the model without it"
                )
        if report is None:
            raise UnsupportedError(f"{describe(node)} reads {name!r}, which fheq does not compute")
        return False
    return True


def _state_axes(node: Node, types: Mapping[str, TensorType]) -> Node:
    """A Squeeze without axes, with those that are 1 now: so a batch axis stays, when it is not 1."""
    if node.op != "Squeeze" or node.domain or "axes" in node.attrs or any(node.inputs[1:]):
        return node
    axes = tuple(i for i, d in enumerate(types[node.inputs[0]].shape) if d == 1)
    attrs = MappingProxyType({**node.attrs, "axes": axes})
    return replace(node, inputs=node.inputs[:1], attrs=attrs, version=min(node.version, 11))


def _known_outputs(
    node: Node,
    op: Op,
    known: dict[str, np.ndarray],
    types: Mapping[str, TensorType],
    pins: dict[str, Affine],
    quantizer: Quantizer | None,
    reuse: Inferred | None,
) -> dict[str, np.ndarray] | None:
    """Values of the outputs, or None where they depend on data."""
    names = [name for name in node.inputs if name]
    if not all(name in known for name in names):
        shapes_alone = op.kind is Kind.CONSTANT and all(
            not op.is_static(i) or name in known for i, name in enumerate(node.inputs) if name
        )
        return evaluated(node, known, types) if shapes_alone else None
    if reuse is not None and names and all(known[name] is reuse.constants.get(name) for name in names):
        old = {name: reuse.constants[name] for name in node.outputs if name in reuse.constants}
        if old:
            pins.update({name: reuse.pinned[name] for name in old if name in reuse.pinned})
            return old
    special = guarded(node, lambda: quantizer(node, known)) if quantizer is not None else None
    if special is not None:
        value, affine = special
        if affine is not None:
            pins[node.outputs[0]] = affine
        return {node.outputs[0]: value}
    values = evaluated(node, known, types)
    pins.update(passed_on(node, known, pins, values))
    return values
