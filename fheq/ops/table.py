"""The op table: one row per operator and opset range.

Everything else is derived from it: evaluation, import, lowering, `fheq.check`, the tests and the list in the README. A new
activation is one line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fheq.errors import UnsupportedError
from fheq.graph import Node, describe

Evaluate = Callable[..., Any]


class Kind(Enum):
    """What an operator does to scales, and so how it is lowered (DESIGN: kinds of op)."""

    CONSTANT = "constant"  # the result depends on shapes and known tensors alone
    MOVEMENT = "movement"  # each output element is a copy of an input element, or a known filler
    LINEAR = "linear"  # linear in its first input once the others are known
    ELEMENTWISE = "elementwise"  # elementwise with numpy broadcasting over all its inputs
    MAX = "max"  # maximum (or minimum) over windows or axes
    COMPOSITE = "composite"  # rewritten into the kinds above before quantization
    CLIENT = "client"  # belongs after decryption (ArgMax); rewritten into the kinds above where something linear follows


@dataclass(frozen=True)
class Op:
    """One row.

    Args:
        name: operator type.
        since: first opset of `domain` with these semantics (a later row of the same name takes over from its own `since`).
        kind: see `Kind`.
        evaluate: `evaluate(node, *inputs) -> array or tuple of arrays`, pure, in JAX, for any float dtype; an absent
            optional input is None; inputs listed in `static` are numpy arrays, others may be tracers.
        static: positions of the inputs that must be known before evaluation (shapes, axes, pads); (-1,) means all but the
            first.
        affine: positions in which the op is affine when every other input is known.
        domain: "" for ai.onnx.
    """

    name: str
    since: int
    kind: Kind
    evaluate: Evaluate
    static: tuple[int, ...] = ()
    affine: tuple[int, ...] = ()
    domain: str = ""

    def is_static(self, position: int) -> bool:
        """Whether the input at `position` must be known before evaluation."""
        return position in self.static or (-1 in self.static and position > 0)


_ROWS: dict[tuple[str, str], list[Op]] = {}


def register(*rows: Op) -> None:
    """Adds rows to the table; a row of the same domain, name and `since` replaces the older one."""
    for row in rows:
        versions = [r for r in _ROWS.get((row.domain, row.name), []) if r.since != row.since]
        _ROWS[row.domain, row.name] = sorted([*versions, row], key=lambda r: r.since)


def rows() -> tuple[Op, ...]:
    """Every row, by domain, name and opset."""
    return tuple(row for key in sorted(_ROWS) for row in _ROWS[key])


def find(node: Node) -> Op | None:
    """The row with the greatest `since` not above the node's opset, or None."""
    usable = [row for row in _ROWS.get((node.domain, node.op), []) if row.since <= node.version]
    return usable[-1] if usable else None


def lookup(node: Node) -> Op:
    """As `find`, but an operator without a row is an `UnsupportedError` that names the node."""
    row = find(node)
    if row is None:
        raise UnsupportedError(
            f"{describe(node)}: fheq has no row for {node.domain or 'ai.onnx'}.{node.op} at opset {node.version}; "
            "rewrite the node with supported operators (see the op table in the README) or register a row with "
            "fheq.ops.register"
        )
    return row
