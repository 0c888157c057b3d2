"""What `tests/test_sharding.py` runs in processes of its own: calibrates and sweeps, and saves what it found.

`python sharded.py OUTPUT [ADDRESS COUNT RANK]`: with an address, as one of COUNT processes, each with its share.
"""

from __future__ import annotations

import sys
import warnings

import jax
import numpy as np

import fheq
from fheq import scores
from fheq.digits import load
from fheq.observing.statistics import TensorStats

SPECS = fheq.grid(n_bits=(2, 4, 6))  # no multiple of the devices


def results(mesh: jax.sharding.Mesh | None, rank: int = 0, count: int = 1) -> dict[str, np.ndarray]:
    """Statistics and scores by name."""
    warnings.simplefilter("ignore")
    graph, data = load()
    x, test, labels = data["x_train"][rank::count], data["x_test"][rank::count], data["y_test"][rank::count]
    stats = fheq.calibrate(graph, x[: 97 if rank == 0 else 60], mesh=mesh)
    qparams = fheq.stack(fheq.fit(graph, stats, spec) for spec in SPECS)
    measures = {"accuracy": scores.accuracy, "snr": scores.snr}
    swept = fheq.sweep(graph, qparams, test, scores=measures, targets=labels, mesh=mesh, chunk=2, batch_size=32)
    flat = {
        f"{name} {leaf}": getattr(s, leaf)
        for name, s in stats.items()
        for leaf in TensorStats._fields
        if getattr(s, leaf) is not None
    }
    return {**flat, **swept.scores}


def main(output: str, address: str = "", count: str = "1", rank: str = "0") -> None:
    """Saves the results of this process."""
    if address:
        jax.distributed.initialize(address, int(count), int(rank))
    devices = np.array(jax.devices())
    both = len(devices) // int(count) % 4 == 0  # several devices in each process: some for configurations
    shape = (len(devices) // 4, 4) if both else (len(devices), 1)
    mesh = jax.sharding.Mesh(devices.reshape(shape), ("data", "configurations"))
    np.savez(output, devices=len(devices), **results(mesh, int(rank), int(count)))


if __name__ == "__main__":
    main(*sys.argv[1:])
