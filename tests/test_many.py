"""Many programs in processes: a crash costs its own item, and results come back whole and in order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from mortal import MORTAL, X, assert_survived, double
from mortal import small_program as program

import fheq
from fheq.errors import ArgumentError
from fheq.many import compiled_table, run_all

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")


def run_clear(x: np.ndarray, deadly_top: int, circuit: fheq.Circuit) -> np.ndarray:
    """The circuit's clear evaluation; one circuit crashes its process as native code may."""
    if np.max(circuit.program.inputs[0].affine.qmax) == deadly_top:
        os.abort()
    return circuit.evaluate(x)


@pytest.fixture(scope="module")
def cluster() -> Iterator:
    """A client of a local Dask cluster of two workers."""
    distributed = pytest.importorskip("distributed")
    import dask

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),  # else a deadly task kills four workers
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.mark.parametrize("kind", ["spawned", "given"])
def test_a_worker_that_dies_or_hangs_costs_its_own_item(kind: str) -> None:
    script = Path(__file__).with_name("mortal.py")
    run = subprocess.run([sys.executable, str(script), kind], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr


def test_a_dask_worker_that_dies_or_hangs_costs_its_own_item(cluster) -> None:
    assert_survived(dict(run_all(double, MORTAL, cluster.get_executor(), workers=2, timeout=1.0)))
    assert cluster.submit(double, 3).result(60) == 6, "the cluster lives on"


def test_programs_are_compiled_and_run_elsewhere() -> None:
    """One of three kills its worker; the others give what they give here."""
    programs = {("bits", n): program(n) for n in (2, 3, 4)}
    results = fheq.compile_many(programs, partial(run_clear, X[:5], 2**3 - 1), p_error=1e-3, workers=2)
    assert [r.key for r in results] == list(programs)
    good, dead, other = results
    assert not dead.ok and "died" in dead.error and dead.complexity is None
    for result in (good, other):
        assert result.ok and result.complexity > 0 and result.bootstraps == 2
        found = programs[result.key]
        simulated = found.dequantize(fheq.simulate(found, *found.quantize(X[:5])))[0]
        np.testing.assert_array_equal(result.value, simulated)
    assert "died" in compiled_table(results) and "('bits', 4)" in compiled_table(results)


def test_what_raises_is_reported_and_chances_go_by_key() -> None:
    """In threads: any executor will do, whichever thread imported concrete."""
    fheq.compile(program(2), p_error=1e-3)

    def half(circuit: fheq.Circuit) -> float:
        return 1 / (circuit.p_error - 1e-3)

    with ThreadPoolExecutor(1) as threads:
        results = fheq.compile_many([program(2)] * 2, half, p_error={0: 1e-3, 1: 1e-9}, executor=threads)
    assert not results[0].ok and results[0].error.startswith("ZeroDivisionError") and results[0].key == 0
    assert results[1].ok and results[1].complexity > results[0].complexity


def test_a_reader_that_is_gone_raises_though_a_circuit_ran() -> None:
    """In whatever thread: concrete's runtime would end the process."""
    circuit = fheq.compile(program(2), p_error=1e-3)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(circuit.simulate, X[:1]).result()
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        os.write(writing, b"lost")
    os.close(writing)


def test_what_cannot_be_sent_is_refused_before_any_work() -> None:
    with pytest.raises(fheq.FheqError, match="partial"):
        fheq.compile_many([program(2)], lambda circuit: circuit.complexity)
    with pytest.raises(ArgumentError, match="p_error"):
        fheq.compile_many([program(2)], p_error=2.0)
    with pytest.raises(ArgumentError, match="program 1"):
        fheq.compile_many([program(2), program(3)], p_error={0: 0.1})
    with pytest.raises(ArgumentError, match="unknown inputs"):
        fheq.compile(program(2), clear=["nope"])
    with pytest.raises(fheq.FheqError, match="got ModelProto"):
        fheq.compile(onnx.ModelProto())
    for timeout in (0, "a", float("nan")):
        with pytest.raises(ArgumentError, match="timeout"):
            fheq.compile_many([program(2)], timeout=timeout)


def test_a_dask_cluster_runs_them(cluster) -> None:
    programs = [program(2), program(3)]
    results = fheq.compile_many(programs, partial(run_clear, X[:5], -1), p_error=1e-3, executor=cluster.get_executor())
    for found, result in zip(programs, results, strict=True):
        np.testing.assert_array_equal(
            result.value, found.dequantize(fheq.simulate(found, *found.quantize(X[:5])))[0], err_msg=str(result.error)
        )
