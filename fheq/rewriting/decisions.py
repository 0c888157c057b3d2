"""Functions of one decision as affine ones: of a boolean b, any function is f(0) + (f(1) - f(0)) b.

A comparison costs a table per element; what is computed of one of its results after that, in however many nodes (an index
that is looked up, a one-hot row, its product with a table of labels), is Mul and Add by known numbers, which products with
weights and sums take in without a table of their own (`fheq.planning.operands.operand`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jax.experimental import enable_x64

from fheq.graph import Graph, Node
from fheq.interpret import run_node
from fheq.ops.table import Kind, find
from fheq.regions import FILLER, broadcast_elements, movements
from fheq.rewriting.affine_regions import affine_map
from fheq.rewriting.compose import MOST_WEIGHTS, PRODUCTS_PER_TABLE
from fheq.rewriting.edit import CODES, Draft
from fheq.steps import varies_only_along

LARGEST = 1 << 24  # elements of the largest tensor that is evaluated
PADDED = ("AveragePool", "Conv", "ConvTranspose")  # put zeros beside what they read: 0 must then be one of the two values


@dataclass(frozen=True, eq=False)
class Decided:
    """A tensor whose every element is a function of one element of a decision (arrays in its shape).

    Args:
        decision: the boolean tensor.
        elements: flat index into it, or -1 where the value is known.
        off, on: the tensor where the decision is false, and where it is true.
        summed: a product with weights or a sum came before.
    """

    decision: str
    elements: np.ndarray
    off: np.ndarray
    on: np.ndarray
    summed: bool = False

    @property
    def plain(self) -> bool:
        """Whether it holds nothing but elements of the decision."""
        return bool(np.all(self.elements != FILLER) and np.all(self.off == 0) and np.all(self.on == 1))

    @property
    def slope(self) -> np.ndarray:
        """What each element gains when its decision is true."""
        return np.subtract(self.on, self.off, dtype=np.result_type(self.on, np.int8))


def settle_decisions(graph: Graph) -> Graph:
    """The graph with functions of one decision written as affine ones where that saves tables and costs none.

    Elsewhere a product whose results are functions of one decision each (a looked-up number beside an encrypted one) becomes
    a choice between two known tensors, which is elementwise.
    """
    found = decided(graph)
    derived = {name: f for name, f in found.items() if name != f.decision}
    if all(f.plain and not f.summed for f in derived.values()):
        return graph
    reads = {d: _reads(graph, found, d) for d in dict.fromkeys(f.decision for f in derived.values())}
    settled = {d for d, names in reads.items() if _worthwhile(graph, found, names)}
    draft = Draft(graph)
    numbers = Numbers(draft, found)
    for node in graph.nodes:
        mine = found.get(node.outputs[0])
        if mine is not None and mine.decision in settled and node.outputs[0] != mine.decision:
            continue
        if mine is not None and _is_weighed(graph, node) and _fewer(found, node):
            _chosen(draft, node, mine)
            continue
        inputs = {name: found[name] for name in node.inputs if name in found and found[name].decision in settled}
        written = {name: f for name, f in inputs.items() if name != f.decision}
        if not written:
            draft.write(node)
        elif not _collapsed(draft, graph, node, written, numbers):
            named = {name: _affine(draft, node, f, numbers) for name, f in written.items()}
            draft.write(replace(node, inputs=tuple(named.get(name, name) for name in node.inputs)))
    return draft.finish()


def decided(graph: Graph) -> dict[str, Decided]:
    """The tensors that are functions of one decision, element by element, the decisions included."""
    found: dict[str, Decided] = {}
    for node in graph.nodes:
        computed = [name for name in dict.fromkeys(node.inputs) if name and name not in graph.constants]
        row, out = find(node), node.outputs[0]
        if row is None or not computed or len(node.outputs) != 1 or any(n in graph.pinned for n in (*computed, out)):
            continue
        shape = graph.types[out].shape
        sources = {found[name].decision if name in found else "" for name in computed}
        if len(sources) == 1 and "" not in sources and math.prod(shape) <= LARGEST:
            function = _through(graph, node, {name: found[name] for name in computed})
            if function is not None:
                found[out] = function
                continue
        if row.kind is Kind.ELEMENTWISE and graph.types[out].dtype == np.bool_ and math.prod(shape) <= LARGEST:
            everything = np.arange(math.prod(shape)).reshape(shape)
            found[out] = Decided(out, everything, np.zeros(shape, bool), np.ones(shape, bool))
    return found


def _through(graph: Graph, node: Node, xs: Mapping[str, Decided]) -> Decided | None:
    """What a node makes of functions of one decision; None where an element depends on several of its elements."""
    kind, out = find(node).kind, node.outputs[0]  # type: ignore[union-attr]
    shape = graph.types[out].shape
    if kind is Kind.ELEMENTWISE:
        parts = [x.elements.ravel()[broadcast_elements(x.elements.shape, shape)].reshape(shape) for x in xs.values()]
    elif kind is Kind.MOVEMENT:
        parts = [_moved(graph, node, xs)]
    elif kind is Kind.LINEAR and len(xs) == 1:
        parts = _summed(graph, node, next(iter(xs.values())).elements)
    else:
        return None
    if not parts:
        return None
    elements = np.maximum.reduce(parts)
    if any(np.any((part != FILLER) & (part != elements)) for part in parts):
        return None
    off, on = (_value(graph, node, {name: x.on if side else x.off for name, x in xs.items()}) for side in (False, True))
    if not (np.all(np.isfinite(off)) and np.all(np.isfinite(on))):
        return None
    summed = kind is Kind.LINEAR or any(x.summed for x in xs.values())
    return Decided(next(iter(xs.values())).decision, np.where(off == on, FILLER, elements), off, on, summed)


def _value(graph: Graph, node: Node, values: Mapping[str, np.ndarray]) -> np.ndarray:
    with enable_x64(), np.errstate(all="ignore"):
        read = lambda name: jnp.asarray(values[name] if name in values else graph.constants[name])
        return np.asarray(run_node(node, read, graph.constants)[0])


def _moved(graph: Graph, node: Node, xs: Mapping[str, Decided]) -> np.ndarray:
    move = movements(graph, node)[node.outputs[0]]
    elements = np.full(len(move.which), FILLER)
    for i, name in enumerate(move.inputs):
        if name in xs:
            here = move.which == i
            elements[here] = xs[name].elements.ravel()[move.element[here]]
    return elements.reshape(graph.types[node.outputs[0]].shape)


def _summed(graph: Graph, node: Node, elements: np.ndarray) -> list[np.ndarray]:
    """The least and the greatest element that each result of a product or sum depends on; nothing for other operators."""
    low = np.where(elements == FILLER, np.iinfo(np.int64).max, elements)
    if node.op in ("MatMul", "Gemm") and node.inputs[0] not in graph.constants and not node.attrs.get("transA", 0):
        ends = [fn(v, axis=-1, keepdims=elements.ndim > 1) for fn, v in ((np.min, low), (np.max, elements))]
    elif node.op in ("ReduceSum", "ReduceMean"):
        version = max(node.version, 18) if len(node.inputs) > 1 else node.version
        run = lambda op, v: run_node(replace(node, op=op, version=version), lambda _: v, graph.constants)[0]
        with enable_x64():
            ends = [np.asarray(run("ReduceMin", low)), np.asarray(run("ReduceMax", elements))]
    else:
        return []
    shape = graph.types[node.outputs[0]].shape
    return [np.broadcast_to(np.where(ends[1] == FILLER, FILLER, end), shape) for end in ends]


# What is worth it


def _reads(graph: Graph, found: Mapping[str, Decided], decision: str) -> list[tuple[Node | None, str]]:
    """Where functions of a decision end: a node that reads one and makes none (None: an output of the graph)."""
    names = {name for name, f in found.items() if f.decision == decision}
    ports = [(None, port.name) for port in graph.outputs if port.name in names]
    inner = lambda node: node.outputs[0] in names
    return [
        *ports,
        *((node, n) for node in graph.nodes if not inner(node) for n in dict.fromkeys(node.inputs) if n in names),
    ]


def _worthwhile(graph: Graph, found: Mapping[str, Decided], reads: list[tuple[Node | None, str]]) -> bool:
    """Whether everything that is made of a decision is weighed and summed, at no more tables than before."""
    if not any(name != found[name].decision for _, name in reads):
        return False
    for node, name in reads:
        f = found[name]
        if name == f.decision or (f.plain and node is not None):
            continue
        if node is None or not _is_weighed(graph, node) or f.off.dtype == np.bool_:
            return False
        if not (_is_absorbed(node, name, f) or _pays(graph, node, f)):
            return False
    return True


def _is_weighed(graph: Graph, node: Node) -> bool:
    row = find(node)
    computed = {name for name in node.inputs if name and name not in graph.constants}
    return row is not None and row.kind is Kind.LINEAR and len(computed) == 1


def function_labels(reader: str, off: np.ndarray, on: np.ndarray) -> np.ndarray | None:
    """A number for each element's function of its decision, alike for equal ones; None where the reader pads with others."""
    if reader in PADDED and not np.all((off == 0) | (on == 0)):
        return None
    pairs = np.stack([off.ravel(), on.ravel()], axis=1)
    return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(off.shape)


def _is_absorbed(node: Node, name: str, f: Decided) -> bool:
    """Whether the weights of a linear node can take in the affine functions, element by element, of what it reads."""
    labels = function_labels(node.op, f.off, f.on)
    if labels is None:
        return False
    if len(np.unique(labels)) == 1:
        return True
    first = node.inputs[0] == name
    axes = {"MatMul": -1 if first else -2, "Conv": 1, "ConvTranspose": 1}
    if node.op == "Gemm":
        axes["Gemm"] = -1 if first != bool(node.attrs.get("transA" if first else "transB", 0)) else -2
    return node.op in axes and f.off.ndim > 1 and varies_only_along(labels, axes[node.op])


def _pays(graph: Graph, node: Node, f: Decided) -> bool:
    """Whether one product of the whole decision costs less than a table for each element that the node reads."""
    used = len(np.unique(f.elements[f.elements != FILLER]))
    results = math.prod(graph.types[node.outputs[0]].shape)
    varying = f.elements != FILLER
    rows = np.stack([f.elements[varying], f.off[varying], f.on[varying]], axis=1)
    saved = len(np.unique(rows, axis=0)) - used
    return results * max(used, f.elements.size) <= MOST_WEIGHTS and results * used / PRODUCTS_PER_TABLE <= max(saved, used)


def _fewer(found: Mapping[str, Decided], node: Node) -> bool:
    """Whether no more of a node's results than of what it sums depend on the decision."""
    varying = lambda name: int(np.sum(found[name].elements != FILLER))
    return varying(node.outputs[0]) <= max(varying(name) for name in node.inputs if name in found)


# Writing


def _chosen(draft: Draft, node: Node, f: Decided) -> None:
    """A function of a decision as a choice between two known tensors."""
    ends = [draft.constant(f"{node.outputs[0]}/{label}", v) for label, v in (("on", f.on), ("off", f.off))]
    draft.apply(node, "Where", _moved_to(draft, node, f, f.decision), *ends, out=node.outputs[0])


class Numbers:
    """Decisions as numbers of a type: one tensor for all their readers, which keeps the name it has in a settled graph."""

    def __init__(self, draft: Draft, found: Mapping[str, Decided]) -> None:
        self.draft = draft
        self.written: dict[tuple[str, np.dtype], str] = {}
        self.names = {
            (f.decision, draft.types[name].dtype): name
            for name, f in [*found.items()][::-1]
            if name != f.decision and f.plain and not f.summed and np.array_equal(f.elements, found[f.decision].elements)
        }

    def of(self, node: Node, decision: str, dtype: np.dtype) -> str:
        key = decision, dtype
        if key not in self.written:
            name = self.names.get(key) or self.draft.fresh(f"{decision}/{dtype.name}")
            self.written[key] = self.draft.apply(node, "Cast", decision, out=name, to=CODES[dtype])
        return self.written[key]


def _affine(draft: Draft, node: Node, f: Decided, numbers: Numbers) -> str:
    """A function of a decision as `off + slope * decision`, for one reader."""
    if f.off.dtype == np.bool_:
        return draft.cast(node, _moved_to(draft, node, f, numbers.of(node, f.decision, np.dtype(np.float32))), np.bool_)
    x = _moved_to(draft, node, f, numbers.of(node, f.decision, f.off.dtype))
    for op, values, still in (("Mul", f.slope, 1), ("Add", f.off, 0)):
        if not np.all(values == still):
            known = values.ravel()[0] if np.all(values == values.ravel()[0]) else values
            x = draft.apply(node, op, x, draft.constant(f"{f.decision}/{op.lower()}", known, f.off.dtype))
    return x


def _moved_to(draft: Draft, node: Node, f: Decided, bits: str) -> str:
    """The elements of the decision, itself or as numbers, in the shape of the function; of known ones any will do."""
    size, own = math.prod(draft.types[bits].shape), np.arange(f.elements.size)
    at = np.where(f.elements.ravel() == FILLER, own % size, f.elements.ravel())
    if size == at.size and np.array_equal(at, own):
        return draft.reshape(node, bits, f.elements.shape)
    return draft.pick(node, bits, at.reshape(f.elements.shape))


def _collapsed(draft: Draft, graph: Graph, node: Node, written: Mapping[str, Decided], numbers: Numbers) -> bool:
    """Writes a linear node whose weights cannot take in the functions that it reads as a product with the decision."""
    (name, f), *more = written.items()
    if more or f.plain or not _is_weighed(graph, node) or _is_absorbed(node, name, f):
        return False
    out = node.outputs[0]
    kind, shape = graph.types[out].dtype, graph.types[out].shape
    matrix, offset = affine_map((node,), name, f.off.shape, out, graph.constants)
    offset = offset + matrix @ f.off.ravel().astype(np.float64)
    varying = f.elements.ravel() != FILLER
    used, which = np.unique(f.elements.ravel()[varying], return_inverse=True)
    weight = np.zeros((len(used), len(matrix)))
    np.add.at(weight, which, (matrix * f.slope.ravel())[:, varying].T)
    bits = numbers.of(node, f.decision, kind)
    bits = draft.reshape(node, bits, (1, math.prod(draft.types[bits].shape)))
    if len(used) < draft.types[bits].shape[1]:
        bits = draft.apply(node, "Gather", bits, draft.constant(f"{out}/used", used, np.dtype(np.int64)), axis=1)
    product = draft.apply(node, "MatMul", bits, draft.constant(f"{out}/decided", weight, kind))
    product = draft.reshape(node, product, shape)
    draft.apply(node, "Add", product, draft.constant(f"{out}/offset", offset.reshape(shape), kind), out=out)
    return True
