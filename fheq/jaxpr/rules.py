"""The table of rules: nodes for each primitive of JAX (https://docs.jax.dev/en/latest/jax.lax.html)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fheq.jaxpr import elementwise, linear, movement, reductions
from fheq.jaxpr.equation import Equation

Rule = Callable[[Equation], str | Sequence[str]]

RULES: dict[str, Rule] = {**elementwise.RULES, **linear.RULES, **movement.RULES, **reductions.RULES}
