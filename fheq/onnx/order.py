"""The nodes of a graph in topological order, without those that no output depends on."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import onnx

from fheq.errors import ModelError
from fheq.graph import Node, describe
from fheq.onnx.loading import normal_domain
from fheq.onnx.subgraphs import WITH_SUBGRAPHS, outer_reads


def in_order(
    protos: Iterable[onnx.NodeProto], known: set[str], outputs: Iterable[str], versions: Mapping[str, int]
) -> list[tuple[Node, onnx.NodeProto]]:
    """The nodes that an output depends on, in topological order; without their attributes, which are in what they come with.

    Args:
        known: names of inputs and known tensors.
        versions: domain to opset.

    Raises:
        ModelError: a tensor or an output made by nobody, a tensor made twice, a node without an operator, or a cycle.
    """
    return _live(_sort(protos, known, versions), outputs, known)


def _sort(
    protos: Iterable[onnx.NodeProto], known: set[str], versions: Mapping[str, int]
) -> list[tuple[Node, onnx.NodeProto]]:
    """The nodes in topological order, otherwise in the given one."""
    pairs = [(_skeleton(proto, versions), proto) for proto in protos]
    maker: dict[str, int] = {}
    for index, (node, _) in enumerate(pairs):
        for name in filter(None, node.outputs):
            if name in maker or name in known:
                other = describe(pairs[maker[name]][0]) if name in maker else "an input or initializer"
                raise ModelError(
                    f"{describe(node)} makes the tensor {name!r}, which {other} makes too; names must be unique"
                )
            maker[name] = index
    readers: list[list[int]] = [[] for _ in pairs]
    waiting = [0] * len(pairs)
    for index, (node, proto) in enumerate(pairs):
        for name in {n for n in _reads(node, proto) if n and n not in known}:
            if name not in maker:
                raise ModelError(f"{describe(node)} reads the tensor {name!r}, which no node, input or initializer gives")
            readers[maker[name]].append(index)
            waiting[index] += 1
    ready = [index for index, count in enumerate(waiting) if count == 0]
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(pairs[index])
        for reader in readers[index]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, reader)
    if len(order) < len(pairs):
        stuck = next(node for (node, _), count in zip(pairs, waiting) if count)
        raise ModelError(f"{describe(stuck)} depends on itself: the graph has a cycle")
    return order


def _live(
    pairs: Sequence[tuple[Node, onnx.NodeProto]], outputs: Iterable[str], known: set[str]
) -> list[tuple[Node, onnx.NodeProto]]:
    """The nodes that an output depends on; control flow without the outputs that nobody reads."""
    wanted = set(outputs)
    missing = wanted - known - {name for node, _ in pairs for name in node.outputs}
    if missing or "" in wanted:
        raise ModelError(f"output {min(missing or {''})!r} is given by no node, input or initializer")
    kept = []
    for node, proto in reversed(pairs):
        if any(name in wanted for name in node.outputs if name):
            if node.op in (*WITH_SUBGRAPHS, "MaxPool"):  # without its indices
                node = replace(node, outputs=tuple(name if name in wanted else "" for name in node.outputs))
            wanted.update(_reads(node, proto))
            kept.append((node, proto))
    return kept[::-1]


def _reads(node: Node, proto: onnx.NodeProto) -> set[str]:
    """The tensors that a node reads, also inside its subgraphs."""
    return {*node.inputs, *outer_reads(proto.attribute)}


def _skeleton(proto: onnx.NodeProto, versions: Mapping[str, int]) -> Node:
    """The node without its attributes."""
    domain = normal_domain(proto.domain)
    node = Node(proto.name, proto.op_type, trimmed(tuple(proto.input)), tuple(proto.output), {}, domain)
    if not proto.op_type:
        raise ModelError(f"{describe(node)} has no operator type")
    if domain == "" and "" not in versions:
        raise ModelError(f"{describe(node)}: its function does not say which opset of ai.onnx it uses")
    return replace(node, version=versions.get(domain, 1))


def trimmed(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names without absent inputs at the end."""
    while names and not names[-1]:
        names = names[:-1]
    return names
