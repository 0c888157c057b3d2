"""RNN, GRU and LSTM with known weights as simple nodes (rules of `fheq.rewriting.decompose`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from fheq.errors import UnsupportedError, describe
from fheq.graph import Node
from fheq.ops.recurrent import GATES, Values, sizes_of, unroll
from fheq.rewriting.edit import Draft


class Nodes:
    """The algebra of a draft: values are names of tensors."""

    def __init__(self, draft: Draft, origin: Node) -> None:
        self.draft = draft
        self.origin = origin

    def known(self, array: Any) -> str:
        """A new known tensor: each use of a weight has its own, and so its own quantizer."""
        return self.draft.constant(f"{_first(self.origin)}/known", array)

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
    )
    return True


def _first(node: Node) -> str:
    return next(name for name in node.outputs if name)


RULES = dict.fromkeys(GATES, _recurrent)
