"""`rounding_threshold_bits`: its rules, and the search behind "auto"."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
from jax.experimental import enable_x64

from fheq.batching import check_arrays, join
from fheq.evaluate import named
from fheq.fake_quant import fake_quant
from fheq.fit import fit
from fheq.graph import Graph, Port, is_float
from fheq.lower import lower
from fheq.observing.statistics import Stats
from fheq.program import IntProgram
from fheq.qparams import QParams
from fheq.simulate import simulate
from fheq.spec import BitsError, Rounding, Spec

FEWEST, MOST = 2, 8
METHODS = ("EXACT", "APPROXIMATE")
DEFAULT_TOLERANCE = 0.01
CHUNK = 256  # samples evaluated together
SCREEN = 1.1  # candidates beyond so many tolerances in floating point are not simulated

Outputs = list[np.ndarray]


class RoundingWarning(UserWarning):
    """No rounding keeps the outputs within the tolerance."""


@dataclass(frozen=True)
class AutoRounding:
    """`"auto"`: the smallest number of bits that the tolerance allows.

    Args:
        approximate: as in `Rounding`.
    """

    approximate: bool = False


def as_rounding(value: Any) -> Rounding | AutoRounding | None:
    """What a `rounding_threshold_bits` argument asks for.

    Args:
        value: None, an int from 2 to 8 (rounded exactly), or a mapping with "n_bits" (such an int, or "auto") and perhaps
            "method" ("EXACT", the default, or "APPROXIMATE", or concrete's `fhe.Exactness`). A `Rounding` stays as it is.

    Raises:
        BitsError: (a ValueError) anything else, with what is wrong.
    """
    if value is None or isinstance(value, Rounding | AutoRounding):
        return value
    if not isinstance(value, Mapping):
        return Rounding(_bits(value, "rounding_threshold_bits"))
    unknown = [key for key in value if key not in ("n_bits", "method")]
    if unknown:
        raise BitsError(f"rounding_threshold_bits has unknown keys {unknown}; it takes 'n_bits' and 'method'")
    if "n_bits" not in value:
        raise BitsError(f"rounding_threshold_bits lacks the key 'n_bits' (an integer from {FEWEST} to {MOST}, or 'auto')")
    approximate = _method(value.get("method", "EXACT")) == "APPROXIMATE"
    if isinstance(value["n_bits"], str) and value["n_bits"] == "auto":
        return AutoRounding(approximate)
    return Rounding(_bits(value["n_bits"], "rounding_threshold_bits['n_bits']", " or 'auto'"), approximate)


def _bits(value: Any, what: str, alternative: str = "") -> int:
    whole = isinstance(value, Integral) and not isinstance(value, bool | np.bool_)
    if not whole or not FEWEST <= value <= MOST:
        raise BitsError(f"{what} must be an integer from {FEWEST} to {MOST}{alternative}, got {value!r}")
    return int(value)


def _method(value: Any) -> str:
    """The name of a method; concrete's enum is known by its name, so that concrete need not be loaded."""
    name = value.name if type(value).__name__ == "Exactness" and hasattr(value, "name") else value
    if not isinstance(name, str) or name not in METHODS:
        raise BitsError(f"rounding_threshold_bits['method'] must be 'EXACT', 'APPROXIMATE' or fhe.Exactness, got {value!r}")
    return name


def smallest_rounding(
    graph: Graph,
    stats: Stats,
    spec: Spec,
    qparams: QParams,
    inputs: Sequence[Any],
    approximate: bool,
    tolerance: float,
) -> tuple[QParams, Rounding | None]:
    """The smallest rounding of accumulators that keeps every output within `tolerance` of the unrounded one.

    Candidates are screened with `fake_quant`, which nothing recompiles, and the one that is chosen is confirmed by exact
    simulation of its integer program.

    Args:
        qparams: fitted without rounding.
        inputs: the data to compare on, as for `evaluate`.
        tolerance: see `distance`.

    Returns:
        The quantizers fitted for the rounding, and the rounding; the quantizers as given and None, with a
        `RoundingWarning`, where even 8 bits are too few.
    """
    chunks = _chunks(graph, inputs)
    with enable_x64():
        unrounded = _faked(graph, qparams, chunks)
        for bits in range(FEWEST, MOST + 1):
            rounding = Rounding(bits, approximate)
            candidate = fit(graph, stats, replace(spec, rounding=rounding))
            if distance(graph.outputs, unrounded, _faked(graph, candidate, chunks)) > SCREEN * tolerance:
                continue
            if distance(graph.outputs, unrounded, _simulated(lower(graph, candidate), chunks)) <= tolerance:
                return candidate, rounding
    warnings.warn(
        f"no rounding to {FEWEST} .. {MOST} bits keeps the outputs within {tolerance:g} of the unrounded ones: accumulators "
        "keep all their bits; raise rounding_tolerance, or n_bits",
        RoundingWarning,
        stacklevel=3,
    )
    return qparams, None


def distance(ports: Sequence[Port], wanted: Outputs, got: Outputs) -> float:
    """`1 - R2` of `got` against `wanted`, of the worst output: squared error over the variance across samples.

    An output that is the same for all samples is measured against its square; labels count by the share that differs.
    """
    worst = 0.0
    for port, y, z in zip(ports, wanted, got):
        if not is_float(y.dtype) and not is_float(z.dtype):
            worst = max(worst, float(np.mean(y != z)))
            continue
        axis = port.batch_axis or 0
        y = np.asarray(y, np.float64)
        error = float(np.sum((z - y) ** 2))
        spread = float(np.sum((y - np.mean(y, axis=axis, keepdims=True)) ** 2))
        spread = spread if spread > 1e-12 * float(np.sum(y**2)) else float(np.sum(y**2))
        worst = max(worst, error / spread if spread else float(error > 0))
    return worst


def _chunks(graph: Graph, inputs: Sequence[Any]) -> list[list[np.ndarray]]:
    """The data in equal chunks, in the model's layout; the last one is filled with repeated samples."""
    parts = check_arrays(graph.inputs, inputs)
    count = len(parts[0])
    size = min(count, CHUNK)
    chunks = []
    for start in range(0, count, size):
        at = np.minimum(np.arange(start, start + size), count - 1)
        chunks.append([join(port, part[at]) for port, part in zip(graph.inputs, parts)])
    return chunks


def _joined(ports: Sequence[Port], results: list[Any]) -> Outputs:
    columns = zip(*(r if isinstance(r, tuple) else (r,) for r in results))
    return [
        np.concatenate([_measured(v) for v in column], axis=port.batch_axis or 0) for port, column in zip(ports, columns)
    ]


def _measured(values: Any) -> np.ndarray:
    """Values in float64, labels as they are."""
    values = np.asarray(values)
    return values.astype(np.float64) if is_float(values.dtype) else values


def _faked(graph: Graph, qparams: QParams, chunks: list[list[np.ndarray]]) -> Outputs:
    exact = {name: replace(affine, rounding="exact") for name, affine in qparams.accumulators.items()}
    qparams = replace(qparams, accumulators=exact)  # the mode changes no value here, but would recompile
    results = [fake_quant(graph, qparams, *chunk) for chunk in chunks]
    named_results = [tuple(named(graph, list(r) if isinstance(r, tuple) else [r])) for r in results]
    return _joined(graph.outputs, named_results)


def _simulated(program: IntProgram, chunks: list[list[np.ndarray]]) -> Outputs:
    results = []
    for chunk in chunks:
        q = simulate(program, *program.quantize(*chunk))
        results.append(program.dequantize(*(q if isinstance(q, tuple) else (q,))))
    return _joined(program.results, results)
