"""Types of all tensors, and known tensors folded: the pass that import and rewrites share.

Every node whose inputs are known is evaluated by its row, and so is every node that needs shapes alone (`Shape`). All other
outputs get a type by abstract evaluation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import enable_x64

from fheq.affine import LEAVES, Affine
from fheq.errors import FheqError, ShapeError, UnsupportedError, describe
from fheq.graph import Graph, Node, TensorType
from fheq.interpret import run_node
from fheq.ops.arguments import dtype_of
from fheq.ops.table import Kind, Op, find, lookup
from fheq.rewriting.channels import channel_axis, channel_numbers

MAX_ELEMENTS = 2**28
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


def prune(graph: Graph) -> Graph:
    """Drops what no output depends on, and adds the types of tensors that have none yet."""
    nodes = live(graph.nodes, [port.name for port in graph.outputs])
    inputs = [port.name for port in graph.inputs]
    read = {name for node in nodes for name in node.inputs if name} | {port.name for port in graph.outputs}
    constants = {name: value for name, value in graph.constants.items() if name in read}
    types = {name: graph.types[name] for name in inputs} | {name: type_of(value) for name, value in constants.items()}
    for node in nodes:
        old = {name: graph.types[name] for name in node.outputs if name in graph.types}
        types.update(old if len(old) == sum(map(bool, node.outputs)) else output_types(node, constants, types))
    pinned = {name: affine for name, affine in graph.pinned.items() if name in types}
    return graph.replace(nodes=nodes, constants=constants, types=types, pinned=pinned)


def live(nodes: Iterable[Node], outputs: Iterable[str]) -> tuple[Node, ...]:
    """The nodes that the outputs depend on."""
    wanted, kept = set(outputs), []
    for node in reversed(tuple(nodes)):
        if any(name in wanted for name in node.outputs if name):
            wanted.update(name for name in node.inputs if name)
            kept.append(node)
    return tuple(reversed(kept))


def is_float_cast(node: Node, types: Mapping[str, TensorType]) -> bool:
    """Whether a node changes the precision of real values alone, which integers on a grid do not notice."""
    if node.op != "Cast" or node.domain or not jnp.issubdtype(types[node.inputs[0]].dtype, jnp.floating):
        return False
    return jnp.issubdtype(dtype_of(node, node.attrs["to"]), jnp.floating)


def type_of(value: np.ndarray) -> TensorType:
    """The type of a known tensor."""
    return TensorType(tuple(value.shape), value.dtype)


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
    special = _guarded(node, lambda: quantizer(node, known)) if quantizer is not None else None
    if special is not None:
        value, affine = special
        if affine is not None:
            pins[node.outputs[0]] = affine
        return {node.outputs[0]: value}
    values = evaluated(node, known, types)
    if names and names[0] in pins and is_float_cast(node, {names[0]: type_of(known[names[0]])}):
        pins[node.outputs[0]] = pins[names[0]]
    if op.kind is Kind.MOVEMENT and names[0] in pins:
        pins.update(_moved_pins(node, known, pins[names[0]]))
    if node.op in ("Mul", "Div") and not node.domain:
        pins.update(_scaled_pins(node, known, pins, values))
    return values


def evaluated(node: Node, known: Mapping[str, np.ndarray], types: Mapping[str, TensorType]) -> dict[str, np.ndarray]:
    """Values of a node whose result depends on known tensors and shapes alone."""
    _guard_announced(node, known)
    if node.op != "Constant":
        output_types(node, known, types)

    def read(name: str) -> Any:
        if name in known:
            return jnp.asarray(known[name])
        return np.broadcast_to(np.zeros((), types[name].dtype), types[name].shape)

    results = _guarded(node, lambda: run_node(node, read, known))
    return {name: np.asarray(value) for name, value in zip(node.outputs, results) if name}


def output_types(node: Node, known: Mapping[str, np.ndarray], types: Mapping[str, TensorType]) -> dict[str, TensorType]:
    """Types of the outputs of one node, by abstract evaluation.

    Raises:
        ShapeError: the node does not fit its inputs, or an output has more than 2**28 elements.
    """
    op = lookup(node)
    data = list(dict.fromkeys(n for i, n in enumerate(node.inputs) if n and not op.is_static(i)))

    def run(*values: Any) -> tuple[Any, ...]:
        return run_node(node, dict(zip(data, values)).__getitem__, known)

    _guard_announced(node, known)
    shapes = [jax.ShapeDtypeStruct(types[name].shape, types[name].dtype) for name in data]
    results = _guarded(node, lambda: jax.eval_shape(run, *shapes))
    found = {name: TensorType(tuple(r.shape), np.dtype(r.dtype)) for name, r in zip(node.outputs, results) if name}
    for kind in found.values():
        _guard_size(node, math.prod(kind.shape), kind.shape)
    return found


def _guarded(node: Node, call: Callable[[], Any]) -> Any:
    try:
        with enable_x64(), np.errstate(all="ignore"):
            return call()
    except FheqError:
        raise
    except Exception as error:
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise ShapeError(f"{describe(node)}: cannot be evaluated on these inputs: {cause}") from error


def _guard_announced(node: Node, known: Mapping[str, np.ndarray]) -> None:
    """Refuses huge results of the ops that say their size in known tensors."""
    values = [known.get(name) for name in node.inputs]
    if node.op == "ConstantOfShape" and values and values[0] is not None:
        dims = [int(d) for d in values[0].ravel()]
        _guard_size(node, math.prod(dims), dims)
    if node.op == "Range" and len(values) == 3 and all(v is not None and v.size == 1 for v in values):
        start, limit, delta = (float(v.item()) for v in values if v is not None)
        count = (limit - start) / delta if delta else math.inf
        _guard_size(node, count if math.isfinite(count) else math.inf, (start, limit, delta))


def _guard_size(node: Node, count: float, shape: Any) -> None:
    if count > MAX_ELEMENTS:
        raise ShapeError(f"{describe(node)}: its result would have more than {MAX_ELEMENTS} elements ({tuple(shape)})")


def _moved_pins(node: Node, known: Mapping[str, np.ndarray], affine: Affine) -> dict[str, Affine]:
    """The quantizer of a pinned constant after a movement; none where its channels no longer lie along one axis."""
    if affine.axis is None and all(np.ndim(getattr(affine, leaf)) == 0 for leaf in LEAVES):
        return {name: affine for name in node.outputs if name}
    source = next(name for name in node.inputs if name)
    shape = known[source].shape
    if affine.axis is None:  # leaves that vary along several axes move as the tensor does
        leaves = {leaf: np.broadcast_to(getattr(affine, leaf), shape) for leaf in LEAVES}
        moved_leaves: dict[str, Any] = {leaf: _moved(node, known, source, value) for leaf, value in leaves.items()}
        fillers = any(np.any(v <= 0) for v in moved_leaves["scale"])
        rows = {} if fillers else {n: {leaf: v[i] for leaf, v in moved_leaves.items()} for i, n in enumerate(node.outputs)}
        return {name: replace(affine, **leaves) for name, leaves in rows.items() if name}
    moved = {}
    for name, result in zip(node.outputs, _moved(node, known, source, channel_numbers(shape, affine.axis))):
        place = channel_axis(result)
        if name and place is not None:
            axis, order = place
            taken: dict[str, Any] = {leaf: _taken(getattr(affine, leaf), order) for leaf in LEAVES}
            moved[name] = replace(affine, axis=axis - np.ndim(result), **taken)
    return moved


def _moved(node: Node, known: Mapping[str, np.ndarray], source: str, values: np.ndarray) -> list[np.ndarray]:
    """What a movement makes of other values in place of its data."""
    results = _guarded(node, lambda: run_node(node, lambda n: values if n == source else jnp.asarray(known[n]), known))
    return [np.asarray(result) for result in results]


def _scaled_pins(
    node: Node, known: Mapping[str, np.ndarray], pins: Mapping[str, Affine], values: Mapping[str, np.ndarray]
) -> dict[str, Affine]:
    """The quantizer of a pinned constant times (or by) a positive one: the same integers in other steps."""
    positions = [i for i, name in enumerate(node.inputs) if name in pins]
    if len(positions) != 1 or (node.op == "Div" and positions == [1]):
        return {}
    (name, value), source = next(iter(values.items())), node.inputs[positions[0]]
    factor = known[node.inputs[1 - positions[0]]].astype(np.float64)
    if value.shape != known[source].shape or not np.all(factor > 0):
        return {}
    affine = pins[source].expanded(value.ndim)
    factor = np.reciprocal(factor) if node.op == "Div" else factor
    leaves = {leaf: np.broadcast_to(getattr(affine, leaf), value.shape) for leaf in LEAVES}
    leaves["scale"] = np.asarray(affine.scale) * factor
    scaled: dict[str, Any] = {k: np.broadcast_to(v, value.shape) for k, v in leaves.items()}
    return {name: replace(affine, **scaled, axis=None)}


def _taken(leaf: Any, order: np.ndarray) -> Any:
    return np.asarray(leaf)[order] if np.ndim(leaf) == 1 else leaf
