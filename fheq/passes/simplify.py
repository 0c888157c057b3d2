"""The passes in order."""

from __future__ import annotations

from fheq.passes.dead_elements import without_dead_elements
from fheq.passes.liveness import live_elements
from fheq.passes.numbering import first_equals
from fheq.passes.ranges import element_ranges
from fheq.program import IntProgram


def simplify(program: IntProgram) -> IntProgram:
    """The program with fewer table applications: for every input in range its outputs are the same integers.

    One whose tables are all needed stays as it is.
    """
    ranges = element_ranges(program)
    known = {name: low == high for name, (low, high) in ranges.items()}
    integers = {name: low for name, (low, _) in ranges.items()}
    first = first_equals(program, known, integers)
    live = live_elements(program, known, first)
    if all(live[lookup.out].all() for lookup in program.lookups):
        return program
    return without_dead_elements(program, live, known, integers, first)
