"""Sums of products as matrix products.

A product of two encrypted tensors is an accumulator; to be summed it would be quantized, with a table for each element. As
one matrix product the sum is taken before any table. So it is with known factors of an input, which weights take in.
"""

from __future__ import annotations

from math import prod
from string import ascii_letters
from types import MappingProxyType

from fheq.graph import Node
from fheq.origins import is_function_of_one
from fheq.rewriting.affine_regions import Search
from fheq.rewriting.edit import VERSION, Draft
from fheq.rewriting.einsum import expand_einsum
from fheq.rewriting.evaluation import output_types
from fheq.rewriting.primitives import known_axes


def contract(draft: Draft, node: Node) -> bool:
    """A ReduceSum or ReduceMean of a product that nothing else reads, as an Einsum."""
    product, axes = draft.graph.producers().get(node.inputs[0]), known_axes(draft, node)
    if product is None or product.op != "Mul" or product.domain or not axes or node.inputs[0] in draft.pinned:
        return False
    alone = len(draft.graph.consumers()[node.inputs[0]]) == 1 and all(p.name != node.inputs[0] for p in draft.graph.outputs)
    count = prod(draft.types[node.inputs[0]].shape[axis] for axis in axes)
    if not alone or count < 2 or not _is_contraction(draft, product):
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


def _is_contraction(draft: Draft, product: Node) -> bool:
    """Whether factors are functions of different elements, or one is known and the other an input of the model."""
    a, b = product.inputs
    if draft.depends(a, b):
        return not is_function_of_one(draft.graph, (a, b), product.outputs[0])
    computed, known = (a, b) if b in draft.constants else (b, a)
    return draft.constants[known].size > 1 and computed not in draft.constants and Search(draft.graph).is_input(computed)
