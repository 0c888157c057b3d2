"""An observer of one's own: a range of so many standard deviations around the mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import fheq
from fheq import scores
from fheq.digits import load
from fheq.observing.statistics import TensorStats


@dataclass(frozen=True)
class Deviations:
    """Mean plus and minus `factor` standard deviations, within the observed extremes."""

    factor: float = 3.0

    def range(self, stats: TensorStats, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest value to represent, per channel."""
        del bits
        mean = stats.total / stats.count
        reach = self.factor * np.sqrt(np.maximum(stats.squares / stats.count - mean**2, 0))
        return np.maximum(mean - reach, stats.minimum), np.minimum(mean + reach, stats.maximum)


def main() -> fheq.Results:
    """The observer beside those of fheq, at 3 bits."""
    graph, data = load()
    stats = fheq.calibrate(graph, data["x_train"])
    specs = fheq.grid(fheq.Spec(n_bits=3), observer=[Deviations(2.0), Deviations(), fheq.MinMax(), fheq.MeanSquaredError()])
    qparams = fheq.stack(fheq.fit(graph, stats, spec) for spec in specs)
    results = fheq.sweep(graph, qparams, data["x_test"], scores={"agreement": scores.agreement, "snr": scores.snr})
    print(results.table(observer=[s.observer for s in specs]))
    return results


if __name__ == "__main__":
    main()
