"""What the client computes after decryption.

Models end in labels and probabilities. Whoever decrypts the scores can find the label of the greatest one, or their softmax,
which would cost many tables on encrypted data. `split` divides a graph in two: the server evaluates one part on encrypted
data, the client the other on what it decrypts, in floating point and at no cost.

The client's part begins with `ENDS` (ArgMax, Softmax and the like) that no product with weights follows, and has all that
follows them, and outputs that are known. It grows backwards over what only it reads, such as the sigmoids before an ArgMax,
up to the last products with weights, sums and maxima: those stay encrypted, and so does everything in a model that has no
such end. Sums that are joined for the output alone are joined by the client too: the server would have to quantize them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fheq.graph import Graph, Node, Port
from fheq.ops.table import Kind, lookup
from fheq.rewriting.affine_regions import Search
from fheq.rewriting.prune import prune
from fheq.stated.accumulators import states_accumulator

ENDS = ("ArgMax", "ArgMin", "Hardmax", "LogSoftmax", "Normalizer", "Softmax", "TopK")
PRODUCTS = ("BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul")
REACH = 16  # the client receives at most so many times the values that it computes


@lru_cache(maxsize=32)
def split(graph: Graph) -> tuple[Graph, Graph | None]:
    """The part of a graph that runs on encrypted data, and the client's part; None where there is nothing for the client.

    The client's graph reads outputs of the server's, in its order, and gives the outputs of the whole.
    """
    kept = _ancestors(graph, [node for node in graph.nodes if _has_weights(graph, node)])
    summed, joins = _after_sums(graph), _joins(graph)
    ends = [node for node in graph.nodes if node.outputs[0] not in kept and _is_end(node, summed)]
    known = sum(port.name in graph.constants for port in graph.outputs)
    if known == len(graph.outputs) or not (ends or joins or known):
        return graph, None
    mine = _descendants(graph, ends)
    if ends:
        mine |= _before(graph, mine, kept, summed, _limit(graph, ends))
    mine |= _descendants(graph, joins)
    theirs = tuple(node for node in graph.nodes if node.outputs[0] not in mine)
    own = tuple(node for node in graph.nodes if node.outputs[0] in mine)
    made = {name for node in own for name in node.outputs}
    wanted = [name for node in own for name in node.inputs] + [port.name for port in graph.outputs]
    cut = [name for name in dict.fromkeys(wanted) if name and name not in made and name not in graph.constants]
    server = prune(graph.replace(nodes=theirs, outputs=tuple(_port(graph, name) for name in cut)))
    return server, _of_client(graph, own, server)


def rejoined(graph: Graph, server: Graph) -> Graph:
    """A graph whose server's part was exchanged for another one with the same outputs."""
    client = split(graph)[1]
    if client is None:
        return server
    constants = {**server.constants, **{name: graph.constants[name] for name in client.constants}}
    types = {**graph.types, **server.types}
    return server.replace(nodes=(*server.nodes, *client.nodes), outputs=graph.outputs, constants=constants, types=types)


def _is_end(node: Node, summed: set[str]) -> bool:
    return lookup(node).kind is Kind.CLIENT or (node.op in ENDS and any(name in summed for name in node.inputs))


def _joins(graph: Graph) -> list[Node]:
    """Joins of what would take a table for it, with nothing but movement and affine functions of one tensor behind."""
    search = Search(graph)
    free = search.decrypted()
    moved = (node for node in graph.nodes if lookup(node).kind is Kind.MOVEMENT and node.outputs[0] not in graph.pinned)
    read = ((node, search.computed(node)) for node in moved if node.outputs[0] in free)
    return [node for node, names in read if len(names) > 1 and any(map(search.is_requantized, names))]


def _has_weights(graph: Graph, node: Node) -> bool:
    """Whether the node is a product with weights of the model; labels and votes are whole numbers."""
    known = [graph.constants[name] for name in node.inputs if name in graph.constants]
    return node.op in PRODUCTS and any(value.dtype.kind not in "biu" for value in known)


def _ancestors(graph: Graph, nodes: list[Node]) -> set[str]:
    """The nodes and all that they depend on, by first output."""
    makers, found = graph.producers(), set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node.outputs[0] not in found:
            found.add(node.outputs[0])
            stack += [makers[name] for name in node.inputs if name in makers]
    return found


def _descendants(graph: Graph, nodes: list[Node]) -> set[str]:
    """The nodes and all that depend on them, by first output."""
    found, seen = {node.outputs[0] for node in nodes}, {name for node in nodes for name in node.outputs}
    for node in graph.nodes:
        if any(name in seen for name in node.inputs):
            found.add(node.outputs[0])
            seen.update(node.outputs)
    return found


def _limit(graph: Graph, ends: list[Node]) -> int:
    size = lambda name: int(np.prod(graph.types[name].shape))
    return REACH * max(sum(size(port.name) for port in graph.outputs), *(size(node.inputs[0]) for node in ends))


def _after_sums(graph: Graph) -> set[str]:
    """Tensors that depend on a product with weights, a sum or a maximum."""
    summed: set[str] = set()
    for node in graph.nodes:
        sums = lookup(node).kind in (Kind.LINEAR, Kind.MAX) or node.op.startswith("Reduce")
        if sums or any(name in summed for name in node.inputs):
            summed.update(node.outputs)
    return summed


def _before(graph: Graph, mine: set[str], kept: set[str], summed: set[str], limit: int) -> set[str]:
    """Nodes that only the client's part reads, as far as they are beyond the last sums and maxima."""
    readers, outputs = graph.consumers(), {port.name for port in graph.outputs}
    found: set[str] = set()
    for node in reversed(graph.nodes):
        computed = [name for name in node.inputs if name and name not in graph.constants]
        used = [reader for name in node.outputs for reader in readers.get(name, [])]
        small = sum(int(np.prod(graph.types[name].shape)) for name in computed) <= limit
        inside = all(reader.outputs[0] in mine or reader.outputs[0] in found for reader in used)
        late = all(name in summed for name in computed) and not states_accumulator(node)
        if inside and small and late and node.outputs[0] not in kept and (used or node.outputs[0] in outputs):
            found.add(node.outputs[0])
    return found


def _port(graph: Graph, name: str) -> Port:
    """An output of the server: as the model states it, or with the samples joined along a first axis of 1."""
    stated = next((port for port in (*graph.outputs, *graph.inputs) if port.name == name), None)
    kind = graph.types[name]
    return stated or Port(name, kind, 0 if kind.shape[:1] == (1,) else None)


def _of_client(graph: Graph, nodes: tuple[Node, ...], server: Graph) -> Graph:
    """The client's graph."""
    read = {name for node in nodes for name in node.inputs} | {port.name for port in graph.outputs}
    known = {name: value for name, value in graph.constants.items() if name in read}
    return Graph(nodes, server.outputs, graph.outputs, known, graph.types)
