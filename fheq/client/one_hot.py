"""Inputs that are compared with known numbers for equality: the client encrypts the answers, not the number.

Categories and the indices of an embedding are one-hot rows before anything else is made of them. On encrypted numbers each
place of such a row takes a table; the client, which has the number, encrypts the places as they are. The tables of the
comparisons become codes of the client.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fheq.affine import Affine
from fheq.batching import split
from fheq.graph import Graph, Node, Port
from fheq.ops.table import Kind, lookup


@dataclass(frozen=True, eq=False)
class Code:
    """What a client encrypts of an input: `table[group, q.ravel()[elements]]` of the integers q of each sample.

    Args:
        port: the model's input.
        affine: its quantizer.
        elements: flat index into q, in the shape that is encrypted.
        group: row of the table for each of these, in the same shape.
        table: (G, 2^bits), 0 and 1.
    """

    port: Port
    affine: Affine
    elements: np.ndarray
    group: np.ndarray
    table: np.ndarray

    def encode(self, real: np.ndarray) -> np.ndarray:
        """The integers that are encrypted, `(samples, *elements.shape)`; without samples for an input that is given once."""
        q = split(self.port, self.affine.quantize(real))
        found = self.table[self.group, q.reshape(len(q), -1)[:, self.elements]].astype(np.int64)
        return found[0] if self.port.batch_axis is None and np.shape(real) == self.port.type.shape else found


def is_one_hot(graph: Graph, makers: Mapping[str, Node], name: str) -> bool:
    """Whether every element of a tensor that is computed is the answer to such a comparison, moved or joined with others."""
    node = makers.get(name)
    if node is None or equality(graph, makers, name) is not None:
        return node is not None
    computed = [n for n in node.inputs if n and n not in graph.constants]
    moves = lookup(node).kind is Kind.MOVEMENT and node.inputs[0] in computed
    return moves and all(is_one_hot(graph, makers, n) for n in computed)


def equality(graph: Graph, makers: Mapping[str, Node], name: str) -> Node | None:
    """The comparison of a computed tensor with known numbers for equality that a tensor is the answer to, or None."""
    node = makers.get(name)
    while node is not None and node.op == "Cast" and not node.domain:
        node = makers.get(node.inputs[0])
    if node is None or node.op != "Equal" or node.domain or sum(n in graph.constants for n in node.inputs) != 1:
        return None
    return node
