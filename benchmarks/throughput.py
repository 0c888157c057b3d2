"""How fast sweeps, calibration and simulation are, and what they cost: `python -m benchmarks.throughput PART MODEL.onnx`.

MODEL.npz beside the model holds x_train, x_test and y_test. The parts are `sweep`, `calibrate`, `simulate`, `memory` and
`growth`. Machines are shared, so every ratio is the median of pairs that were timed one after the other.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fheq
from fheq import scores
from fheq.console import text_table

REPEATS = 5
CONFIGURATIONS = (64, 1024)
LOOPED = 8  # configurations of the loop that are timed


def ratios(pairs: dict[str, Callable[[], Any]], repeats: int = REPEATS) -> dict[str, list[float]]:
    """Seconds of each function, called in turn, after one call of each that compiles."""
    for fn in pairs.values():
        fn()
    found: dict[str, list[float]] = {name: [] for name in pairs}
    for _ in range(repeats):
        for name, fn in pairs.items():
            start = time.perf_counter()
            fn()
            found[name].append(time.perf_counter() - start)
    return found


def median_ratio(a: list[float], b: list[float]) -> float:
    """Median of the ratios of pairs."""
    return float(np.median(np.divide(a, b)))


def load(path: Path) -> tuple[fheq.Graph, dict[str, np.ndarray]]:
    """A model and its data."""
    return fheq.import_onnx(path), dict(np.load(path.with_suffix(".npz")))


def specs(count: int) -> list[fheq.Spec]:
    """Different bits, observers and roundings."""
    observers = [fheq.MeanSquaredError(), fheq.MinMax(), *map(fheq.Percentile, (99.0, 99.9))]
    roundings = [None, *map(fheq.Rounding, (4, 5, 6))]
    every = fheq.grid(n_bits=range(3, 11), observer=observers, rounding=roundings, margin=np.linspace(0.1, 0.3, 8).tolist())
    return [every[i] for i in np.linspace(0, len(every) - 1, count).astype(int)]


def sweep(path: Path, peer: str | None) -> None:
    """A sweep against the same functions in a loop."""
    graph, data = load(path)
    x, y = data["x_test"], data["y_test"]
    stats = fheq.calibrate(graph, data["x_train"][:1000])
    fitted = [fheq.fit(graph, stats, spec) for spec in specs(64)]
    as32 = [jax.tree.map(lambda v: np.asarray(v, np.float32), q) for q in fitted[:LOOPED]]
    rows = []
    for count in CONFIGURATIONS:
        stacked = fheq.stack(fitted * (count // 64))
        pairs = {
            "sweep": lambda q=stacked: fheq.sweep(graph, q, x, scores={"accuracy": scores.accuracy}, targets=y),
            "loop": lambda: [np.mean(np.asarray(fheq.fake_quant(graph, q, x)).argmax(1) == y) for q in as32],
        }
        found = ratios(pairs, 3)
        each = [s / count for s in found["sweep"]], [s / LOOPED for s in found["loop"]]
        rows.append([str(count), *(f"{1e3 * np.median(e):.2f}" for e in each), f"{median_ratio(each[1], each[0]):.2f}"])
    print(f"{path.stem}: {len(x)} samples, milliseconds per configuration (of the loop, {LOOPED} are timed)")
    print(text_table(("configurations", "sweep", "loop", "loop / sweep"), rows))
    if peer:
        seconds = float(subprocess.run([peer, "-c", PEER, str(path)], check=True, capture_output=True, text=True).stdout)
        print(f"peer: {1e3 * seconds:.1f} ms per configuration, {1e3 * seconds / float(rows[-1][1]):.0f} times a sweep's")


PEER = """
import sys, time, numpy as np, onnx
from concrete.ml.quantization import PostTrainingAffineQuantization
from concrete.ml.torch.numpy_module import NumpyModule
path = sys.argv[1]; data = np.load(path.replace(".onnx", ".npz")); model = onnx.load(path); seconds = []
for bits in (4, 5, 6):
    start = time.perf_counter()
    module = PostTrainingAffineQuantization(bits, NumpyModule(model)).quantize_module(data["x_train"][:1000])
    start = time.perf_counter()
    module.forward(data["x_test"], fhe="disable")
    seconds.append(time.perf_counter() - start)
print(sorted(seconds)[1])
"""


def calibrate(path: Path, peer: str | None) -> None:
    """Calibration against the float forward pass and against onnxruntime's min-max calibrator."""
    import onnxruntime as ort
    from onnxruntime.quantization.calibrate import CalibrationDataReader, MinMaxCalibrater

    graph, data = load(path)
    x = data["x_train"][:1000]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.parts: Iterator = iter(np.array_split(x, 4))

        def get_next(self) -> dict | None:
            part = next(self.parts, None)
            return None if part is None else {graph.inputs[0].name: part}

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def minmax() -> None:
        with tempfile.TemporaryDirectory() as folder:
            calibrater = MinMaxCalibrater(path, augmented_model_path=str(Path(folder) / "augmented.onnx"))
            calibrater.augment_graph()
            calibrater.create_inference_session()
            calibrater.collect_data(Reader())
            calibrater.compute_data()

    found = ratios(
        {
            "fheq.calibrate": lambda: fheq.calibrate(graph, x),
            "fheq.evaluate": lambda: np.asarray(fheq.evaluate(graph, x)),
            "onnxruntime": lambda: session.run(None, {graph.inputs[0].name: x}),
            "onnxruntime min-max": minmax,
        }
    )
    own = found["fheq.calibrate"]
    rows = [[name, f"{1e3 * np.median(s):.1f}", f"{median_ratio(own, s):.2f}"] for name, s in found.items()]
    print(f"{path.stem}: {len(x)} samples")
    print(text_table(("", "ms", "fheq.calibrate / it"), rows))


def simulate(path: Path, peer: str | None) -> None:
    """Batched simulation against concrete's, which takes one sample at a time."""
    graph, data = load(path)
    stats = fheq.calibrate(graph, data["x_train"][:1000])
    program = fheq.lower(graph, fheq.fit(graph, stats, fheq.Spec(5, rounding=fheq.Rounding(5, approximate=True))))
    q = program.quantize(data["x_test"])
    circuit = fheq.compile(program, p_error=1e-2)
    few = [v[:3] for v in q]
    found = ratios(
        {
            "fheq.simulate": lambda: fheq.simulate(program, *q),
            "concrete": lambda: circuit.simulate(*few, quantized=True),
        },
        3,
    )
    each = [s / len(q[0]) for s in found["fheq.simulate"]], [s / 3 for s in found["concrete"]]
    names = ("fheq.simulate", "concrete's simulation")
    rows = [[name, f"{1e3 * np.median(e):.4f}", f"{median_ratio(e, each[0]):.0f}"] for name, e in zip(names, each)]
    print(f"{path.stem}: milliseconds per sample")
    print(text_table(("", "ms", "ratio"), rows))


def memory(path: Path, peer: str | None) -> None:
    """Peak memory of calibration on streams of 10,000 and 1,000,000 samples, each in a process of its own."""
    peaks = {}
    for count in (10_000, 1_000_000):
        command = [sys.executable, "-m", "benchmarks.throughput", "stream", str(path), "--samples", str(count)]
        peaks[count] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    rows = [[f"{count:,}", f"{peak / 1024:.0f}", f"{peak / peaks[10_000]:.3f}"] for count, peak in peaks.items()]
    print(text_table(("samples", "peak MB", "ratio"), rows))


def stream(path: Path, samples: int) -> None:
    """Calibrates on a stream and prints the peak memory in KB."""
    graph, data = load(path)
    batch = data["x_train"][:250]
    fheq.calibrate(graph, batches=(batch for _ in range(samples // 250)), progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def growth(path: Path, peer: str | None) -> None:
    """Seconds of a sweep as configurations and samples grow."""
    graph, data = load(path)
    stats = fheq.calibrate(graph, data["x_train"][:1000])
    fitted = [fheq.fit(graph, stats, spec) for spec in specs(32)]
    x = np.concatenate([data["x_test"]] * 4)
    rows = []
    for count, n in ((32, 256), (64, 256), (128, 256), (32, 512), (32, 1024)):
        stacked = fheq.stack(fitted * (count // 32))
        run = lambda q=stacked, n=n: fheq.sweep(graph, q, x[:n], scores={"kl": scores.kl})
        (seconds,) = ratios({"": run}, 3).values()
        rows.append([str(count), str(n), f"{np.median(seconds):.3f}", f"{1e6 * np.median(seconds) / count / n:.2f}"])
    print(text_table(("configurations", "samples", "seconds", "us per pair"), rows))


PARTS = {"sweep": sweep, "calibrate": calibrate, "simulate": simulate, "memory": memory, "growth": growth}


def main() -> None:
    """Runs one part."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "stream"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", help="an interpreter that has concrete-ml, for `sweep`")
    parser.add_argument("--samples", type=int, default=10_000, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "stream":
        stream(options.model, options.samples)
    else:
        PARTS[options.part](options.model, options.peer)


if __name__ == "__main__":
    main()
