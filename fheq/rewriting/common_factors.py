"""Products of computed tensors with fewer of them, and with known factors last.

A sum of two products by one tensor, as x r - m r is in some normalizations, is one product; so is the blend of two tensors
by a gate, z a + (1 - z) b. And an inverse that is first multiplied by the gain of each channel would take a table for each
of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

from fheq.graph import Graph, Node, is_float
from fheq.rewriting.contractions import contract
from fheq.rewriting.edit import Draft
from fheq.rewriting.variances import centre_variance


def rearrange(graph: Graph) -> Graph:
    """The graph, in simple operators, with its products and variances in the forms that suit integers."""
    draft = Draft(graph)
    changed = False
    for node in graph.nodes:
        if _rearranged(draft, node):
            changed = True
        else:
            draft.write(node)
    return rearrange(draft.finish()) if changed else graph  # one form may be part of another


def _rearranged(draft: Draft, node: Node) -> bool:
    if node.domain or not is_float(draft.types[node.outputs[0]].dtype):
        return False
    if node.op in ("ReduceMean", "ReduceSum"):
        return contract(draft, node)
    if node.op not in ("Add", "Mul", "Sub"):
        return False
    if node.op == "Mul":
        return _known_factor_last(draft, node)
    return (node.op == "Sub" and centre_variance(draft, node)) or _factored(draft, node)


def _known_factor_last(draft: Draft, node: Node) -> bool:
    """a (r c) as (a r) c, for a known c of more elements than r."""
    for a, b in (node.inputs, node.inputs[::-1]):
        maker = draft.graph.producers().get(b)
        if maker is None or maker.domain or maker.op != "Mul" or a in draft.constants or b in draft.pinned:
            continue
        known = [name for name in maker.inputs if name in draft.constants]
        if len(known) == 1:
            (rest,) = (name for name in maker.inputs if name not in known)
            if prod(draft.types[rest].shape) < prod(draft.types[b].shape):
                draft.apply(node, "Mul", draft.apply(node, "Mul", a, rest), known[0], out=node.outputs[0])
                return True
    return False


class _Term(NamedTuple):
    """A part of a sum, with its sign; the two factors of a product of computed tensors."""

    sign: int
    name: str
    factors: tuple[str, ...] = ()


def _factored(draft: Draft, node: Node) -> bool:
    """a r + b r + c as (a + b) r + c, for a known c, or without; a r + b (k - r) as (a - b) r + k b, for a known k."""
    terms = list(_terms(draft, node.outputs[0], 1))
    products = [term for term in terms if term.factors]
    rest = [(term.sign, term.name) for term in terms if term.name in draft.constants]
    if len(products) != 2 or len(rest) + 2 != len(terms):
        return False
    found = _common(draft, node, *products) or _common(draft, node, *products[::-1])
    if found is None:
        return False
    (sign, a), (other, b) = sorted(found.parts, key=lambda part: -part[0])
    rest, out = [*found.rest, *rest], node.outputs[0]
    value = draft.apply(node, "Add" if sign == other else "Sub", a, b)
    value = draft.apply(node, "Mul", value, found.factor, out="" if rest else out)
    if rest:
        draft.add_up(node, value, rest, out)
    return True


class _Common(NamedTuple):
    """Two products as one by a factor that they have in common.

    Args:
        parts: what it multiplies, with signs, of which one is positive.
        rest: what is added to that, with signs.
    """

    factor: str
    parts: tuple[tuple[int, str], tuple[int, str]]
    rest: tuple[tuple[int, str], ...] = ()


def _common(draft: Draft, node: Node, one: _Term, two: _Term) -> _Common | None:
    if len(set(one.factors)) < 2 or len(set(two.factors)) < 2:  # a square is one table already
        return None
    for (factor, a), (other, b) in product((one.factors, one.factors[::-1]), (two.factors, two.factors[::-1])):
        if factor == other and a != b and max(one.sign, two.sign) > 0:
            return _Common(factor, ((one.sign, a), (two.sign, b)))
        known = _less(draft, other, factor)
        if known is not None and max(one.sign, -two.sign) > 0:
            whole = np.all(draft.constants[known] == 1)
            rest = two.sign, b if whole else draft.apply(node, "Mul", b, known)
            return _Common(factor, ((one.sign, a), (-two.sign, b)), (rest,))
    return None


def _less(draft: Draft, name: str, factor: str) -> str | None:
    """The k of a tensor that is k - factor, for a known k."""
    node = draft.graph.producers().get(name)
    if node is None or node.domain or node.op != "Sub" or node.inputs[1] != factor or name in draft.pinned:
        return None
    return node.inputs[0] if node.inputs[0] in draft.constants else None


def _terms(draft: Draft, name: str, sign: int, first: bool = True) -> Iterator[_Term]:
    """What is added up to a tensor, through sums that nothing else reads."""
    node = draft.graph.producers().get(name)
    alone = first or (len(draft.graph.consumers().get(name, ())) == 1 and not _is_kept(draft, name))
    if node is None or node.domain or not alone:
        yield _Term(sign, name)
    elif node.op in ("Add", "Sub"):
        yield from _terms(draft, node.inputs[0], sign, False)
        yield from _terms(draft, node.inputs[1], sign if node.op == "Add" else -sign, False)
    elif node.op == "Neg":
        yield from _terms(draft, node.inputs[0], -sign, False)
    elif node.op == "Mul" and draft.depends(*node.inputs):
        signs, factors = zip(*(_unsigned(draft, factor) for factor in node.inputs))
        yield _Term(sign * prod(signs), name, factors)
    else:
        yield _Term(sign, name)


def _unsigned(draft: Draft, name: str) -> tuple[int, str]:
    """A tensor, or what it is the negative of, and the sign."""
    node = draft.graph.producers().get(name)
    negative = node is not None and node.op == "Neg" and not node.domain and name not in draft.pinned
    return (-1, node.inputs[0]) if node is not None and negative else (1, name)


def _is_kept(draft: Draft, name: str) -> bool:
    return name in draft.pinned or any(port.name == name for port in draft.graph.outputs)
