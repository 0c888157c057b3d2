"""What each quantizer costs: where, between the float model and the quantized one, the signal is lost.

A quantizer is switched off by steps so fine and a range so wide that it changes nothing. Stages and single quantizers are
then configurations like any other, and one sweep scores them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq import scores as score_functions
from fheq.affine import Affine
from fheq.arguments import check_chances
from fheq.display.console import number, shorten, text_table
from fheq.encryption.noise import DEFAULT_P_ERROR
from fheq.encryption.table_noise import TableNoise, table_noise, tabulated
from fheq.evaluate import unwrap
from fheq.graph import Graph
from fheq.integers.accumulator_decoders import accumulator_scale, summands, sums_accumulators
from fheq.planning.plan import Plan
from fheq.planning.quantizers import plan_for
from fheq.qparams import QParams
from fheq.scores import Measure, Score, as_score
from fheq.steps import Add, Linear, Step, makes_accumulator
from fheq.sweep import BATCH, CHUNK, sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = Any
STAGES = ("activations", "weights", "rounding", "tables")
PARTS = ("tensors", "weights", "accumulators", "tables")  # of `QParams`, in the order of the stages, and the tables' noise
FINER = 2.0**-24  # below the resolution of float32
WIDE = 2.0**60


def off(affine: Affine) -> Affine:
    """A quantizer that changes nothing in float32."""
    wide = jnp.full_like(affine.qmax, WIDE)
    zero = jnp.zeros_like(affine.zero_point)
    return replace(
        affine, scale=affine.scale * FINER, zero_point=zero, qmin=-wide, qmax=wide, lsbs=jnp.zeros_like(affine.lsbs)
    )


def switch(layout: Plan, qparams: QParams, on: Mapping[str, Mapping[str, Array]]) -> QParams:
    """Switches quantizers off where `on` says so; a pure function, for `jax.vmap` over `on`.

    Args:
        layout: `plan(graph)`.
        on: by part of `QParams` and name, whether the quantizer stays; for an accumulator, whether it is rounded.
    """

    def choose(part: str, name: str) -> Affine:
        affine = getattr(qparams, part)[name]
        return jax.tree.map(lambda a, b: jnp.where(on[part][name], a, b), affine, off(affine))

    switched = replace(
        qparams,
        tensors={name: choose("tensors", name) for name in qparams.tensors},
        weights={name: choose("weights", name) for name in qparams.weights},
    )
    for step in layout.steps:
        if makes_accumulator(step):
            affine = qparams.accumulators[step.out]
            if isinstance(step, Add) and sums_accumulators(layout, step):  # its unit is to be as fine as what it adds up
                operands = zip(summands(layout, switched, step), summands(layout, qparams, step))
                affine = replace(
                    affine, scale=affine.scale * jnp.minimum(*(jnp.min(x.scale / y.scale) for x, y in operands))
                )
            switched = _with_accumulator(switched, step, affine)
            # its integers are finer where what it reads is: as much of it is rounded away
            before, after = (jnp.max(jnp.abs(accumulator_scale(layout, q, step))) for q in (qparams, switched))
            lsbs = jnp.where(on["accumulators"][step.out] & (affine.lsbs > 0), affine.lsbs + jnp.log2(before / after), 0.0)
            switched = _with_accumulator(switched, step, replace(affine, lsbs=lsbs))
    return switched


def _with_accumulator(qparams: QParams, step: Step, affine: Affine) -> QParams:
    return replace(qparams, accumulators={**qparams.accumulators, step.out: affine})


@dataclass(frozen=True)
class Attribution:
    """What each quantizer costs.

    Args:
        names: the tensors that are quantized or that linear steps make, in the order of the graph, R of them.
        alone: `(R, 4)` noise at the outputs, as a share of their power, when a single quantizer is on: that of the tensor,
            that of the weight that makes it, the rounding of its accumulator, the misses of the tables that read it; NaN
            where there is none.
        snr: `(R, 4)` signal-to-noise ratio of the tensor in dB when all activations are quantized, then weights as well,
            then accumulators rounded as well, then with tables that miss.
        outputs: `(4,)` the same of the model's outputs.
        scores: by name, what the given scores say of the outputs: of the float model, then of the four stages.
    """

    names: tuple[str, ...]
    alone: np.ndarray
    snr: np.ndarray
    outputs: np.ndarray
    scores: dict[str, np.ndarray]

    def __str__(self) -> str:
        cell = lambda v: "-" if np.isnan(v) else number(float(v))
        percent = lambda v: "-" if np.isnan(v) else f"{100 * v:.3g}%"
        head = ("tensor", *(f"{s} alone" for s in STAGES), STAGES[0], *(f"+ {s}" for s in STAGES[1:]))
        rows = [[shorten(n), *map(percent, a), *map(cell, s)] for n, a, s in zip(self.names, self.alone, self.snr)]
        rows.append(["outputs", *["-"] * len(STAGES), *map(cell, self.outputs)])
        text = [
            "alone: noise at the outputs when only this is quantized, as a share of their power.",
            "Then: signal to noise of the tensor in dB, one stage after the other.",
            text_table(head, rows),
        ]
        if self.scores:
            rows = [[name, *(number(float(v)) for v in values)] for name, values in self.scores.items()]
            text.append(text_table(("score", "float", STAGES[0], *(f"+ {s}" for s in STAGES[1:])), rows))
        return "\n".join(text)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bars of `alone`, one per tensor and part. Needs matplotlib (`pip install fheq[plot]`)."""
        from matplotlib import pyplot

        ax = ax or pyplot.subplots(figsize=(7, 1 + 0.25 * len(self.names)))[1]
        left = np.zeros(len(self.names))
        for stage, share in zip(STAGES, np.nan_to_num(self.alone).T):
            ax.barh(range(len(self.names)), 100 * share, left=left, label=stage)
            left = left + 100 * share
        ax.set_yticks(range(len(self.names)), [shorten(name) for name in self.names])
        ax.invert_yaxis()
        ax.set_xlabel("noise at the outputs when quantized alone, % of their power")
        ax.legend()
        return ax


def attribute(
    graph: Graph,
    qparams: QParams,
    *inputs: Array,
    scores: Mapping[str, Score | Measure] | None = None,
    targets: Any = None,
    p_error: float = DEFAULT_P_ERROR,
    chunk: int = CHUNK,
    batch_size: int = BATCH,
) -> Attribution:
    """What each quantizer costs, from one sweep with quantizers switched off.

    Args:
        qparams: what `fit` gives.
        inputs: as for `evaluate`.
        scores: as for `sweep`, of the outputs at each stage.
        targets: as for `sweep`.
        p_error: probability that a lookup misses (see `fheq.table_noise`).
        chunk, batch_size: as for `sweep`.

    Raises:
        DataError: as `sweep` does.
        ArgumentError: (a ValueError) p_error is outside of [0, 1].
        QuantizationError: these are another graph's quantizers.
    """
    check_chances(p_error)
    layout = plan_for(graph, qparams)
    tables = [step.out for step in tabulated(layout)]
    names, owners = _owners(layout, qparams, tables)
    qparams = jax.tree.map(jnp.asarray, qparams)
    configurations = _configurations(qparams, owners, tables)

    def noise(on: Mapping[str, Array]) -> TableNoise:
        return table_noise(graph, qparams, {name: jnp.where(yes, p_error, 0.0) for name, yes in on.items()})

    ports = [port.name for port in layout.graph.outputs]
    shown = tuple(dict.fromkeys([*names, *ports]))
    measures = {name: _of_outputs(as_score(score), ports) for name, score in (scores or {}).items()}
    result = sweep(
        graph,
        jax.vmap(lambda on: switch(layout, qparams, on))(configurations),
        *inputs,
        scores={"noise": score_functions.noise_to_signal, **{f"score {n}": s for n, s in measures.items()}},
        targets=targets,
        tensors=shown,
        noise=jax.vmap(noise)(configurations["tables"]) if tables else None,
        chunk=chunk,
        batch_size=batch_size,
    ).scores
    lost = {name: np.asarray(v, np.float64) for name, v in result["noise"].items()}
    at_outputs = np.mean([lost[port] for port in ports], axis=0)
    alone = np.full((len(names), len(STAGES)), np.nan)
    for i, (row, stage, _) in enumerate(owners):
        alone[row, stage] = at_outputs[len(STAGES) + 1 + i]
    stages = slice(1, len(STAGES) + 1)
    decibels = lambda v: -10 * np.log10(np.maximum(v, 1e-30))
    found = {name: np.asarray(result[f"score {name}"])[: stages.stop] for name in measures}
    snr = np.array([decibels(lost[name][stages]) for name in names])
    return Attribution(names, alone, snr, decibels(at_outputs[stages]), found)


def _owners(layout: Plan, qparams: QParams, tables: Sequence[str]) -> tuple[tuple[str, ...], list[tuple[int, int, str]]]:
    """The rows of an attribution, and for every quantizer its row, its stage and its name in its part of `qparams`."""
    order = {name: i for i, name in enumerate([*layout.inputs, *(o for n in layout.graph.nodes for o in n.outputs)])}
    weights = {step.out: step.weight_name for step in layout.steps if isinstance(step, Linear)}
    names = tuple(sorted({*qparams.tensors, *weights, *qparams.accumulators}, key=order.__getitem__))
    owners = []
    for row, name in enumerate(names):
        if name in qparams.tensors:
            owners.append((row, 0, name))
        if name in weights:
            owners.append((row, 1, weights[name]))
        if name in qparams.accumulators and np.any(np.asarray(qparams.accumulators[name].lsbs)):
            owners.append((row, 2, name))
        if name in tables:
            owners.append((row, 3, name))
    return names, owners


def _configurations(
    qparams: QParams, owners: list[tuple[int, int, str]], tables: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    """What is on: nothing, then the stages one after the other, then each quantizer alone."""
    first = len(STAGES) + 1
    known = {part: tables if part == "tables" else getattr(qparams, part) for part in PARTS}
    on = {part: {name: np.zeros(first + len(owners), bool) for name in names} for part, names in known.items()}
    for stage, part in enumerate(PARTS):
        for name in on[part]:
            on[part][name][stage + 1 : first] = True
    for i, (_, stage, name) in enumerate(owners):
        on[PARTS[stage]][name][first + i] = True
    return on


def _of_outputs(score: Score, ports: list[str]) -> Score:
    """A score of the outputs as one of tensors by name."""
    pick = lambda values: unwrap([values[port] for port in ports])
    return score.of(lambda y, exact, target: (pick(y), pick(exact), target))
