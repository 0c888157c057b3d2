"""The demo: a small network classifies encrypted images of digits. Behind `fheq demo`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import comb
from typing import Any, TextIO

import numpy as np

from fheq.calibrate import calibrate
from fheq.circuit import Circuit
from fheq.circuit import compile as compile_
from fheq.digits import load, pick, picture, shades_for
from fheq.display.console import show_table, working
from fheq.display.progress import track
from fheq.evaluate import evaluate
from fheq.fit import fit
from fheq.graph import Graph
from fheq.lower import lower
from fheq.program import IntProgram
from fheq.simulate import simulate
from fheq.spec import Rounding, Spec

SPEC = Spec(n_bits=5, rounding=Rounding(5, approximate=True))
P_ERROR = 1e-3
SAMPLES = 10
NOISY = 100  # test images for concrete's simulation, which adds the noise of encrypted runs
SURE = 1e-3  # probability that a sound run fails the check of agreement


@dataclass(frozen=True)
class Prediction:
    """What was made of one image."""

    image: int
    label: int
    in_float: int
    simulated: int
    encrypted: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What a demo found.

    Args:
        predictions: of the encrypted images.
        accuracy: on test images: "float" and "simulated" (all of them), "noisy" (some, with the noise of encrypted runs).
        noisy_agreement: share of the noisy predictions that equal the simulated ones: what to expect of encrypted ones.
        needed: number of encrypted predictions that must equal the simulated ones.
        seconds: by step.
    """

    predictions: tuple[Prediction, ...]
    accuracy: dict[str, float]
    noisy_agreement: float
    needed: int
    seconds: dict[str, float]

    @property
    def agree(self) -> int:
        """Number of encrypted predictions that equal the simulated ones."""
        return sum(p.encrypted == p.simulated for p in self.predictions)

    @property
    def ok(self) -> bool:
        """Whether encrypted runs agree with simulation as far as the noise allows."""
        return self.agree >= self.needed


@dataclass(frozen=True)
class Show:
    """Where a demo says what it does.

    Args:
        out: stream for the text; None for no text.
        progress: as for `fheq.display.progress.track`.
        seconds: filled with the time of each step.
    """

    out: TextIO | None
    progress: bool | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def say(self, text: object = "") -> None:
        """Prints a text; where output and bars share a terminal, rich moves the bar out of its way."""
        if self.out is not None:
            print(text, file=None if self.out.isatty() else self.out, flush=True)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table."""
        if self.out is not None:
            show_table(title, header, rows)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times a step under a spinner."""
        start = time.perf_counter()
        with working(name, self.progress):
            yield
        self.seconds[name] = time.perf_counter() - start


def needed(samples: int, rate: float) -> int:
    """The least number of agreements, at least 1, that a sound run with this rate reaches but with probability `SURE`."""
    below = 0.0
    for k in range(samples + 1):
        below += comb(samples, k) * rate**k * (1 - rate) ** (samples - k)
        if below >= SURE:
            return max(k, 1)
    return samples


def predict(scores: Any) -> np.ndarray:
    """The digit with the highest score, of each image."""
    return np.asarray(scores).argmax(axis=1)


def demo(samples: int = SAMPLES, show: Show | None = None) -> Outcome:
    """Quantizes the shipped classifier, compiles it and classifies encrypted test images.

    Args:
        samples: images to encrypt.
        show: where to say what happens; nowhere by default.
    """
    show = show or Show(None, False)
    with show.step("load the model"):
        graph, data = load()
        float_predictions = predict(evaluate(graph, data["x_test"]))
    labels = data["y_test"]
    accuracy = {"float": float(np.mean(float_predictions == labels))}
    show.say(f"Digits classifier: {accuracy['float']:.1%} of {len(labels)} test images right in float.")
    program, simulated = _quantized(show, graph, data)
    accuracy["simulated"] = float(np.mean(simulated == labels))
    show.say(f"Quantized: {accuracy['simulated']:.1%} right, simulated without encryption.\n")
    circuit = _compiled(show, program)
    some = data["x_test"][:NOISY]
    with show.step("simulate noise"):
        noisy = predict(circuit.simulate(some))
    accuracy["noisy"] = float(np.mean(noisy == labels[:NOISY]))
    same = int(np.sum(noisy == simulated[:NOISY]))
    rate = (same + 1) / (len(noisy) + 2)  # so that 100 of 100 is not taken for certainty
    with show.step("make keys"):
        circuit.keygen()
    show.say(_sizes(circuit))
    clear = {"label": labels, "in_float": float_predictions, "simulated": simulated}
    predictions = _encrypted(show, circuit, data["x_test"], clear, pick(labels, samples))
    return Outcome(predictions, accuracy, same / len(noisy), needed(len(predictions), rate), dict(show.seconds))


def _quantized(show: Show, graph: Graph, data: dict[str, np.ndarray]) -> tuple[IntProgram, np.ndarray]:
    from fheq.cost import cost

    with show.step("calibrate"):
        stats = calibrate(graph, data["x_train"])
    with show.step("fit and lower"):
        program = lower(graph, fit(graph, stats, SPEC))
    with show.step("simulate"):
        outputs = simulate(program, *program.quantize(data["x_test"]))
        simulated = predict(program.dequantize(np.asarray(outputs))[0])
    with show.step("predict the cost"):
        report = cost(program, p_error=P_ERROR)
    show.say(f"\n{report}\n")
    return program, simulated


def _compiled(show: Show, program: IntProgram) -> Circuit:
    with show.step("compile"):
        return compile_(program, p_error=P_ERROR)


def _sizes(circuit: Circuit) -> str:
    keys = circuit.concrete.size_of_bootstrap_keys + circuit.concrete.size_of_keyswitch_keys
    return (
        f"Compiled: {circuit.bootstraps} bootstraps, {circuit.complexity / 1e6:,.0f} M operations per image; "
        f"evaluation keys {keys / 1e6:,.0f} MB, an encrypted image {circuit.concrete.size_of_inputs / 1e6:.1f} MB.\n"
    )


def _encrypted(
    show: Show, circuit: Circuit, images: np.ndarray, clear: dict[str, np.ndarray], chosen: list[int]
) -> tuple[Prediction, ...]:
    """Classifies encrypted images, showing each as soon as it is decrypted."""
    shades = shades_for(getattr(show.out, "encoding", None))
    predictions = []
    start = time.perf_counter()
    for i in track(chosen, "classifying encrypted images", show.progress):
        begin = time.perf_counter()
        scores = circuit.decrypt(circuit.run(circuit.encrypt(images[i : i + 1]), progress=False))
        seconds = time.perf_counter() - begin
        known = {name: int(values[i]) for name, values in clear.items()}
        prediction = Prediction(i, **known, encrypted=int(predict(scores)[0]), seconds=seconds)
        predictions.append(prediction)
        show.say(_beside(picture(images[i], shades), prediction))
    show.seconds[f"classify {len(chosen)} encrypted"] = time.perf_counter() - start
    return tuple(predictions)


def _beside(lines: list[str], p: Prediction) -> str:
    verdict = "agrees with simulation" if p.encrypted == p.simulated else "differs from simulation"
    notes = ["", f"label       {p.label}", f"float       {p.in_float}", f"simulated   {p.simulated}"]
    notes += [f"encrypted   {p.encrypted}   {verdict}", "", f"{p.seconds:.1f} s", ""]
    return "\n".join(f"  {line}   {note}".rstrip() for line, note in zip(lines, notes, strict=True)) + "\n"


def summarize(show: Show, outcome: Outcome) -> None:
    """Says how accurate every kind of run was, what took how long, and whether all is well."""
    count = len(outcome.predictions)
    right = sum(p.encrypted == p.label for p in outcome.predictions)
    rows = [["float model", "all", f"{outcome.accuracy['float']:.1%}"]]
    rows += [["quantized, simulated", "all", f"{outcome.accuracy['simulated']:.1%}"]]
    rows += [["quantized, simulated with noise", f"first {NOISY}", f"{outcome.accuracy['noisy']:.1%}"]]
    rows += [["quantized, encrypted", str(count), f"{right / count:.1%}"]]
    show.table("Accuracy", ("run", "test images", "right"), rows)
    times = [[name, f"{seconds:.1f}"] for name, seconds in outcome.seconds.items()]
    times.append(["in all", f"{sum(outcome.seconds.values()):.1f}"])
    show.table("Time", ("step", "seconds"), times)
    show.say(f"{outcome.agree} of {count} encrypted predictions equal the simulated ones: {_verdict(outcome)}")


def _verdict(outcome: Outcome) -> str:
    expected = f"{outcome.noisy_agreement:.0%} are expected at p_error {P_ERROR:g} with approximate rounding"
    if outcome.ok:
        return f"all is well ({expected})."
    return f"too few, {outcome.needed} should ({expected})."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Args:
        argv: arguments, those of the process by default: `--samples N`, `--json`, `--no-progress`.

    Returns:
        0 if the encrypted predictions agree with simulation as far as p_error allows, else 1.
    """
    args = _parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    quiet = args.json or args.no_progress
    show = Show(None if args.json else sys.stdout, False if quiet else None)
    outcome = demo(args.samples, show)
    summarize(show, outcome)
    if args.json:
        print(json.dumps({**asdict(outcome), "agree": outcome.agree, "ok": outcome.ok}, indent=1))
    return 0 if outcome.ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fheq demo", description="Classify encrypted images of digits.")
    parser.add_argument("--samples", type=_count, default=SAMPLES, metavar="N", help=f"images to encrypt ({SAMPLES})")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be an integer of at least 1")
    return int(text)
