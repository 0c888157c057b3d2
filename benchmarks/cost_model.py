"""Predicted against compiled complexity on generated circuits: `python -m benchmarks.cost_model [--count N] [--plot FILE]`.

Prints one line per circuit, then the median and 95th percentile of the relative error, the rank correlation, in how many the
numbers of bootstraps agree, and the processor time of predictions. COST.md has what it printed. The plot needs matplotlib
(`pip install fheq[plot]`).
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

import fheq
from fheq.cost import cost
from fheq.optimizer.parameters import _search as cached_search

P_ERRORS = (0.85, 0.5, 0.1, 1e-2, 1e-3, 1e-5, 2.0**-40)
ROUNDINGS = (
    None,
    fheq.Rounding(3, approximate=True),
    fheq.Rounding(4, approximate=True),
    fheq.Rounding(5, approximate=True),
    fheq.Rounding(6, approximate=True),
    fheq.Rounding(4),
    fheq.Rounding(5),
    fheq.Rounding(6),
)
SAMPLES = 200


@dataclass(frozen=True)
class Case:
    """A circuit to be."""

    name: str
    model: ModelProto
    shape: tuple[int, ...]
    n_bits: int
    rounding: fheq.Rounding | None
    output_rounding: fheq.Rounding | None
    p_error: float

    def program(self) -> fheq.IntProgram:
        """Quantized on random data."""
        graph = fheq.import_onnx(self.model)
        x = np.random.default_rng(1).normal(size=(SAMPLES, *self.shape)).astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stats = fheq.calibrate(graph, x)
            spec = fheq.Spec(self.n_bits, rounding=self.rounding, output_rounding=self.output_rounding)
            return fheq.lower(graph, fheq.fit(graph, stats, spec))


def mlp(rng: np.random.Generator, widths: tuple[int, ...], residual: bool = False, rows: tuple[int, ...] = ()) -> ModelProto:
    """Dense layers with ReLU on `(N, *rows, widths[0])`; `residual` adds each hidden layer's input where widths agree."""
    nodes, known, x = [], [], "x"
    for i, (a, b) in enumerate(pairwise(widths)):
        known.append(numpy_helper.from_array(rng.normal(size=(a, b)).astype(np.float32) / np.float32(np.sqrt(a)), f"w{i}"))
        nodes.append(helper.make_node("MatMul", [x, f"w{i}"], [f"m{i}"]))
        if i == len(widths) - 2:
            nodes[-1].output[0] = "y"
            break
        nodes.append(helper.make_node("Relu", [f"m{i}"], [f"r{i}"]))
        if residual and a == b and i:
            nodes.append(helper.make_node("Add", [f"r{i}", x], [f"a{i}"]))
        x = nodes[-1].output[0]
    return _model(nodes, known, ("N", *rows, widths[0]))


def cnn(rng: np.random.Generator, channels: int, pool: str) -> ModelProto:
    """A convolution, a pooling and a dense layer on 6x6 images."""
    kernel = rng.normal(size=(channels, 1, 3, 3)).astype(np.float32) / np.float32(3)
    dense = rng.normal(size=(channels * 4, 3)).astype(np.float32) / np.float32(np.sqrt(channels * 4))
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node(pool, ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "d"], ["y"]),
    ]
    return _model(nodes, [numpy_helper.from_array(kernel, "k"), numpy_helper.from_array(dense, "d")], ("N", 1, 6, 6))


def _model(nodes: list, known: list, shape: tuple) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        known,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    """Random networks, bits, roundings and error probabilities."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        kind = ("mlp", "mlp", "deep", "residual", "average", "max")[i % 6]
        bits = int(rng.integers(2, 9))
        rounding = ROUNDINGS[int(rng.integers(len(ROUNDINGS)))]
        outputs = rounding if rounding is not None and rounding.approximate and rng.random() < 0.5 else None
        shape: tuple[int, ...]
        if kind in ("average", "max"):
            model, shape = cnn(rng, int(rng.integers(1, 4)), {"average": "AveragePool", "max": "MaxPool"}[kind]), (1, 6, 6)
        elif kind == "residual":
            width = int(rng.integers(3, 8))
            model, shape = mlp(rng, (4, width, width, 3), residual=True), (4,)
        else:
            depth = 6 if kind == "deep" else int(rng.integers(2, 4))
            widths = tuple(int(2 ** rng.uniform(1.5, 4 if kind == "deep" else 6)) for _ in range(depth + 1))
            model, shape = mlp(rng, widths), widths[:1]
        yield Case(f"{i:02d} {kind}", model, shape, bits, rounding, outputs, P_ERRORS[int(rng.integers(len(P_ERRORS)))])


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, ties in order of appearance."""
    return np.argsort(np.argsort(values, kind="stable"), kind="stable")


@dataclass(frozen=True)
class Comparison:
    """A case's complexities, whether its bootstraps are as many as predicted, and the seconds of a prediction."""

    case: Case
    predicted: float
    compiled: float
    agrees: bool
    seconds: float

    @property
    def rounding(self) -> str:
        """As labels have it."""
        rounding = self.case.rounding
        return "no rounding" if rounding is None else "approximate rounding" if rounding.approximate else "exact rounding"


def compare(case: Case) -> Comparison | None:
    """Predicts and compiles a case, and prints both; None if it cannot be compiled."""
    program = case.program()
    cost(program, p_error=case.p_error)
    cached_search.cache_clear()
    start = time.process_time()
    report = cost(program, p_error=case.p_error)
    seconds = time.process_time() - start
    rounding = f"{case.rounding.n_bits}{'~' if case.rounding.approximate else '='}" if case.rounding else "-"
    outputs = "outputs too" if case.output_rounding else ""
    head = f"{case.name:12s} bits {case.n_bits} rounding {rounding:2s} {outputs:11s} p {case.p_error:7.1e}"
    head = f"{head} widest {report.max_bits:2d}"
    try:
        circuit = fheq.compile(program, p_error=case.p_error)
    except fheq.FheqError as error:
        print(f"{head} predicted {report.complexity / 1e6:11,.1f} M, not compiled: {str(error)[-60:]}", flush=True)
        return None
    print(
        f"{head} predicted {report.complexity / 1e6:11,.1f} M, compiled {circuit.complexity / 1e6:11,.1f} M, "
        f"ratio {report.complexity / circuit.complexity:.4f}, {seconds * 1e3:4.0f} ms",
        flush=True,
    )
    return Comparison(case, report.complexity, circuit.complexity, report.bootstraps == circuit.bootstraps, seconds)


def plot(found: list[Comparison], path: str) -> None:
    """Predicted against compiled complexities, by rounding and error probability."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 5), layout="constrained")
    ends = [f(c.compiled for c in found) for f in (min, max)]
    axes.plot(ends, ends, color="0.7", linewidth=1, zorder=0, label="equal")
    for rounding, marker in (("no rounding", "s"), ("exact rounding", "^"), ("approximate rounding", "o")):
        chosen = [c for c in found if c.rounding == rounding]
        points = axes.scatter(
            [c.compiled for c in chosen],
            [c.predicted for c in chosen],
            c=[-np.log10(c.case.p_error) for c in chosen],
            vmin=-np.log10(max(P_ERRORS)),
            vmax=-np.log10(min(P_ERRORS)),
            marker=marker,
            s=24,
            label=f"{rounding} ({len(chosen)})",
        )
    figure.colorbar(points, label="-log10 p_error")
    axes.set(xscale="log", yscale="log", xlabel="complexity of the compiled circuit", ylabel="predicted by fheq.cost")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="where to save a figure (svg, png)")
    options = parser.parse_args()
    found = [c for c in map(compare, cases(options.count, options.seed)) if c is not None]
    predicted, compiled = (np.array([getattr(c, name) for c in found]) for name in ("predicted", "compiled"))
    error, seconds, agree = np.abs(predicted / compiled - 1), [c.seconds for c in found], sum(c.agrees for c in found)
    correlation = np.corrcoef(ranks(predicted), ranks(compiled))[0, 1]
    print(
        f"{len(found)} circuits: error median {np.median(error):.2%}, 95th percentile {np.quantile(error, 0.95):.2%}, "
        f"largest {error.max():.2%}; rank correlation {correlation:.4f}; bootstraps agree in {agree}; "
        f"prediction median {np.median(seconds) * 1e3:.0f} ms, largest {np.max(seconds) * 1e3:.0f} ms"
    )
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
