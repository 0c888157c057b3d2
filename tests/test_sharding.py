"""Many devices and many processes find what one device finds: exactly, but for sums of floats."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sharded

import fheq

HERE = Path(__file__).parent
EXACT = ("count", "minimum", "maximum", "histogram", "accuracy")


def start(devices: int, *arguments: str) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, str(HERE / "sharded.py"), *arguments], env=environment)


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Sums of float64 moments and of float32 scores differ by the order of their terms alone."""
    for name, value in wanted.items():
        if name.split()[-1] in EXACT:
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], value, rtol=1e-4 if name == "snr" else 1e-9, err_msg=name)


def test_eight_devices_find_what_one_finds(tmp_path: Path) -> None:
    process = start(8, str(tmp_path / "found.npz"))
    wanted = sharded.results(None)
    assert process.wait(300) == 0
    found = np.load(tmp_path / "found.npz")
    assert found["devices"] == 8
    assert_equal(found, wanted)


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """Each has its own, unequal, share of the samples; both get the results of all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    files = [tmp_path / f"{rank}.npz" for rank in range(2)]
    processes = [start(2, str(file), address, "2", str(rank)) for rank, file in enumerate(files)]
    graph, data = sharded.load()
    parts = [data["x_train"][rank::2][: (97, 60)[rank]] for rank in range(2)]
    stats = fheq.calibrate(graph, np.concatenate(parts))
    qparams = fheq.stack(fheq.fit(graph, stats, spec) for spec in sharded.SPECS)
    measures = {"accuracy": fheq.scores.accuracy, "snr": fheq.scores.snr}
    swept = fheq.sweep(graph, qparams, data["x_test"], scores=measures, targets=data["y_test"])
    assert [process.wait(300) for process in processes] == [0, 0]
    for file in files:
        found = np.load(file)
        assert found["devices"] == 4
        for name in stats:
            assert_equal(
                found, {f"{name} {leaf}": value for leaf, value in stats[name]._asdict().items() if value is not None}
            )
        np.testing.assert_allclose(found["accuracy"], swept.scores["accuracy"], atol=1.01 / len(data["y_test"]))  # one tie
        np.testing.assert_allclose(found["snr"], swept.scores["snr"], rtol=1e-3)


def test_a_mesh_without_an_axis_for_data_is_refused() -> None:
    import jax

    graph, data = sharded.load()
    with pytest.raises(fheq.FheqError, match='axis "data"'):
        fheq.calibrate(graph, data["x_train"], mesh=jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",)))
