"""Graph to Graph: what import does last, and what planning starts with.

Each rewrite is a pure function; a rewritten graph computes the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from fheq.estimators import expand_estimators
from fheq.graph import Graph, Node, TensorType
from fheq.ops.table import Kind, lookup
from fheq.qat import normalise_quantizers
from fheq.rewriting.batchnorm import fold_batch_norms
from fheq.rewriting.compose import compose as compose
from fheq.rewriting.decisions import settle_decisions as settle_decisions
from fheq.rewriting.decompose import decompose as decompose
from fheq.rewriting.edit import CODES, Draft
from fheq.rewriting.fold import fold
from fheq.rewriting.joined import compose_joined as compose_joined
from fheq.rewriting.known_parts import separate_known_parts as separate_known_parts
from fheq.rewriting.monotone import activate_before_maximum as activate_before_maximum
from fheq.rewriting.monotone import quantize_before_movement as quantize_before_movement
from fheq.rewriting.prune import prune
from fheq.rewriting.softmax import recognise_softmax

Rewrite = Callable[[Graph], Graph]

_OF_ONE_INPUT = ("Sum", "Mean", "Max", "Min", "Concat")


def remove_identities(graph: Graph) -> Graph:
    """Drops Identity, Dropout (inference), Cast to the same type, and variadic ops with one input.

    One stays where it is all that stands between an input or constant of the graph and an output.
    """
    kept = {port.name for port in (*graph.inputs, *graph.outputs)} | set(graph.constants)
    outputs = {port.name for port in graph.outputs}
    names: dict[str, str] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        source, target = names.get(node.inputs[0], node.inputs[0]) if node.inputs else "", node.outputs[0]
        if not _is_identity(node, graph.types) or (target in outputs and source in kept):
            nodes.append(_renamed(node, names))
        elif target in outputs:  # the producer takes the output's name
            names = {k: target if v == source else v for k, v in names.items()} | {source: target}
            nodes = [_renamed(n, {source: target}) for n in nodes]
            kept.add(target)
        else:
            names[target] = source
    back = {new: old for old, new in names.items() if new in outputs}
    pinned = {back.get(name, name): affine for name, affine in graph.pinned.items()}
    pinned = {names.get(name, name): affine for name, affine in pinned.items()}
    return prune(graph.replace(nodes=tuple(nodes), pinned=pinned))


def state_forms(graph: Graph) -> Graph:
    """Pad's value as an input and not as an attribute, as before opset 11; CastLike as the Cast that it stands for."""
    if not any(_is_restated(graph, node) for node in graph.nodes):
        return graph
    draft = Draft(graph)
    for node in graph.nodes:
        if not _is_restated(graph, node):
            draft.write(node)
        elif node.op == "CastLike":
            kind = graph.types[node.inputs[1]].dtype
            draft.apply(node, "Cast", node.inputs[0], out=node.outputs[0], to=CODES[kind])
        else:
            pads = draft.constant(f"{node.outputs[0]}/pads", node.attrs["pads"], np.dtype(np.int64))
            value = draft.constant(f"{node.outputs[0]}/value", node.attrs["value"], graph.types[node.inputs[0]].dtype)
            draft.apply(node, "Pad", node.inputs[0], pads, value, out=node.outputs[0], mode="constant")
    return fold(draft.finish())


def _is_restated(graph: Graph, node: Node) -> bool:
    if (node.domain, node.op) == ("", "CastLike"):
        return graph.types[node.inputs[1]].dtype in CODES
    return (node.domain, node.op, len(node.inputs)) == ("", "Pad", 1) and node.attrs["mode"] == "constant"


def know_zeros(graph: Graph) -> Graph:
    """Computed tensors without elements, products with zeros and differences of a tensor and itself as known ones, and what
    follows from them folded: a sum over nothing is 0."""
    ports = {port.name for port in graph.outputs}
    sizes = {name: math.prod(kind.shape) for name, kind in graph.types.items()}
    made = {name: node for node in graph.nodes for name in node.outputs if name and name not in ports}
    zero = [name for name, node in made.items() if not sizes[name] or _is_zero(graph, node)]
    known = {name: np.zeros(graph.types[name].shape, graph.types[name].dtype) for name in zero}
    nodes = tuple(n for n in graph.nodes if not {name for name in n.outputs if name} <= set(known))
    if len(nodes) == len(graph.nodes):
        return graph
    kept = {name for node in nodes for name in node.outputs}  # beside others of its node, as those of a Split
    known = {name: value for name, value in known.items() if name not in kept}
    return fold(graph.replace(nodes=nodes, constants={**graph.constants, **known}))


def _is_zero(graph: Graph, node: Node) -> bool:
    if (node.domain, node.op) == ("", "Sub"):
        return node.inputs[0] == node.inputs[1]
    factors = [graph.constants[name] for name in node.inputs if name in graph.constants]
    return (node.domain, node.op) == ("", "Mul") and any(not np.any(factor) for factor in factors)


def untie_constants(graph: Graph) -> Graph:
    """Gives each LINEAR node its own copy of the known float tensors that it shares with another one."""
    draft = Draft(graph)
    taken: set[str] = set()
    for node in graph.nodes:
        changes: dict[str, str] = {}
        for name in dict.fromkeys(node.inputs) if lookup(node).kind is Kind.LINEAR else ():
            if name not in graph.constants or graph.constants[name].dtype.kind in "biuO":
                continue
            if name in taken:
                changes[name] = draft.constant(f"{name}@{node.name or node.outputs[0]}", graph.constants[name])
                if name in graph.pinned:
                    draft.pinned[changes[name]] = graph.pinned[name]
            taken.add(name)
        draft.write(_renamed(node, changes))
    return draft.finish()


def separate_sums(graph: Graph) -> Graph:
    """A Gemm whose third input is computed as a Gemm and a sum: what the sum adds needs no weights."""
    draft = Draft(graph)
    for node in graph.nodes:
        added = node.inputs[2] if node.op == "Gemm" and not node.domain and len(node.inputs) > 2 else ""
        if not added or added in graph.constants:
            draft.write(node)
            continue
        if node.attrs["beta"] != 1:
            factor = draft.constant(f"{added}/beta", node.attrs["beta"], graph.types[added].dtype)
            added = draft.apply(node, "Mul", added, factor)
        product = draft.apply(node, "Gemm", *node.inputs[:2], **node.attrs)
        draft.apply(node, "Add", product, added, out=node.outputs[0])
    return draft.finish()


DEFAULT_REWRITES: tuple[Rewrite, ...] = (
    state_forms,
    know_zeros,
    expand_estimators,
    separate_sums,
    normalise_quantizers,
    remove_identities,
    recognise_softmax,
    untie_constants,
    fold_batch_norms,
)


def _is_identity(node: Node, types: Mapping[str, TensorType]) -> bool:
    if node.domain or (node.op != "Dropout" and any(name in types for name in node.outputs[1:])):
        return False
    if node.op == "Cast":
        return types[node.inputs[0]].dtype == types[node.outputs[0]].dtype
    return node.op in ("Identity", "Dropout") or (node.op in _OF_ONE_INPUT and len(node.inputs) == 1)


def _renamed(node: Node, names: Mapping[str, str]) -> Node:
    inputs, outputs = (tuple(names.get(n, n) for n in part) for part in (node.inputs, node.outputs))
    return node if (inputs, outputs) == (node.inputs, node.outputs) else replace(node, inputs=inputs, outputs=outputs)
