"""Edits of quantizers, and how they combine.

An edit of one quantizer is a function from `Affine` to `Affine`; an edit of all is one from `QParams` to `QParams`, as a
rewrite is one from `Graph` to `Graph`. `masked` and `partition` (after optax's) make the second kind from the first, `chain`
puts transforms of any kind one after the other, and `select` names the quantizers of a graph by node or operator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from fheq.affine import Affine
from fheq.arguments import near
from fheq.errors import QuantizationError
from fheq.graph import Graph
from fheq.planning.plan import plan
from fheq.qparams import PARTS, QParams
from fheq.steps import Linear

T = TypeVar("T")
Edit = Callable[[Affine], Affine]


def chain(*transforms: Callable[[T], T]) -> Callable[[T], T]:
    """One transform after the other: rewrites of graphs, edits of quantizers, or anything else that keeps its type."""

    def chained(value: T) -> T:
        for transform in transforms:
            value = transform(value)
        return value

    return chained


def masked(
    edit: Edit, where: Collection[str] | Callable[[str], bool], parts: Collection[str] = PARTS
) -> Callable[[QParams], QParams]:
    """An edit of the quantizers that `where` holds (names, as from `select`, or a predicate of names).

    Args:
        parts: of `QParams`, those that are edited: "tensors", "weights", "accumulators".

    Raises:
        QuantizationError: `where` is one str, there are unknown parts or, when applied, the names are of no quantizer.
    """
    if isinstance(where, str):
        raise QuantizationError(f"where must be a set of names or a predicate of them, got {where!r}: give {{{where!r}}}")
    chosen = where if callable(where) else frozenset(where).__contains__
    edited = partition({True: edit, False: lambda affine: affine}, lambda name: bool(chosen(name)), parts)

    def checked(qparams: QParams) -> QParams:
        known = {name for part in parts for name in getattr(qparams, part)}
        if not callable(where) and known.isdisjoint(where):
            names = sorted(where)[:8]
            there = near(names[0] if names else "", known)
            raise QuantizationError(f"{names} name no quantizer in {list(parts)}; there are {there}")
        return edited(qparams)

    return checked


def partition(
    edits: Mapping[Any, Edit], label: Callable[[str], Hashable], parts: Collection[str] = PARTS
) -> Callable[[QParams], QParams]:
    """Edits by label, `label(name)` choosing one for each quantizer.

    Raises:
        QuantizationError: when applied, a label without an edit, or an unknown part.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise QuantizationError(f"QParams has no parts {sorted(unknown)}; it has {PARTS}")

    def edit(name: str, affine: Affine) -> Affine:
        if label(name) not in edits:
            raise QuantizationError(f"{name!r} is labelled {label(name)!r}, for which there is no edit in {list(edits)}")
        return edits[label(name)](affine)

    def edited(qparams: QParams) -> QParams:
        return replace(qparams, **{p: {n: edit(n, a) for n, a in getattr(qparams, p).items()} for p in parts})

    return edited


def select(graph: Graph, *, op: str | None = None, node: str | None = None) -> frozenset[str]:
    """Names of the quantizers (and tensors and weights) of the nodes of an operator, or of a node by its name.

    They are what `masked` takes and what `Spec.overrides` has as keys:
    `Spec(overrides=dict.fromkeys(select(graph, op="Conv"), Override(n_bits=4)))`.

    Raises:
        QuantizationError: no such node makes anything that is quantized.
    """
    layout = plan(graph)
    weights = {step.out: step.weight_name for step in layout.steps if isinstance(step, Linear)}
    quantized = {*layout.points, *(step.out for step in layout.steps)}
    names: set[str] = set()
    for found in layout.graph.nodes:
        if (op is None or found.op == op) and (node is None or found.name == node):
            made = quantized.intersection(found.outputs)
            names.update(made, (weights[name] for name in made if name in weights))
    if not names:
        what = " and ".join(f"{k} {v!r}" for k, v in (("op", op), ("name", node)) if v is not None)
        there = sorted({(n.name or n.op) for n in layout.graph.nodes if quantized.intersection(n.outputs)})
        raise QuantizationError(f"no quantized node has {what or 'an output'}; there are {there[:12]}")
    return frozenset(names)
