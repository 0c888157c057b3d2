"""How fast sweeps, calibration and simulation are, and what they cost: writes `benchmarks/SCALE.md`.

`python -m benchmarks.throughput FOLDER --peer-python PYTHON`: the folder holds NAME.onnx with NAME.npz (x_train, x_test,
y_test). Machines are shared, so that every ratio is the median of pairs that were timed one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
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
import onnx
from onnx import TensorProto, helper, numpy_helper

import fheq
from fheq import scores

HERE = Path(__file__).parent
MODELS = ("mnist_nn20", "digits_cnn")
CONFIGURATIONS = (64, 1024)
LOOPED = 8  # configurations of the loops that are timed
PEER_LOOPED = 3
SAMPLES = (1_000, 10_000)
STREAMS = (10_000, 1_000_000)


def seconds(fn: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def warm(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """`timed` after one call of each function, that compiles."""
    for fn in functions.values():
        fn()
    return timed(functions, repeats)


def timed(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, called in turn."""
    rounds = [{name: seconds(fn) for name, fn in functions.items()} for _ in range(repeats)]
    return {name: [found[name] for found in rounds] for name in functions}


def ratio(a: list[float], b: list[float]) -> str:
    """Median of the ratios of pairs."""
    return f"{float(np.median(np.divide(a, b))):.2f}"


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def load(path: Path) -> tuple[fheq.Graph, dict[str, np.ndarray]]:
    """A model and its data."""
    return fheq.import_onnx(path), dict(np.load(path.with_suffix(".npz")))


def specs(count: int) -> list[fheq.Spec]:
    """Different bits, observers and roundings."""
    observers = [fheq.MeanSquaredError(), fheq.MinMax(), *map(fheq.Percentile, (99.0, 99.9))]
    roundings = [None, *map(fheq.Rounding, (4, 5, 6))]
    every = fheq.grid(n_bits=range(3, 11), observer=observers, rounding=roundings, margin=np.linspace(0.1, 0.3, 8).tolist())
    return [every[i] for i in np.linspace(0, len(every) - 1, count).astype(int)]


def sweeps(folder: Path, peer: dict[str, Any]) -> str:
    """Sweeps against the same functions in a loop, and against the peer's loop."""
    head = ("model", "configurations", "first sweep, s", "sweep", "own loop", "`fit`", "`fit_each`", "own loop / sweep")
    if peer:
        head += ("peer", "peer / (`fit_each` + sweep)", "peer / (`fit_each` + first sweep)", "peer / sweep")
        head += ("peer's forward / sweep",)
    rows = [sweep_row(folder / f"{name}.onnx", count, peer.get(name)) for name in MODELS for count in CONFIGURATIONS]
    return f"Milliseconds for each configuration (first sweep: seconds in all, with compiling).\n\n{table(head, rows)}"


def sweep_row(path: Path, count: int, peer: dict[str, Any] | None) -> list[str]:
    """One model and number of configurations."""
    graph, data = load(path)
    x, y = data["x_test"], data["y_test"]
    stats = fheq.calibrate(graph, data["x_train"][:1000])
    fitted: list[fheq.QParams] = []
    fitting = seconds(lambda: fitted.extend(fheq.fit_each(graph, stats, specs(count)))) / count
    unseen = jax.tree.map(np.copy, stats)  # what is remembered of the others does not help
    alone = seconds(lambda: [fheq.fit(graph, unseen, spec) for spec in specs(64)[::8]]) / 8
    stacked = fheq.stack(fitted)
    as32 = [jax.tree.map(lambda v: np.asarray(v, np.float32), q) for q in fitted[:LOOPED]]
    one = lambda q: np.mean(np.asarray(fheq.fake_quant(graph, q, x)).argmax(1) == y)
    loop = lambda: [one(q) for q in as32]
    run = lambda: fheq.sweep(graph, stacked, x, scores={"accuracy": scores.accuracy}, targets=y, progress=False)
    jax.clear_caches()
    first = seconds(run) / count
    loop()
    found = timed({"sweep": run, "loop": loop}, 3 if count == 64 else 1)
    sweeps, loops = [s / count for s in found["sweep"]], [s / LOOPED for s in found["loop"]]
    each = float(np.median(sweeps))
    row = [
        path.stem,
        str(count),
        f"{first * count:.1f}",
        *(f"{1e3 * v:.2f}" for v in (each, np.median(loops), alone, fitting)),
    ]
    row.append(ratio(loops, sweeps))
    if peer:
        theirs = float(np.median([s["quantize"] + s["forward"] for s in peer["sweep"]]))
        forward = float(np.median([s["forward"] for s in peer["sweep"]]))
        row.append(f"{1e3 * theirs:.0f}")
        row += [f"{theirs / own:.0f}" for own in (fitting + each, fitting + first, each)] + [f"{forward / each:.0f}"]
    return row


def calibrations(folder: Path, peer: dict[str, Any]) -> str:
    """Calibration against the float forward pass and against onnxruntime's min-max calibrator."""
    import onnxruntime as ort
    from onnxruntime.quantization.calibrate import CalibrationDataReader, MinMaxCalibrater

    class Reader(CalibrationDataReader):
        def __init__(self, name: str, x: np.ndarray) -> None:
            self.parts: Iterator = iter({name: part} for part in np.array_split(x, 4))

        def get_next(self) -> dict | None:
            return next(self.parts, None)

    def minmax(path: Path, name: str, x: np.ndarray) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            calibrater = MinMaxCalibrater(path, augmented_model_path=str(Path(scratch) / "augmented.onnx"))
            calibrater.augment_graph()
            calibrater.create_inference_session()
            calibrater.collect_data(Reader(name, x))
            calibrater.compute_data()

    def row(path: Path, count: int) -> list[str]:
        graph, data = load(path)
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        key = graph.inputs[0].name
        x = np.resize(data["x_train"], (count, *data["x_train"].shape[1:]))
        found = warm(
            {
                "float": lambda: np.asarray(fheq.evaluate(graph, x)),
                "extremes": lambda: fheq.calibrate(graph, x, observers=[fheq.MinMax()]),
                "all": lambda: fheq.calibrate(graph, x),
                "session": lambda: session.run(None, {key: x}),
                "minmax": lambda: minmax(path, key, x),
            },
            11 if count == SAMPLES[0] else 5,
        )
        pairs = (("extremes", "float"), ("all", "float"), ("extremes", "minmax"))
        times = (f"{1e3 * np.median(s):.1f}" for s in found.values())
        return [path.stem, f"{count:,}", *times, *(ratio(found[a], found[b]) for a, b in pairs)]

    head = ("model", "samples", "float pass", "min-max", "all", "onnxruntime's pass", "its min-max calibrator")
    head += ("min-max / float", "all / float", "min-max / onnxruntime's")
    rows = [row(folder / f"{name}.onnx", count) for name in MODELS for count in SAMPLES]
    return f"Milliseconds.\n\n{table(head, rows)}"


def simulations(folder: Path, peer: dict[str, Any]) -> str:
    """Batched simulation against the peer's clear forward and against concrete's, which takes one sample at a time."""
    head = ("model", "`simulate`", "concrete's simulation of the same circuit", "ratio")
    if peer:
        head += ("peer's clear forward", "peer's simulation", "peer's clear / `simulate`", "peer's simulation / `simulate`")
    rows = [simulation_row(folder / f"{name}.onnx", peer.get(name)) for name in MODELS]
    return f"Milliseconds a sample.\n\n{table(head, rows)}"


def simulation_row(path: Path, peer: dict[str, Any] | None) -> list[str]:
    """One model."""
    graph, data = load(path)
    stats = fheq.calibrate(graph, data["x_train"][:1000])
    program = fheq.lower(graph, fheq.fit(graph, stats, fheq.Spec(5, rounding=fheq.Rounding(5, approximate=True))))
    q = program.quantize(data["x_test"])
    circuit = fheq.compile(program, p_error=1e-1)
    few = [v[:3] for v in q]
    own, concrete = lambda: fheq.simulate(program, *q), lambda: circuit.simulate(*few, quantized=True)
    found = warm({"fheq": own, "concrete": concrete}, 5)
    each = [s / len(q[0]) for s in found["fheq"]], [s / 3 for s in found["concrete"]]
    ours = float(np.median(each[0]))
    row = [path.stem, f"{1e3 * ours:.4f}", f"{1e3 * np.median(each[1]):.1f}", ratio(each[1], each[0])]
    if peer:
        row += [f"{1e3 * peer['clear']:.4f}", f"{1e3 * peer['simulate']:.1f}"]
        row += [f"{peer['clear'] / ours:.1f}", f"{peer['simulate'] / ours:.0f}"]
    return row


def memory(folder: Path, peer: dict[str, Any]) -> str:
    """Peak memory after streams of different lengths, one after the other in one process: compiling takes tens of MB more
    in one process than in the next."""
    command = [sys.executable, "-m", "benchmarks.throughput", str(folder), "--stream"]
    peaks = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = [[f"{n:,}", f"{peak / 1024:.0f}", f"{peak / peaks[0]:.3f}"] for n, peak in zip(STREAMS, peaks)]
    return table(("samples streamed through digits_cnn", "peak MB", "ratio"), rows)


def stream(folder: Path) -> None:
    """Calibrates on streams and prints the process's peak memory in KB after each."""
    graph, data = load(folder / "digits_cnn.onnx")
    batch = data["x_train"][:250]
    peaks = []
    for samples in STREAMS:
        fheq.calibrate(graph, batches=(batch for _ in range(samples // 250)), progress=False)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peaks.append(int(status["VmHWM"].split()[0]))  # `resource` would give the parent's where that is larger
    print(json.dumps(peaks))


def layers(depth: int, width: int) -> fheq.Graph:
    """A network of `depth` square layers."""
    rng = np.random.default_rng(0)
    nodes, known, last = [], [], "x"
    for i in range(depth):
        weight = rng.normal(size=(width, width)).astype(np.float32) * np.float32(np.sqrt(2 / width))
        known.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes += [helper.make_node("MatMul", [last, f"w{i}"], [f"h{i}"]), helper.make_node("Relu", [f"h{i}"], [f"r{i}"])]
        last = f"r{i}"
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width])
    model = helper.make_model(helper.make_graph(nodes, "layers", [value("x")], [value(last)], known))
    model.opset_import[0].version = 17
    onnx.checker.check_model(model)
    return fheq.import_onnx(model.SerializeToString())


GROWTH = (  # configurations, samples, depth, width
    (32, 512, 4, 64),
    *((count, 512, 4, 64) for count in (64, 128, 256)),
    *((32, samples, 4, 64) for samples in (1024, 2048, 4096)),
    *((32, 512, depth, 64) for depth in (8, 16, 32)),
    *((32, 512, 4, width) for width in (128, 256, 512)),
)


def growth(folder: Path, peer: dict[str, Any]) -> str:
    """Seconds of a sweep as configurations, samples, depth and width grow."""
    head = ("configurations", "samples", "depth", "width", "first `calibrate`", "`fit`", "first sweep", "sweep")
    rows = [growth_row(*sizes) for sizes in GROWTH]
    return f"Seconds.\n\n{table((*head, 'us for each configuration, sample and layer'), rows)}"


def growth_row(count: int, samples: int, depth: int, width: int) -> list[str]:
    """One size."""
    graph = layers(depth, width)
    x = np.random.default_rng(1).normal(size=(samples, width)).astype(np.float32)
    start = time.perf_counter()
    stats = fheq.calibrate(graph, x[:512])
    calibrating = time.perf_counter() - start
    fitting = seconds(lambda: fheq.fit(graph, stats, 4))
    stacked = fheq.stack([fheq.fit(graph, stats, 4 + i % 4) for i in range(8)] * (count // 8))
    run = lambda: fheq.sweep(graph, stacked, x, scores={"kl": scores.kl}, progress=False)
    first, again = seconds(run), min(seconds(run) for _ in range(3))
    row = [str(v) for v in (count, samples, depth, width)] + [f"{v:.3f}" for v in (calibrating, fitting, first, again)]
    return [*row, f"{1e6 * again / count / samples / depth:.2f}"]


def ask_peer(python: str | None, folder: Path) -> dict[str, Any]:
    """What the peer measures, by model; nothing without an interpreter that has it."""
    if python is None:
        return {}
    found = {}
    for name in MODELS:
        command = [python, str(HERE / "peer.py"), str(folder / f"{name}.onnx"), str(PEER_LOOPED)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found[name] = json.loads(run.stdout.splitlines()[-1])
    return found


END = "<!-- end -->\n"
SECTIONS = {"sweeps": sweeps, "calibrations": calibrations, "simulations": simulations, "memory": memory, "growth": growth}


def main() -> None:
    """Measures the sections asked for and puts them in the page, which keeps the others."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], default=[], help="all of them by default")
    parser.add_argument("--peer-python", help="an interpreter that has concrete-ml")
    parser.add_argument("--stream", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stream:
        return stream(options.folder)
    page = HERE / "SCALE.md"
    text = page.read_text()
    sections = options.sections or list(SECTIONS)
    peer = ask_peer(options.peer_python, options.folder) if {"sweeps", "simulations"} & set(sections) else {}
    for name in sections:
        found = SECTIONS[name](options.folder, peer)
        print(found, flush=True)
        before, rest = text.split(f"<!-- {name} -->\n")
        after = rest.split(END, 1)[1]
        text = f"{before}<!-- {name} -->\n{found}{END}{after}"
        page.write_text(text)
    return None


if __name__ == "__main__":
    main()
