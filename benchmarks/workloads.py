"""Searches the workloads of a folder and compares their fronts with another tool's measured circuits.

    python -m benchmarks.workloads FOLDER [--names a,b] [--samples 1000] [--reconstructions 4] [--keep FOLDER]

A workload is NAME.onnx with NAME.npz (x_train, y_train, x_test, y_test). Searches use the defaults of `fheq.search`, the
first samples of x_train and no labels. Scores are those of noisy simulation on the whole of x_test: accuracy, or R2 where
targets are floats. Where the folder has peer.jsonl (name, score, sim_score, complexity, n_bits, rounding and p_error on each
line), each of its circuits is compared with the cheapest point that is at least as accurate.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

import fheq

SEEDS = 3  # noisy simulations averaged


def accuracy(y: np.ndarray, targets: np.ndarray) -> float:
    """Accuracy of classes, R2 of float targets."""
    y = np.asarray(y).reshape(len(targets), -1)
    if targets.dtype.kind == "f":
        return float(1 - np.mean((y[:, 0] - targets.ravel()) ** 2) / np.var(targets))
    classes = y.argmax(axis=1) if y.shape[1] > 1 else y[:, 0] > 0.5
    return float(np.mean(classes == targets.ravel()))


def noisy_score(point: fheq.Point, x: np.ndarray, targets: np.ndarray) -> float:
    """Mean score of several noisy simulations."""
    q = point.program.quantize(x)
    runs = [fheq.simulate(point.program, *q, noise=point.report.noise, key=jax.random.key(seed)) for seed in range(SEEDS)]
    return float(np.mean([accuracy(point.program.dequantize(run)[0], targets) for run in runs]))


def measure(path: Path, samples: int, reconstructions: int, keep: Path | None) -> list[dict[str, object]]:
    """The front of one workload."""
    graph = fheq.import_onnx(path)
    with np.load(path.with_suffix(".npz")) as arrays:
        data = dict(arrays)
    start = time.perf_counter()
    front = fheq.search(
        graph,
        data["x_train"][:samples],
        key=jax.random.key(0),
        space=fheq.Space(reconstructions=reconstructions),
        folder=None if keep is None else keep / path.stem,
    )
    seconds = time.perf_counter() - start
    exact = accuracy(fheq.evaluate(graph, data["x_test"]), data["y_test"])
    print(f"{path.stem}: float {exact:.4f}, searched in {seconds:.0f} s", flush=True)
    rows: list[dict[str, object]] = []
    for point in front.points:
        score = noisy_score(point, data["x_test"], data["y_test"])
        rows.append({"name": path.stem, "complexity": point.complexity, "score": score, "settings": point.settings})
        print(f"  {score:.4f}  {point.complexity / 1e9:9.2f} G  p_error {point.p_error:g}  {point.settings}", flush=True)
    return rows


def compare(rows: list[dict[str, object]], peer: Path) -> None:
    """Prints each of the peer's circuits beside the cheapest point that is at least as accurate."""
    ratios = []
    for line in peer.read_text().splitlines():
        other = json.loads(line)
        wanted = min(other["score"], other.get("sim_score", other["score"]))
        mine = [r for r in rows if r["name"] == other["name"] and r["score"] >= wanted]
        if not any(r["name"] == other["name"] for r in rows):
            continue
        best = min((float(r["complexity"]) for r in mine), default=float("nan"))
        ratio = best / other["complexity"]
        ratios.append(ratio)
        setting = f"n_bits {other['n_bits']}, rounding {other['rounding']}, p_error {other['p_error']}"
        costs = f"{other['complexity'] / 1e9:9.1f} G  here {best / 1e9:8.2f} G"
        print(f"{other['name']:14} {setting:42} {wanted:.4f} {costs}  {ratio:.3f}")
    if ratios:
        print(f"geometric mean of the ratios: {np.exp(np.nanmean(np.log(ratios))):.3f}")


def plot(rows: list[dict[str, object]], file: Path) -> None:
    """Score against operations."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    for name in dict.fromkeys(r["name"] for r in rows):
        own = [r for r in rows if r["name"] == name]
        axes.plot([r["complexity"] for r in own], [r["score"] for r in own], "o-", label=name)
    axes.set(xscale="log", xlabel="predicted operations", ylabel="score on test data, noisy simulation")
    axes.legend()
    figure.savefig(file)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--names", default="")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--reconstructions", type=int, default=fheq.Space().reconstructions)
    parser.add_argument("--keep", type=Path, help="where searches keep their results")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    names = options.names.split(",") if options.names else [p.stem for p in sorted(options.folder.glob("*.onnx"))]
    rows = []
    for name in names:
        rows += measure(options.folder / f"{name}.onnx", options.samples, options.reconstructions, options.keep)
    if (options.folder / "peer.jsonl").exists():
        compare(rows, options.folder / "peer.jsonl")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
