"""Calibration: one jitted reduction over the data, with no bit-width in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial, reduce
from math import isfinite
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import enable_x64
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fheq.arrays.compiled import compiled_for
from fheq.arrays.sharding import DATA, gather, local_mesh, size
from fheq.batching import check_arrays
from fheq.errors import DataError
from fheq.fake_quant import operand_values
from fheq.graph import Graph
from fheq.integers.integer_weights import apply_form
from fheq.interpret import run_node
from fheq.observers import Observer, parts_read
from fheq.observing.observed import channels, follow, followed, observed
from fheq.observing.statistics import FRACTION, MOMENTS, PARTS, Stats, TensorStats, init, merge, update
from fheq.planning.granularity import channel_axis
from fheq.planning.plan import Plan, plan
from fheq.qparams import QParams
from fheq.steps import Linear

TILE, LEAST = 1024, 16  # most and fewest samples that are evaluated together
ROOM = 1 << 21  # values of all tensors of these samples
FEW_SAMPLES = 50


class CalibrationWarning(UserWarning):
    """The calibration data look inadequate."""


def calibrate(
    graph: Graph,
    *inputs: Any,
    batches: Iterable[Any] | None = None,
    batch_size: int | None = None,
    observers: Iterable[Observer] | None = None,
    progress: bool | None = None,
    mesh: Mesh | None = None,
) -> dict[str, TensorStats]:
    """Statistics of every tensor that quantization needs, by tensor name.

    Memory is constant however much data streams through; the order of the samples and their division into batches change
    nothing but the last digits of the moments.

    Args:
        inputs: one array per model input, as for `evaluate`.
        batches: instead of `inputs`, an iterable of such arrays (tuples where the model has several inputs).
        batch_size: samples that are gathered before they are evaluated. They are evaluated in tiles whose size the graph
            alone decides (see `tile`), so that this changes no result; a last tile that is not full is filled up.
        observers: those that `fit` will be given, to collect no more than they read: for `[MinMax()]` counts and extremes
            alone, in a fraction of the time. By default all is collected, which serves every observer. Without moments and
            histograms `fit` widens observed accumulator ranges by the spec's margin alone, and does not trade weights for
            resolution where it rounds.
        progress: whether to show a progress bar for `batches`; by default when standard error is a terminal.
        mesh: devices that share the work, with an axis "data". In several processes each gives its own samples, and all get
            the statistics of all (see `fheq.arrays.sharding`).

    Raises:
        DataError: no data, NaN or infinity, a wrong shape or dtype; the message names the input.
        QuantizationError: `observers` holds something else.
    """
    if (batches is None) == (not inputs):
        raise DataError("give calibration data either as arrays or as batches=")
    if batch_size is not None and batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}")
    chunks = [inputs] if batches is None else _as_tuples(batches, progress)
    parts = PARTS if observers is None else parts_read(observers)
    local = local_mesh(mesh)
    layout = plan(graph)
    width = tile(layout) * size(local, (DATA,))
    count = 0
    with enable_x64():
        stats = _start(graph, parts, local)
        for data, keep in _tiles(graph, chunks, width, batch_size or width):
            stats = _update(_rounds(layout, parts), local, stats, _observe(graph, parts, local, *data), keep)
            count += int(np.sum(keep))
    if not count:
        raise DataError("the calibration data hold no samples")
    found = [(_on_host(stats, local), count)]
    found = [part for one in found for part in gather(mesh, one)]
    total = {name: reduce(merge, [part[0][name] for part in found]) for name in stats}
    total = follow(layout, total)
    _warn(total, sum(int(part[1]) for part in found))
    return total


@lru_cache(maxsize=32)
def tile(layout: Plan) -> int:
    """The samples that are evaluated together: a power of two, fewer the larger the model's tensors are.

    It depends on nothing else, for the last digits of float32 products depend on the number of samples.
    """
    values = sum(int(np.prod(layout.shape(name))) for node in layout.graph.nodes for name in node.outputs if name)
    count = TILE
    while count > LEAST and count * values > ROOM:
        count //= 2
    return count


@lru_cache(maxsize=32)
def _collected(layout: Plan, parts: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """What is collected beside counts and extremes, by tensor. Of those that follow from others only their moments are."""
    names = observed(layout)
    follows = followed(layout)
    own = {name: (*parts, *[FRACTION] * (name in layout.inputs)) for name in names if name not in follows}
    return own | {name: (MOMENTS,) for name in follows if MOMENTS in parts}


def by_channel(layout: Plan, name: str, values: Any) -> Any:
    """Values `(B, *shape)` to `(B, n, C)`."""
    axis = channel_axis(layout, name)
    if axis is None:
        return values.reshape(values.shape[0], -1, 1)
    moved = jnp.moveaxis(values, axis, -1)
    return moved.reshape(len(moved), -1, moved.shape[-1])


@compiled_for(3)
def _start(graph: Graph, parts: tuple[str, ...], mesh: Mesh | None) -> dict[str, TensorStats]:
    """The statistics of nothing; of each device along a leading axis where there is a mesh."""
    layout = plan(graph)
    none = {
        name: jax.tree.map(jnp.asarray, init(channels(layout, name), own)) for name, own in _collected(layout, parts).items()
    }
    if mesh is None:
        return none
    spread = lambda leaf: jnp.broadcast_to(leaf, (size(mesh, (DATA,)), *leaf.shape))
    return jax.lax.with_sharding_constraint(jax.tree.map(spread, none), NamedSharding(mesh, P(DATA)))


def _on_host(stats: dict[str, TensorStats], mesh: Mesh | None) -> dict[str, TensorStats]:
    found = jax.tree.map(np.asarray, stats)
    if mesh is None:
        return found
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(size(mesh, (DATA,)))]
    return {name: reduce(merge, [part[name] for part in parts]) for name in stats}


@compiled_for(3)
def _observe(graph: Graph, parts: tuple[str, ...], mesh: Mesh | None, *data: Any) -> dict[str, Any]:
    """The values of the observed tensors, `(B, n, C)` in float32: the order in which convolutions make them."""
    layout = plan(graph)
    names = _collected(layout, parts)

    def sample(*inputs: Any) -> tuple[Any, ...]:
        env = float_values(layout, *inputs)
        return tuple(jnp.asarray(env[name], jnp.float32) for name in names)

    def batch(*inputs: Any) -> dict[str, Any]:
        return {name: by_channel(layout, name, v) for name, v in zip(names, jax.vmap(sample)(*inputs))}

    return batch(*data) if mesh is None else _by_device(batch, mesh)(*data)


def _update(
    rounds: list[list[str]], mesh: Mesh | None, stats: dict[str, TensorStats], values: dict[str, Any], keep: Any
) -> dict[str, TensorStats]:
    """The statistics with a batch. Reductions are programs of their own: values would be computed once for each."""
    found = dict(stats)
    for names in rounds:
        found.update(zip(names, _add([stats[name] for name in names], [values[name] for name in names], keep, mesh)))
    return found


@lru_cache(maxsize=32)
def _rounds(layout: Plan, parts: tuple[str, ...]) -> list[list[str]]:
    """The tensors in rounds, each with no more than one of a shape: repeated layers share compiled programs, which makes
    seconds of minutes where a long recurrence is unrolled, and all that differ are in one."""
    kinds: dict[Any, list[str]] = {}
    for name, own in _collected(layout, parts).items():
        kinds.setdefault((own, channels(layout, name), int(np.prod(layout.shape(name)))), []).append(name)
    most = max(map(len, kinds.values()), default=0)
    return [[names[i] for names in kinds.values() if i < len(names)] for i in range(most)]


@partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _add(stats: list[TensorStats], values: list[Any], keep: Any, mesh: Mesh | None) -> list[TensorStats]:
    def part(stats: list[TensorStats], values: list[Any], keep: Any) -> list[TensorStats]:
        return [update(known, jnp.swapaxes(value, 1, 2), keep) for known, value in zip(stats, values)]

    def own(stats: list[TensorStats], values: list[Any], keep: Any) -> list[TensorStats]:
        found = part(jax.tree.map(lambda leaf: leaf[0], stats), values, keep)
        return jax.tree.map(lambda leaf: leaf[None], found)

    return part(stats, values, keep) if mesh is None else _by_device(own, mesh)(stats, values, keep)


def _by_device(fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A function of samples as one of each device's own."""
    return jax.shard_map(fn, mesh=mesh, in_specs=P(DATA), out_specs=P(DATA), check_vma=False)


def float_values(layout: Plan, *sample: Any) -> dict[str, Any]:
    """Every tensor of the decomposed graph for one sample, in float, convolutions as products of matrices."""
    env, none = dict(zip(layout.inputs, sample)), QParams({}, {}, {})
    convolutions = {step.out: step for step in layout.steps if isinstance(step, Linear) and step.form == "conv"}
    read = lambda name: env[name] if name in env else jnp.asarray(layout.graph.constants[name])
    for node in layout.graph.nodes:
        step = convolutions.get(node.outputs[0])
        if step is not None:
            dtype = layout.graph.types[step.out].dtype
            x, weight, bias = (jnp.asarray(v, dtype) for v in (operand_values(none, step.x, env), step.weight, step.bias))
            env[step.out] = apply_form(step, x, weight) + bias
        else:
            env.update((n, v) for n, v in zip(node.outputs, run_node(node, read, layout.graph.constants)) if n)
    return env


def _as_tuples(batches: Iterable[Any], progress: bool | None) -> Iterator[tuple[Any, ...]]:
    from fheq.display.progress import track

    for batch in track(batches, "calibrating", progress):
        yield tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def _tiles(
    graph: Graph, chunks: Iterable[tuple[Any, ...]], width: int, batch_size: int
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Data re-cut into tiles of `width` samples, whatever batches they came in, and which samples of each tile count."""
    for block in _blocks(graph, chunks, width * -(-batch_size // width)):
        for start in range(0, len(block[0]), width):
            yield (
                [_pad(part[start : start + width], width) for part in block],
                np.arange(start, start + width) < len(block[0]),
            )


def _blocks(graph: Graph, chunks: Iterable[tuple[Any, ...]], width: int) -> Iterator[list[np.ndarray]]:
    """Data re-cut into blocks of `width` samples, the last one shorter."""
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
                yield [_joined(column) for column in zip(*waiting)]
                waiting, held = [], 0
    if held:
        yield [_joined(column) for column in zip(*waiting)]


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _pad(part: np.ndarray, width: int) -> np.ndarray:
    """Repeats the last sample up to `width` (masked out later, and never out of the model's domain)."""
    missing = width - len(part)
    return np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part


def _warn(stats: Stats, count: int) -> None:
    for name, found in stats.items():
        low, high = float(np.min(found.minimum)), float(np.max(found.maximum))
        if not isfinite(low) or not isfinite(high):
            raise DataError(f"tensor {name!r} becomes NaN or infinite on the calibration data; check the model's inputs")
        if low == high and count > 1:
            warnings.warn(
                f"tensor {name!r} is constant ({low:.6g}) on the calibration data: its "
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
