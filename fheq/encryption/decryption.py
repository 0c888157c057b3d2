"""What decryption makes of an output's ciphertext.

An output of b bits has one bit of padding above it, so it is decrypted modulo 2^(b+1). Of an approximately rounded output
only the bits that are left are decrypted: nothing reads its low bits, so they may drown in noise.
"""

from __future__ import annotations

from typing import Any

from fheq.optimizer.leveled import leveled
from fheq.program import IntProgram, Round


def removed_bits(program: IntProgram) -> list[int]:
    """The low bits that each output's decryption leaves out."""
    rounded = {i.out: i.lsbs for i in program.instructions if isinstance(i, Round) and i.approximate}
    return [rounded.get(entry.value, 0) for entry in program.outputs]


def decrypted_bits(program: IntProgram) -> list[int]:
    """The width of each output's ciphertext."""
    flat = leveled(program)
    return [flat.nodes[i].bits for i in flat.outputs]


def centred(q: Any, bits: Any) -> Any:
    """Integers modulo 2^(bits + 1), brought to where an output of `bits` bits that noise drove out of its range can be: as
    far below it as above."""
    below = 1 << bits >> 1
    return (q + below) % (2 << bits) - below
