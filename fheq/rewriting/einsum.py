"""Einsum as products of two tensors at a time (a rule of `fheq.rewriting.decompose`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fheq.graph import Node
from fheq.ops.linear import einsum_terms
from fheq.rewriting.edit import Draft

INT64 = np.dtype(np.int64)


@dataclass(frozen=True)
class Term:
    """A tensor and the labels of its axes, each once."""

    name: str
    labels: str


@dataclass(frozen=True)
class _Writer:
    """Writes the parts of one Einsum node."""

    draft: Draft
    node: Node
    size: dict[str, int]

    def apply(self, op: str, *inputs: str, **attrs: Any) -> str:
        return self.draft.apply(self.node, op, *inputs, **attrs)

    def known(self, values: object) -> str:
        return self.draft.constant(f"{self.node.outputs[0]}/known", np.asarray(values), INT64)

    def reshape(self, name: str, shape: tuple[int, ...]) -> str:
        same = self.draft.types[name].shape == shape
        return name if same else self.apply("Reshape", name, self.known(shape), allowzero=1)

    def ordered(self, term: Term, labels: str) -> str:
        """The tensor with its axes in another order."""
        if labels == term.labels:
            return term.name
        return self.apply("Transpose", term.name, perm=tuple(term.labels.index(label) for label in labels))

    def lengths(self, labels: str) -> tuple[int, ...]:
        return tuple(self.size[label] for label in labels)

    def term(self, name: str, labels: str) -> Term:
        """An input: of a label that comes twice, the diagonal; axes of size 1 that broadcast are dropped."""
        for label in sorted(set(labels)):
            while labels.count(label) > 1:
                first, second = (i for i, found in enumerate(labels) if found == label and labels[:i].count(label) < 2)
                rest = [i for i in range(len(labels)) if i not in (first, second)]
                moved = self.apply("Transpose", name, perm=(*rest, first, second))
                shape = self.draft.types[moved].shape
                flat = self.reshape(moved, (*shape[:-2], shape[-1] ** 2))
                name = self.apply("Gather", flat, self.known(np.arange(shape[-1]) * (shape[-1] + 1)), axis=-1)
                labels = "".join(labels[i] for i in rest) + label
        shape = self.draft.types[name].shape
        kept = [i for i, label in enumerate(labels) if shape[i] == self.size[label]]
        return Term(self.reshape(name, tuple(shape[i] for i in kept)), "".join(labels[i] for i in kept))

    def summed(self, term: Term, wanted: set[str]) -> Term:
        """The term without the labels that nobody else has."""
        gone = [i for i, label in enumerate(term.labels) if label not in wanted]
        if not gone:
            return term
        name = self.apply("ReduceSum", term.name, self.known(gone), keepdims=0, noop_with_empty_axes=0)
        return Term(name, "".join(label for label in term.labels if label in wanted))

    def product(self, a: Term, b: Term, wanted: set[str]) -> Term:
        """Two terms multiplied, and summed over their common labels that nobody else has."""
        a, b = self.summed(a, wanted | set(b.labels)), self.summed(b, wanted | set(a.labels))
        both = [label for label in a.labels if label in b.labels]
        batch = "".join(label for label in both if label in wanted)
        inner = "".join(label for label in both if label not in wanted)
        left = "".join(label for label in a.labels if label not in both)
        right = "".join(label for label in b.labels if label not in both)
        rows, steps, columns = (int(np.prod(self.lengths(labels))) for labels in (left, inner, right))
        stack = self.lengths(batch)
        x = self.reshape(self.ordered(a, batch + left + inner), (*stack, rows, steps))
        y = self.reshape(self.ordered(b, batch + inner + right), (*stack, steps, columns))
        name = self.apply("MatMul" if inner else "Mul", x, y)
        labels = batch + left + right
        return Term(self.reshape(name, self.lengths(labels)), labels)


def expand_einsum(draft: Draft, node: Node) -> bool:
    """Terms are multiplied from the left; known ones first, since they cost nothing."""
    spelled, result = einsum_terms(node, [len(draft.types[name].shape) for name in node.inputs])
    if len(set(result)) < len(result):
        return False
    size: dict[str, int] = {}
    for name, labels in zip(node.inputs, spelled):
        for label, length in zip(labels, draft.types[name].shape):
            size[label] = max(size.get(label, 1), length) if length != 0 else 0
    write = _Writer(draft, node, size)
    terms = [write.term(name, labels) for name, labels in zip(node.inputs, spelled)]
    terms.sort(key=lambda term: term.name not in draft.constants)
    while len(terms) > 1:
        a, b, *rest = terms
        if a.name in draft.constants:  # x @ w rather than w @ x
            a, b = b, a
        wanted = set(result).union(*(term.labels for term in rest))
        terms = [write.product(a, b, wanted), *rest]
    total = write.summed(terms[0], set(result))
    value = write.ordered(total, "".join(label for label in result if label in total.labels))
    shape = draft.types[node.outputs[0]].shape
    if draft.types[value].shape != shape:
        wide = tuple(size[label] if label in total.labels else 1 for label in result)
        value = write.apply("Expand", write.reshape(value, wide), write.known(shape))
    draft.apply(node, "Identity", value, out=node.outputs[0])
    return True


RULES = {"Einsum": expand_einsum}
