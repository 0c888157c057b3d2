"""The end of a model that a client computes after decryption: the class instead of the scores, and what is made of it.

An ArgMax of encrypted scores takes some three tables per class, and one of decrypted scores none. So a node such as ArgMax
and all that follows it run in the clear wherever nothing linear follows; elsewhere they have an encrypted form.
"""

from __future__ import annotations

from types import MappingProxyType

from fheq.graph import Graph, Node, Port
from fheq.ops.table import Kind, lookup
from fheq.regions import is_boolean
from fheq.rewriting.fold import prune

_SIMPLE = (Kind.CLIENT, Kind.CONSTANT, Kind.ELEMENTWISE, Kind.MOVEMENT)


def split_tail(graph: Graph) -> tuple[Graph, Graph | None]:
    """The graph to run encrypted, and the one that makes the model's outputs from its outputs; None where there is none."""
    nodes = _tail(graph)
    if not nodes:
        return graph, None
    made = {name for node in nodes for name in node.outputs if name}
    read = {name for node in nodes for name in node.inputs if name}
    needed = dict.fromkeys(name for node in nodes for name in node.inputs if name in read - made - set(graph.constants))
    kept = {port.name: port for port in graph.outputs if port.name not in made}
    ends = [kept.get(name) or _port(graph, name) for name in needed]
    others = [port for name, port in kept.items() if name not in needed]
    inside = {id(node) for node in nodes}
    head = graph.replace(nodes=tuple(n for n in graph.nodes if id(n) not in inside), outputs=(*ends, *others))
    tail = Graph(nodes, (*ends, *others), graph.outputs, graph.constants, graph.types, MappingProxyType({}))
    return prune(head), prune(tail)


def _tail(graph: Graph) -> tuple[Node, ...]:
    """The nodes of kind CLIENT that nothing linear follows, and all their followers."""
    readers = graph.consumers()
    followers = lambda node: [r for name in node.outputs for r in readers.get(name, ())]
    simple: set[int] = set()
    for node in reversed(graph.nodes):
        if _is_simple(graph, node) and all(id(reader) in simple for reader in followers(node)):
            simple.add(id(node))
    chosen: set[int] = set()
    for node in graph.nodes:
        if id(node) in chosen or (lookup(node).kind is Kind.CLIENT and id(node) in simple):
            chosen.update([id(node), *(id(reader) for reader in followers(node))])
    return tuple(node for node in graph.nodes if id(node) in chosen)


def _is_simple(graph: Graph, node: Node) -> bool:
    """Whether it is for a client: it has no weights. A selection by one-hot rows, as import makes of Gather, counts too."""
    selects = node.op == "MatMul" and is_boolean(graph, node.inputs[0])
    return lookup(node).kind in _SIMPLE or selects


def _port(graph: Graph, name: str) -> Port:
    kind = graph.types[name]
    return Port(name, kind, 0 if kind.shape[:1] == (1,) else None)
