"""The walk over a jaxpr: each equation becomes nodes, or is computed where its inputs are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.extend import core, source_info_util

from fheq.errors import FheqError, UnsupportedError
from fheq.graph import Node
from fheq.jaxpr.equation import Equation
from fheq.jaxpr.rules import RULES
from fheq.rewriting.edit import Draft

_INLINED = ("jaxpr", "call_jaxpr", "fun_jaxpr")
MAX_STEPS = 1000


@dataclass(frozen=True)
class Known:
    """A value that depends on no input: an array of JAX or numpy, or a random key."""

    array: Any


Value = str | Known  # a computed tensor's name, or a known value


class Walker:
    """Writes the equations of jaxprs to a draft."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft

    def name(self, value: Value) -> str:
        """The tensor that holds a value."""
        return value if isinstance(value, str) else self.draft.constant("constant", np.asarray(value.array))

    def closed(self, closed: Any, inputs: Sequence[Value]) -> list[Value]:
        """The outputs of a closed jaxpr."""
        return self.open(closed.jaxpr, [*map(Known, closed.consts), *inputs])

    def open(self, jaxpr: Any, inputs: Sequence[Value]) -> list[Value]:
        """The outputs of a jaxpr whose constants are the first inputs."""
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True))

        def read(atom: Any) -> Value:
            return (
                Known(np.asarray(atom.val, getattr(atom.aval, "dtype", None)))
                if isinstance(atom, core.Literal)
                else env[atom]
            )

        for eqn in jaxpr.eqns:
            values = [read(atom) for atom in eqn.invars]
            env.update(zip(eqn.outvars, self.equation(eqn, values), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, values: Sequence[Value]) -> list[Value]:
        """The outputs of an equation.

        Raises:
            UnsupportedError: naming the primitive and the line that uses it.
        """
        name = eqn.primitive.name
        try:
            known = [v.array for v in values if isinstance(v, Known)]
            if len(known) == len(values):
                return self.folded(eqn, known)
            if name == "scan":
                return self.scan(eqn, values)
            if name == "cond" and isinstance(values[0], Known):
                branches = eqn.params["branches"]
                chosen = int(np.clip(values[0].array, 0, len(branches) - 1))
                return self.closed(branches[chosen], values[1:])
            inner = next((eqn.params[key] for key in _INLINED if key in eqn.params), None)
            if inner is not None:
                return self.closed(inner, values) if isinstance(inner, core.ClosedJaxpr) else self.open(inner, values)
            if name not in RULES:
                raise UnsupportedError("it has no form on encrypted data here; write it with other functions")
            made = RULES[name](self.reader(eqn, [self.name(v) for v in values]))
        except _Located:
            raise
        except FheqError as error:
            place = source_info_util.summarize(eqn.source_info)
            raise _Located(f"JAX primitive {name!r} at {place}: {error}") from error
        names = [made] if isinstance(made, str) else list(made)
        for out, variable in zip(names, eqn.outvars, strict=True):
            assert self.draft.types[out].shape == variable.aval.shape, (name, self.draft.types[out], variable.aval)
        return list(names)

    def reader(self, eqn: Any, names: Sequence[str]) -> Equation:
        """An equation as its rule takes it."""
        label = self.draft.fresh(eqn.primitive.name)
        origin = Node(label, eqn.primitive.name, (), (label,), MappingProxyType({}))
        return Equation(self.draft, origin, tuple(names), dict(eqn.params), tuple(v.aval for v in eqn.outvars))

    def folded(self, eqn: Any, arrays: Sequence[Any]) -> list[Value]:
        """The outputs of an equation of known inputs, as JAX computes them."""
        subfuns, params = eqn.primitive.get_bind_params(eqn.params)
        with jax.ensure_compile_time_eval():
            made = eqn.primitive.bind(*subfuns, *arrays, **params)
        return [Known(value) for value in (made if eqn.primitive.multiple_results else [made])]

    def scan(self, eqn: Any, values: Sequence[Value]) -> list[Value]:
        """A loop of known length, unrolled."""
        p = eqn.params
        length, count, state = p["length"], p["num_consts"], p["num_carry"]
        if length > MAX_STEPS:
            raise UnsupportedError(f"{length} steps; at most {MAX_STEPS} are unrolled")
        fixed, carried, series = values[:count], list(values[count : count + state]), values[count + state :]
        equation = self.reader(eqn, [])

        def row(xs: Value, step: int) -> Value:
            if isinstance(xs, Known):
                return Known(xs.array[step])
            return equation.apply("Gather", xs, equation.integers([step], ()), axis=0)

        rows: list[list[Value]] = []
        for step in range(length)[::-1] if p["reverse"] else range(length):
            made = self.closed(p["jaxpr"], [*fixed, *carried, *(row(xs, step) for xs in series)])
            carried = made[:state]
            rows.append(made[state:])
        stacked: list[Value] = []
        first = equation.integers([0])
        for i, aval in enumerate(equation.avals[state:]):
            parts = [self.name(row[i]) for row in (rows[::-1] if p["reverse"] else rows)]
            wide = [equation.apply("Unsqueeze", part, first) for part in parts]
            empty = Known(np.zeros(aval.shape, aval.dtype))
            stacked.append(equation.apply("Concat", *wide, axis=0) if wide else empty)
        return [*carried, *stacked]


class _Located(UnsupportedError):
    """An error that names its primitive."""
