"""Modulo what a value is read: a table sees only the low bits of an accumulator."""

from __future__ import annotations

from fheq.program import Gather, IntProgram, Lookup, Round


def read_modulo(program: IntProgram) -> dict[str, int]:
    """For each value that only tables read, perhaps moved and rounded, the power of two modulo which they read it."""
    exact = {entry.value for entry in program.outputs}
    found: dict[str, int] = {}
    for i in reversed(program.instructions):
        modulus = found.get(i.out, 0)
        if isinstance(i, Lookup):
            modulus = 1 << (i.lsbs + i.bits)
        elif not isinstance(i, (Gather, Round)) or i.out in exact:
            exact.update(i.args)
        for arg in i.args:
            found[arg] = max(found.get(arg, 1), modulus)
    return {name: modulus for name, modulus in found.items() if name not in exact}
