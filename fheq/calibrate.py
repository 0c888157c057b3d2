"""Calibration: one jitted reduction over the data, with no bit-width in it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import enable_x64
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fheq.batching import check_arrays
from fheq.errors import DataError
from fheq.granularity import channel_axis
from fheq.graph import Graph
from fheq.interpret import interpret
from fheq.observers import TensorStats, init, merge, merge_over, update
from fheq.plan import Plan, plan
from fheq.regions import is_boolean
from fheq.sharding import DATA, gather, local_mesh, size
from fheq.steps import counts_decisions

Stats = Mapping[str, TensorStats]

BATCH = 32  # samples per scan step
BLOCK = 8  # scan steps per call
FEW_SAMPLES = 50


class CalibrationWarning(UserWarning):
    """The calibration data look inadequate."""


def calibrate(
    graph: Graph,
    *inputs: Any,
    batches: Iterable[Any] | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    mesh: Mesh | None = None,
) -> dict[str, TensorStats]:
    """Statistics of every tensor that quantization needs, by tensor name.

    Memory is constant however much data streams through; the order of the samples and their division into batches change
    nothing but the last digits of the moments.

    Args:
        inputs: one array per model input, as for `evaluate`.
        batches: instead of `inputs`, an iterable of such arrays (tuples where the model has several inputs).
        batch_size: samples evaluated together; 32 by default.
        progress: whether to show a progress bar for `batches`; by default when standard error is a terminal.
        mesh: devices that share the work, with an axis "data". In several processes each gives its own samples, and all get
            the statistics of all (see `fheq.sharding`).

    Raises:
        DataError: no data, NaN or infinity, a wrong shape or dtype; the message names the input.
    """
    if (batches is None) == (not inputs):
        raise DataError("give calibration data either as arrays or as batches=")
    if batch_size is not None and batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}")
    chunks = [inputs] if batches is None else _as_tuples(batches, progress)
    local = local_mesh(mesh)
    width = (batch_size or BATCH) * BLOCK * size(local, (DATA,))
    layout = plan(graph)
    total: dict[str, TensorStats] | None = None
    count = 0
    for block in _blocks(graph, chunks, width):
        n = len(block[0])
        count += n
        padded = [_pad(part, width).reshape(BLOCK, -1, *part.shape[1:]) for part in block]
        keep = (np.arange(width) < n).reshape(BLOCK, -1)
        with enable_x64():
            found = _reduce(graph, local, tuple(padded), keep)
        found = jax.tree.map(np.asarray, found)
        total = found if total is None else {name: merge(total[name], found[name]) for name in total}
    if total is None:
        raise DataError("the calibration data hold no samples")
    for i, other in enumerate(gather(mesh, (total, count))):
        if i == 0:
            total, count = other
        else:
            total, count = {name: merge(total[name], other[0][name]) for name in total}, count + other[1]
    _warn(layout, total, int(count))
    return total


def observed(layout: Plan) -> tuple[str, ...]:
    """The tensors whose statistics quantization needs: inputs, points and the results of steps.

    Not those whose ranges are known: decisions, and sums of them.
    """
    points = [name for name in layout.points if not is_boolean(layout.graph, name)]
    steps = [step.out for step in layout.steps if not counts_decisions(step)]
    return tuple(dict.fromkeys([*layout.inputs, *points, *steps]))


def by_channel(layout: Plan, name: str, values: Any) -> Any:
    """Values `(B, *shape)` to `(B, C, n)`."""
    axis = channel_axis(layout, name)
    if axis is None:
        return values.reshape(values.shape[0], 1, -1)
    moved = jnp.moveaxis(values, axis + values.ndim, 1)
    return moved.reshape(*moved.shape[:2], -1)


@partial(jax.jit, static_argnums=(0, 1))
def _reduce(graph: Graph, mesh: Mesh | None, data: tuple[Any, ...], keep: Any) -> dict[str, TensorStats]:
    if mesh is None:
        return _reduce_part(graph, data, keep)

    def part(data: tuple[Any, ...], keep: Any) -> dict[str, TensorStats]:
        found = _reduce_part(graph, data, keep)
        return {name: merge_over(stats, DATA) for name, stats in found.items()}

    shard = P(None, DATA)
    return jax.shard_map(part, mesh=mesh, in_specs=(shard, shard), out_specs=P(), check_vma=False)(data, keep)


def _reduce_part(graph: Graph, data: tuple[Any, ...], keep: Any) -> dict[str, TensorStats]:
    layout = plan(graph)
    names = observed(layout)

    def values(*sample: Any) -> tuple[Any, ...]:
        env = dict(zip(layout.inputs, sample))
        found = interpret(wide(layout.graph), {n: widened(v) for n, v in env.items()}, targets=names)
        return tuple(found[name].astype(jnp.float32) for name in names)

    def body(stats: dict[str, TensorStats], batch: tuple[tuple[Any, ...], Any]) -> tuple[dict[str, TensorStats], None]:
        parts, mask = batch
        found = jax.vmap(values)(*parts)
        new = {name: update(stats[name], by_channel(layout, name, v), mask) for name, v in zip(names, found)}
        return new, None

    start = {name: jax.tree.map(jnp.asarray, init(_channels(layout, name))) for name in names}
    return jax.lax.scan(body, start, (data, keep))[0]


@lru_cache(maxsize=32)
def wide(graph: Graph) -> Graph:
    """The graph in float64: observed in float32, its values do not depend on how samples are batched."""
    constants = {n: v.astype(np.float64) if v.dtype == np.float32 else v for n, v in graph.constants.items()}
    return graph.replace(constants=constants)


def widened(value: Any) -> Any:
    """A float array of JAX in float64 (where 64-bit types are enabled)."""
    return value.astype(jnp.float64) if jnp.issubdtype(value.dtype, jnp.floating) else value


def _channels(layout: Plan, name: str) -> int:
    axis = channel_axis(layout, name)
    return 1 if axis is None else layout.shape(name)[axis]


def _as_tuples(batches: Iterable[Any], progress: bool | None) -> Iterator[tuple[Any, ...]]:
    from fheq.progress import track

    for batch in track(batches, "calibrating", progress):
        yield tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def _blocks(graph: Graph, chunks: Iterable[tuple[Any, ...]], width: int) -> Iterator[list[np.ndarray]]:
    """Re-cuts the data into blocks of `width` samples (the last one shorter), whatever batches they came in."""
    waiting: list[list[np.ndarray]] = []
    held = 0
    for chunk in chunks:
        parts = check_arrays(graph.inputs, chunk)
        at, n = 0, len(parts[0])
        while at < n:
            taken = min(width - held, n - at)
            waiting.append([part[at : at + taken] for part in parts])
            held, at = held + taken, at + taken
            if held == width:
                yield [np.concatenate(column) for column in zip(*waiting)]
                waiting, held = [], 0
    if held:
        yield [np.concatenate(column) for column in zip(*waiting)]


def _pad(part: np.ndarray, width: int) -> np.ndarray:
    """Repeats the last sample up to `width` (masked out later, and never out of the model's domain)."""
    missing = width - len(part)
    return np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part


def _warn(layout: Plan, stats: Stats, count: int) -> None:
    for name, found in stats.items():
        if not np.all(np.isfinite(found.minimum)) or not np.all(np.isfinite(found.maximum)):
            raise DataError(f"tensor {name!r} becomes NaN or infinite on the calibration data; check the model's inputs")
        if np.min(found.minimum) == np.max(found.maximum) and count > 1:
            warnings.warn(
                f"tensor {name!r} is constant ({float(np.min(found.minimum)):.6g}) on the calibration data: its "
                "range cannot be known; calibrate on data that exercise it",
                CalibrationWarning,
                stacklevel=3,
            )
    if count < FEW_SAMPLES:
        warnings.warn(
            f"{count} calibration samples are few: ranges may be too tight for unseen data; give at least {FEW_SAMPLES}, "
            "better some hundreds",
            CalibrationWarning,
            stacklevel=3,
        )
