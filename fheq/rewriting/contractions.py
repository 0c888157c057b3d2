"""Sums of products as matrix products.

A product of two encrypted tensors is an accumulator; to be summed it would be quantized, with a table for each element. As
one matrix product the sum is taken before any table. So it is with known factors of an input, which weights take in.
"""

from __future__ import annotations

from math import prod
from string import ascii_letters
from types import MappingProxyType

from fheq.graph import Node
from fheq.ops.table import Kind, lookup
from fheq.regions import elementwise_source
from fheq.rewriting.edit import VERSION, Draft
from fheq.rewriting.einsum import expand_einsum
from fheq.rewriting.evaluation import output_types
from fheq.rewriting.primitives import axes_of


def contract(draft: Draft, node: Node) -> bool:
    """A ReduceSum or ReduceMean of a product that nothing else reads, as an Einsum."""
    product, axes = draft.graph.producers().get(node.inputs[0]), axes_of(draft, node)
    if product is None or product.op != "Mul" or product.domain or not axes or node.inputs[0] in draft.pinned:
        return False
    alone = len(draft.graph.consumers()[node.inputs[0]]) == 1 and all(p.name != node.inputs[0] for p in draft.graph.outputs)
    count = prod(draft.types[node.inputs[0]].shape[axis] for axis in axes)
    if not alone or count < 2 or not _is_contraction(draft, *product.inputs):
        return False
    rank, out = len(draft.types[node.inputs[0]].shape), node.outputs[0]
    labels = ascii_letters[:rank]
    terms = ",".join(labels[rank - len(draft.types[name].shape) :] for name in product.inputs)
    kept = "".join(label for axis, label in enumerate(labels) if axis not in axes)
    name = draft.fresh(f"{out}/Einsum")
    attrs = MappingProxyType({"equation": f"{terms}->{kept}"})
    whole = Node(node.name, "Einsum", product.inputs, (name,), attrs, "", VERSION)
    draft.types.update(output_types(whole, draft.constants, draft.types))
    expand_einsum(draft, whole)
    if node.op == "ReduceMean":
        name = draft.apply(node, "Mul", name, draft.constant(f"{out}/share", 1 / count, draft.types[out].dtype))
    draft.apply(node, "Identity", draft.reshape(node, name, draft.types[out].shape), out=out)
    return True


def _is_contraction(draft: Draft, a: str, b: str) -> bool:
    """Whether factors are functions of different tensors, or one is known and the other an input of the model."""
    if draft.depends(a, b):
        return elementwise_source(draft.graph, a) != elementwise_source(draft.graph, b)
    computed, known = (a, b) if b in draft.constants else (b, a)
    producers = draft.graph.producers()
    while (node := producers.get(computed)) is not None and lookup(node).kind is Kind.MOVEMENT:
        moved = [name for name in node.inputs if name and name not in draft.constants]
        if len(moved) != 1:
            return False
        computed = moved[0]
    return node is None and draft.constants[known].size > 1 and computed not in draft.constants
