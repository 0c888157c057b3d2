"""Which share of the values shall a range hold? A sweep of percentiles and bits, from one pass over the data."""

from __future__ import annotations

import fheq
from fheq import scores
from fheq.digits import load

BITS, PERCENTS = (3, 4, 5), (90.0, 99.0, 99.9, 100.0)


def main() -> fheq.Results:
    """Twelve quantizations of the digits classifier, scored together."""
    graph, data = load()
    stats = fheq.calibrate(graph, data["x_train"])  # knows no bits and no percentiles
    specs = fheq.grid(n_bits=BITS, observer=[fheq.Percentile(p) for p in PERCENTS])
    qparams = fheq.stack(fheq.fit(graph, stats, spec) for spec in specs)
    results = fheq.sweep(
        graph,
        qparams,
        data["x_test"],
        targets=data["y_test"],
        scores={"accuracy": scores.accuracy, "kl": scores.kl},
    )
    print(results.table(bits=[s.n_bits for s in specs], percent=[s.observer.percent for s in specs]))
    return results


if __name__ == "__main__":
    main()
