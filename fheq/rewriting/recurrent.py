"""RNN, GRU and LSTM with known weights as simple nodes (rules of `fheq.rewriting.decompose`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fheq.affine import LEAVES, varying
from fheq.errors import UnsupportedError
from fheq.graph import Node, describe
from fheq.ops.recurrent import Values, sizes_of, unroll
from fheq.ops.recurrent_cells import GATES, Stated
from fheq.rewriting.edit import Draft


class Nodes:
    """The algebra of a draft: values are names of tensors."""

    def __init__(self, draft: Draft, origin: Node) -> None:
        self.draft = draft
        self.origin = origin

    def known(self, array: Any) -> str:
        """A new known tensor: each use of a weight has its own, and so its own quantizer."""
        return self.draft.constant(f"{_first(self.origin)}/known", array)

    def weight(self, array: Any, leaves: Mapping[str, Any] | None) -> str:
        """A new known matrix, on the grid that the model states for it."""
        name = self.known(array)
        if leaves is not None:
            self.draft.pinned[name] = varying(leaves)
        return name

    def apply(self, op: str, *inputs: str, out: str = "", **attrs: Any) -> str:
        """A new node, or the value where all inputs are known."""
        if all(name in self.draft.constants for name in inputs):
            return self.known(Values().apply(op, *(self.draft.constants[name] for name in inputs), **attrs))
        return self.draft.apply(self.origin, op, *inputs, out=out, **attrs)


def _recurrent(draft: Draft, node: Node) -> bool:
    """One Gemm, some tables and a few products per time step.

    Raises:
        UnsupportedError: weights that depend on data.
    """
    x, w, r, b, lengths, h, c, p = (*node.inputs, *[""] * 8)[:8]
    known = draft.constants
    computed = [name for name in (w, r, b, p, lengths) if name and name not in known]
    if computed:
        raise UnsupportedError(f"{describe(node)}: its weights {computed} depend on data; fheq takes known weights here")

    def state(name: str) -> str | None:
        """A state; None for zero."""
        return None if not name or (name in known and not np.any(known[name])) else name

    parameters = (known[w], known[r], known[b] if b else None, known[p] if p else None)
    size = sizes_of(node, draft.types[x].shape)
    unroll(
        Nodes(draft, node),
        node,
        x,
        size,
        parameters,
        known[lengths] if lengths else None,
        (state(h), state(c)),
        (*node.outputs, "", "", "")[:3],
        _stated(draft, w, r),
    )
    return True


def _stated(draft: Draft, *names: str) -> Stated:
    """By leaf, that of the quantizers of W and R, in their shapes; None for one that has none."""
    pins = [draft.pinned.get(name) for name in names]
    shapes = [draft.constants[name].shape for name in names]
    if all(pin is None for pin in pins):
        return {}
    spread = lambda pin, shape, leaf: np.broadcast_to(getattr(pin.expanded(len(shape)), leaf), shape)
    return {
        leaf: tuple(None if pin is None else spread(pin, shape, leaf) for pin, shape in zip(pins, shapes))  # type: ignore[misc]
        for leaf in LEAVES
    }


def _first(node: Node) -> str:
    return next(name for name in node.outputs if name)


RULES = dict.fromkeys(GATES, _recurrent)
