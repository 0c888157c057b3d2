"""Missing values that a model imputes itself.

NaN cannot be encrypted. Where a model puts known values in the place of an input's NaN before anything else reads them, as
an Imputer does, the client puts them there instead (`Port.missing`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fheq.graph import Graph, Node, Port
from fheq.ops.table import Kind, lookup
from fheq.regions import movements
from fheq.rewriting.primitives import imputed


def state_missing(graph: Graph) -> Graph:
    """Inputs with the values that stand for their NaN."""
    if not any(_imputes(node) for node in graph.nodes):
        return graph
    ports = (replace(port, missing=_missing(graph, port)) for port in graph.inputs)
    return graph.replace(inputs=tuple(ports))


def _imputes(node: Node) -> bool:
    return node.op == "Imputer" and bool(np.isnan(imputed(node)[1]))


def _missing(graph: Graph, port: Port) -> tuple[float | None, ...] | None:
    """What stands for NaN in each element of an input; None where the model reads it as it is."""
    size = int(np.prod(port.type.shape))
    value, read = np.full(size, np.nan), np.zeros(size, bool)
    readers, outputs = graph.consumers(), {out.name for out in graph.outputs}
    stack = [(port.name, np.arange(size))]
    while stack:
        name, elements = stack.pop()
        held = elements >= 0
        at = elements[held]
        if name in outputs:
            read[at] = True
        for node in readers.get(name, []):
            if _imputes(node):
                here = np.broadcast_to(imputed(node)[0], graph.types[name].shape).ravel()[held]
                read[at] |= ~np.isnan(value[at]) & (value[at] != here)
                value[at] = here
            elif lookup(node).kind is Kind.MOVEMENT:
                for out, move in movements(graph, node).items():
                    mine = move.which == move.inputs.index(name)
                    stack.append((out, np.where(mine, elements[move.element * mine], -1)))
            else:
                read[at] = True
    known = [None if r or np.isnan(v) else float(v) for v, r in zip(value, read)]
    return None if all(v is None for v in known) else tuple(known)
