"""What a search tries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from fheq.reconstruct import Training
from fheq.spec import Rounding, Spec

FEWEST = 3  # bits of activations


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
