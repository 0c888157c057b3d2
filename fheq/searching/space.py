"""What a search tries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from fheq.arguments import check_whole, is_number, is_whole
from fheq.errors import QuantizationError
from fheq.reconstruct import Training
from fheq.spec import MAX_BITS, Rounding, Spec

FEWEST = 3  # bits of activations


def _between(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: is_whole(value) and low <= value <= high


# What the values of each axis are.
_AXES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "tolerances": ("numbers not below 0", lambda v: is_number(v) and v >= 0),
    "rounding_bits": ("integers from 2 to 8", _between(2, 8)),
    "approximate": ("True and False", lambda v: isinstance(v, bool | np.bool_)),
    "weight_bits": (f"integers from 1 to {MAX_BITS}", _between(1, MAX_BITS)),
    "spare_bits": (f"integers from {-MAX_BITS} to {MAX_BITS}", _between(-MAX_BITS, MAX_BITS)),
    "p_errors": ("probabilities between 0 and 1", lambda v: is_number(v) and 0 < v < 1),
    "trainings": ("Training", lambda v: isinstance(v, Training)),
}


@dataclass(frozen=True)
class Space:
    """What a search tries.

    Args:
        tolerances: of pruning (see `prune`).
        rounding_bits: bits that tables read, the same in all layers to begin with.
        approximate: modes of rounding. Exact rounding takes a table for every bit that it removes, and has never been on a
            front; `(True, False)` tries both.
        weight_bits: of weights.
        spare_bits: bits of activations, relative to `rounding_bits`. What a table gives may be finer than what it reads:
            that costs nothing, for noise grows with the weights alone.
        input_bits: of the model's inputs.
        output_bits: of accumulators that are decrypted; at least as many as tables read, which costs nothing.
        p_errors: probabilities of a table's failure: many, for operations fall in steps of up to a third. Large ones are no
            worse than small ones with fewer bits: what a table costs and how much noise it reads depend on bits and
            probability together, and more bits round less.
        spec: where all other options come from.
        finalists: quantizations that are confirmed by noisy simulation.
        reconstructions: of these, how many are reconstructed.
        trainings: options of the reconstructions, each of which is made with all of them.
        held_out: share of the samples that scores are measured on and nothing is fitted to.

    Raises:
        QuantizationError: an option is outside of its range.
    """

    tolerances: Sequence[float] = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
    rounding_bits: Sequence[int] = (4, 5, 6, 7)
    approximate: Sequence[bool] = (True,)
    weight_bits: Sequence[int] = (5, 6, 7, 8)
    spare_bits: Sequence[int] = (-1, 0, 1)
    input_bits: int = 6
    output_bits: int = 6
    p_errors: Sequence[float] = (0.05, 0.2, 0.3, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85)
    spec: Spec = field(default_factory=Spec)
    finalists: int = 16
    reconstructions: int = 12
    trainings: Sequence[Training] = (Training(), Training(adaptive=True))
    held_out: float = 0.25

    def __post_init__(self) -> None:
        for name, (wanted, fits) in _AXES.items():
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray) or not all(map(fits, values)):
                raise QuantizationError(f"space.{name} must be a sequence of {wanted}, got {values!r}")
        for name, least in (("finalists", 1), ("reconstructions", 0)):
            check_whole(f"space.{name}", getattr(self, name), least)
        for name, most in (("input_bits", MAX_BITS), ("output_bits", 8)):
            if not _between(1, most)(getattr(self, name)):
                raise QuantizationError(f"space.{name} must be an integer from 1 to {most}, got {getattr(self, name)!r}")
        if not is_number(self.held_out) or not 0 < self.held_out < 1:
            raise QuantizationError(f"space.held_out must be a share between 0 and 1, got {self.held_out!r}")
        if not isinstance(self.spec, Spec):
            raise QuantizationError(f"space.spec must be a Spec, got {self.spec!r}")

    def specs(self) -> list[Spec]:
        """The grid of a pruned graph."""
        found = []
        axes = (self.approximate, self.rounding_bits, self.weight_bits, self.spare_bits)
        for approximate, bits, weights, spare in product(*axes):
            inner = bits + spare
            if inner < FEWEST:
                continue
            widths = {
                "op_inputs": inner,
                "op_weights": weights,
                "model_inputs": self.input_bits,
                "model_outputs": max(8, inner),
            }
            rounding, output_rounding = Rounding(bits, approximate), Rounding(max(bits, self.output_bits), True)
            found.append(replace(self.spec, n_bits=widths, rounding=rounding, output_rounding=output_rounding))
        return found


def spec_name(spec: Spec) -> str:
    """A spec of the grid, for people."""
    bits, rounding = spec.bits(), spec.rounding
    kept = f"tables of {rounding.n_bits}{'' if rounding.approximate else ' (exact)'}" if rounding else "no rounding"
    return f"{kept}, activations {bits['op_inputs']}, weights {bits['op_weights']}"
