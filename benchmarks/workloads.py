"""Searches the workloads of a folder and compares their fronts with the peer's circuits.

    python -m benchmarks.workloads FOLDER [--names a,b] [--samples 1000] [--keep FOLDER] [--peer-python PYTHON]

A workload is NAME.onnx with NAME.npz (x_train, y_train, x_test, y_test). Searches use the defaults of `fheq.search`, the
first samples of x_train and no labels. Scores are those of noisy simulation on the whole of x_test, the mean of three:
accuracy, or R2 where targets are floats. The peer's circuits are those of FOLDER/peer.jsonl (name, score, complexity,
n_bits, rounding and p_error on each line) and, given an interpreter that has concrete-ml, those compiled there on the same
samples.
Each is compared with the cheapest point whose noisy score is at least the peer's score without noise, which is compiled.
Tables go to WORKLOADS.md and a plot to workloads.svg, beside this file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fheq
from benchmarks.scoring import accuracy

SEEDS = 3  # noisy simulations averaged
HERE = Path(__file__).parent
Row = dict[str, Any]


def noisy_score(point: fheq.Point, x: np.ndarray, targets: np.ndarray) -> float:
    """Mean score of several noisy simulations."""
    q = point.program.quantize(x)
    runs = [fheq.simulate(point.program, *q, noise=point.report.noise, key=jax.random.key(seed)) for seed in range(SEEDS)]
    return float(np.mean([accuracy(point.program.dequantize(run)[0], targets) for run in runs]))


def measure(path: Path, samples: int, keep: Path | None) -> list[Row]:
    """The front of one workload, cheapest first."""
    graph = fheq.import_onnx(path)
    with np.load(path.with_suffix(".npz")) as arrays:
        data = dict(arrays)
    start = time.perf_counter()
    folder = None if keep is None else keep / path.stem
    front = fheq.search(graph, data["x_train"][:samples], key=jax.random.key(0), folder=folder)
    seconds = time.perf_counter() - start
    exact = accuracy(fheq.evaluate(graph, data["x_test"]), data["y_test"])
    print(f"{path.stem}: float {exact:.4f}, searched in {seconds:.0f} s", flush=True)
    rows = []
    for point in front.points:
        score = noisy_score(point, data["x_test"], data["y_test"])
        known = {"p_error": point.p_error, "settings": point.settings, "float": exact}
        rows.append({"name": path.stem, "complexity": point.complexity, "score": score, "point": point, **known})
        print(f"  {score:.4f}  {point.complexity / 1e9:9.2f} G  p_error {point.p_error:g}  {point.settings}", flush=True)
    return rows


def peers(folder: Path, names: list[str], python: str | None) -> list[Row]:
    """The peer's circuits: those on record, and those that it compiles now."""
    record = folder / "peer.jsonl"
    lines = record.read_text().splitlines() if record.exists() else []
    for name in names if python else ():
        command = [str(python), "-m", "benchmarks.peer_circuits", str((folder / f"{name}.onnx").resolve())]
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent).stdout.splitlines()
        lines += [line for line in found if line.startswith("{")]
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["name"] in names]


def matches(rows: list[Row], others: list[Row]) -> list[tuple[Row, Row, bool]]:
    """Each of the peer's circuits with the cheapest point as accurate as it, or else the best one; and whether it is."""
    found = []
    for other in others:
        own = [r for r in rows if r["name"] == other["name"]]
        as_good = [r for r in own if round(r["score"], 4) >= round(other["score"], 4)]  # as precise as they are on record
        chosen = min(as_good, key=lambda r: r["complexity"]) if as_good else max(own, key=lambda r: r["score"])
        found.append((other, chosen, bool(as_good)))
    return found


def compile_points(rows: list[Row]) -> None:
    """Sets what concrete says of the operations of these points."""
    rows = list({id(row): row for row in rows}.values())
    points = fheq.Front(tuple(row["point"] for row in rows), np.nan).compiled().points
    for row, point in zip(rows, points, strict=True):
        row["compiled"] = point.compiled


def compared(matched: list[tuple[Row, Row, bool]]) -> list[list[str]]:
    """The peer's circuits beside those here, by what both compile to."""
    table: list[list[str]] = []
    ratios: dict[str, list[float]] = {"all": [], "those that round approximately, at a stated p_error": []}
    for other, own, as_good in matched:
        setting = f"n_bits {other['n_bits']}, rounding {other['rounding']}, p_error {other['p_error']}"
        cells = [other["name"], setting, f"{other['score']:.4f}", f"{other['complexity'] / 1e9:,.1f}"]
        predicted, compiled = own["complexity"], own["compiled"]
        ratio = (compiled or predicted) / other["complexity"]
        fair = str(other["rounding"]).endswith("A") and other["p_error"] != "default"
        for found in list(ratios.values())[: 1 + fair] if as_good else ():
            found.append(ratio)
        score = f"{'' if as_good else 'best '}{own['score']:.4f}"
        billions = [f"{v / 1e9:,.2f}" if v else "-" for v in (predicted, compiled)]
        cells += [score, *billions, f"{ratio:.3f}" if as_good else "-"]
        table.append(cells)
    for which, found in ratios.items():
        mean = f"{np.exp(np.mean(np.log(found))):.3f}" if found else "-"
        table.append([f"geometric mean of {which} ({len(found)} matched)", *[""] * 6, mean])
    return table


def markdown(head: list[str], table: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *table])


def best_points(rows: list[Row]) -> list[Row]:
    """The points that score higher on test data than everything cheaper."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda r: r["complexity"]):
        if row["score"] > max((f["score"] for f in found if f["name"] == row["name"]), default=-np.inf):
            found.append(row)
    return sorted(found, key=lambda r: r["name"])


def page(rows: list[Row], others: list[Row], samples: int) -> str:
    """WORKLOADS.md."""
    head = ["workload", "the peer's setting", "its score", "its operations, G"]
    head += ["score here", "predicted operations, G", "compiled, G", "ratio"]
    matched = matches(rows, others)
    compile_points([own for _, own, _ in matched])
    fronts = [
        [
            r["name"],
            f"{r['float']:.4f}",
            f"{r['score']:.4f}",
            f"{r['complexity'] / 1e9:,.2f}",
            f"{r['p_error']:g}",
            r["settings"],
        ]
        for r in best_points(rows)
    ]
    return f"""# Workloads

Written by `python -m benchmarks.workloads FOLDER`: searches with the defaults, {samples} samples, no labels. Scores are
those of noisy simulation on the test data, the mean of {SEEDS}; the peer's are without noise. Operations are predicted (see
[COST.md](COST.md)) and, for the points that are compared, those of the compiled circuit too, as the peer's are; the ratio
is of these.

{markdown(head, compared(matched))}

![score against operations](workloads.svg)

{markdown(["workload", "float", "score", "operations, G", "p_error", "settings"], fronts)}
"""


def plot(rows: list[Row], others: list[Row], file: Path) -> None:
    """Score against operations, the peer's circuits as crosses."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 6))
    for name in dict.fromkeys(r["name"] for r in rows):
        own = [r for r in best_points(rows) if r["name"] == name]
        (line,) = axes.plot([r["complexity"] for r in own], [r["score"] for r in own], ".-", label=name)
        theirs = [r for r in others if r["name"] == name]
        axes.plot([r["complexity"] for r in theirs], [r["score"] for r in theirs], "x", color=line.get_color())
    axes.set(xscale="log", xlabel="operations", ylabel="score on test data", ylim=(0.2, 1.0))
    axes.legend()
    figure.savefig(file)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--names", default="")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--keep", type=Path, help="where searches keep their results")
    parser.add_argument("--peer-python", help="an interpreter that has concrete-ml")
    options = parser.parse_args()
    names = options.names.split(",") if options.names else [p.stem for p in sorted(options.folder.glob("*.onnx"))]
    rows = [row for name in names for row in measure(options.folder / f"{name}.onnx", options.samples, options.keep)]
    others = peers(options.folder, names, options.peer_python)
    (HERE / "WORKLOADS.md").write_text(page(rows, others, options.samples))
    plot(rows, others, HERE / "workloads.svg")


if __name__ == "__main__":
    main()
