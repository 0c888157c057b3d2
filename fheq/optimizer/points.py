"""Candidates of a search for TFHE parameters, as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fheq.optimizer.partition import Pair


@dataclass(frozen=True, eq=False)
class Points:
    """Candidates, one per element; an array of one element is the same for all of them.

    Args:
        glwe, small, level: for every partition, index of (k, log2 N) in `noise.glwe_table`, n, index of a level.
        conversion: for every conversion, index of its level.
    """

    glwe: tuple[np.ndarray, ...]
    small: tuple[np.ndarray, ...]
    level: tuple[np.ndarray, ...]
    conversion: Mapping[Pair, np.ndarray]

    def __len__(self) -> int:
        lengths = (len(a) for a in (*self.glwe, *self.small, *self.level, *self.conversion.values()))
        return next((n for n in lengths if n != 1), 1)

    def __getitem__(self, where: Any) -> Points:
        pick = lambda arrays: tuple(chosen(a, where) for a in arrays)
        conversion = {pair: chosen(v, where) for pair, v in self.conversion.items()}
        return Points(pick(self.glwe), pick(self.small), pick(self.level), conversion)


def chosen(values: np.ndarray, where: Any) -> np.ndarray:
    """Some candidates' values, of which there may be one for all."""
    return values if len(values) == 1 else values[where]
