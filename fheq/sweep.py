"""Sweeps: many quantizations of one graph, evaluated together.

A configuration is a `QParams`; many are one `QParams` with a leading axis on every leaf (`fheq.sweeping.configurations`).
`stack` puts fitted ones together, `jax.vmap` of any edit makes them, and `sweep` scores them all with one compiled function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fheq import affine
from fheq.arguments import check_whole
from fheq.arrays.compiled import compiled_for
from fheq.arrays.sharding import DATA, configuration_axes, gather, local_mesh, size
from fheq.batching import check_arrays, check_targets
from fheq.display.progress import track
from fheq.encryption.table_noise import TableNoise, draws, missed
from fheq.errors import DataError, QuantizationError
from fheq.evaluate import evaluate_sample, unwrap
from fheq.fake_quant import output_values, prepare, results, tensor_values
from fheq.graph import Graph
from fheq.interpret import interpret
from fheq.planning.plan import Plan, plan
from fheq.planning.quantizers import plan_for
from fheq.qparams import QParams
from fheq.scores import Measure, Score, as_score
from fheq.sweeping.configurations import configurations
from fheq.sweeping.sweep_results import Results

Array = Any
CHUNK = 32  # configurations whose weights are quantized together
BATCH = 512  # samples evaluated together
Measures = tuple[tuple[str, Callable[..., Any], Callable[[Any, Any], Any] | None], ...]  # names, measures, origins


def sweep(
    graph: Graph,
    qparams: QParams,
    *inputs: Array,
    scores: Mapping[str, Score | Measure],
    targets: Any = None,
    tensors: Sequence[str] | None = None,
    noise: TableNoise | None = None,
    chunk: int = CHUNK,
    batch_size: int = BATCH,
    progress: bool | None = None,
    mesh: Mesh | None = None,
) -> Results:
    """Scores many quantizations of a graph with `fake_quant`.

    One function is compiled, whatever the values and however many: it maps over configurations and scans over blocks of
    `batch_size` samples. Weights are quantized once per configuration, for `chunk` of them at a time, which bounds the
    memory.

    Args:
        qparams: every leaf has the configurations as its leading axis: see `stack`.
        inputs: as for `evaluate`.
        scores: by name, functions `score(y, exact, target)` of one sample, averaged over samples (see `fheq.scores`).
        targets: an array, or a pytree of arrays, with the samples as the leading axis.
        tensors: names of tensors of the graph: `y` and `exact` are then mappings from these names, quantized tensors as they
            are read, instead of the outputs.
        noise: of tables, with the same leading axis: `jax.vmap(partial(fheq.table_noise, graph))(qparams, p_errors)`. All
            configurations meet the same random numbers.
        chunk: configurations whose weights are quantized together.
        batch_size: samples evaluated together.
        progress: whether to show a progress bar; by default when standard error is a terminal.
        mesh: devices that share the work: samples are split along its axis "data", configurations along its other axes;
            `chunk` and `batch_size` are then those of one device. In several processes each gives its own samples, and all
            get the scores of all (see `fheq.arrays.sharding`).

    Raises:
        DataError: inputs or targets do not fit or are not finite, scores map no names to functions, `tensors` names none, or
            `chunk` or `batch_size` is not an integer of at least 1.
        QuantizationError: a leaf lacks the leading axis, or a name in `tensors` is unknown.
    """
    for name, number in (("chunk", chunk), ("batch_size", batch_size)):
        check_whole(name, number, 1, DataError)
    layout = plan_for(graph, qparams)
    count, swept = configurations(qparams=qparams, noise=noise), (_uniform(qparams), jax.tree.map(np.asarray, noise))
    local = local_mesh(mesh)
    devices, shards = size(local, (DATA,)), 1 if local is None else size(local, configuration_axes(local))
    blocks = _blocks(graph, inputs, targets, batch_size * devices, devices)
    names = None if tensors is None else _known(layout, tensors)
    measures = _as_scores(scores)
    static = tuple((name, score.measure, score.origin) for name, score in measures.items())
    first = gather(mesh, jax.tree.map(lambda leaf: leaf[0, 0], blocks[:2]))[0]
    chunk = min(chunk, -(-count // shards)) * shards
    found = []
    for start in track(range(0, count, chunk), "sweeping", progress):
        at = np.minimum(np.arange(start, start + chunk), count - 1)  # the last one is repeated to fill
        sums = _sums(graph, static, names, local, jax.tree.map(partial(np.take, indices=at, axis=0), swept), first, blocks)
        found.append([np.asarray(v, np.float64).sum(axis=0)[: count - start] for v in jax.tree.leaves(sums)])
    totals = gather(mesh, ([np.concatenate(v) for v in zip(*found)], np.sum(blocks[-1])))
    n = sum(int(part[1]) for part in totals)
    means = jax.tree.unflatten(jax.tree.structure(sums), [np.sum(v, axis=0) / n for v in zip(*(p[0] for p in totals))])
    return Results({name: _finish(score, means[name]) for name, score in measures.items()})


def _uniform(qparams: QParams) -> QParams:
    """Leaves on the host in one type, and what does not matter to values made equal: all configurations compile to one."""
    leaves = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.result_type(float)), qparams)
    is_affine = lambda x: isinstance(x, affine.Affine)
    return jax.tree.map(lambda a: replace(a, rounding="exact"), leaves, is_leaf=is_affine)


def _finish(score: Score, means: Any) -> Any:
    return jax.tree.map(np.asarray, jax.vmap(score.finish)(means))


def _as_scores(scores: Mapping[str, Score | Measure]) -> dict[str, Score]:
    if not isinstance(scores, Mapping):
        raise DataError(f"scores must map names to functions of one sample, got {scores!r}")
    if not scores:
        raise DataError("scores is empty: give at least one function, by its name")
    return {name: as_score(score) for name, score in scores.items()}


def _known(layout: Plan, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not names:
        raise DataError(f"tensors must be a list of names, one at least; got {names!r}")
    computed = {*layout.inputs, *(out for node in layout.graph.nodes for out in node.outputs if out)}
    for name in names:
        if name not in computed:
            raise QuantizationError(f"{name!r} is no tensor of the planned graph; it has {sorted(computed)[:12]}, ...")
    return tuple(names)


def _blocks(
    graph: Graph, inputs: Sequence[Array], targets: Any, batch_size: int, multiple: int
) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """Inputs and targets as (blocks, samples, ...), the last one repeated to fill, the samples' numbers and which count.

    Args:
        multiple: what the number of samples in a block is a multiple of.
    """
    parts = check_arrays(graph.inputs, inputs)
    n = len(parts[0])
    check_targets(targets, n)
    count = -(-n // batch_size)  # blocks, all of about the same size
    width = -(-n // (count * multiple)) * multiple
    at = np.arange(-(-n // width) * width).reshape(-1, width)
    take = lambda leaf: np.asarray(leaf)[np.minimum(at, n - 1)]
    return [take(part) for part in parts], jax.tree.map(take, targets), at.astype(np.uint32), at < n


@compiled_for(4)
def _sums(
    graph: Graph,
    measures: Measures,
    names: tuple[str, ...] | None,
    mesh: Mesh | None,
    swept: tuple[QParams, TableNoise | None],
    first: Any,
    blocks: Any,
) -> dict[str, Any]:
    """Sums of the measures over the samples of each block, by name: leaves are (blocks, configurations, ...).

    Args:
        first: inputs and target of the sample that origins are of.
    """
    part = partial(_sums_part, graph, measures, names)
    if mesh is None:
        return part(swept, first, blocks)
    whole = lambda *given: jax.tree.map(partial(jax.lax.psum, axis_name=DATA), part(*given))
    axes = configuration_axes(mesh)
    specs = (P(axes), P(), P(None, DATA))
    return jax.shard_map(whole, mesh=mesh, in_specs=specs, out_specs=P(None, axes), check_vma=False)(swept, first, blocks)


def _sums_part(
    graph: Graph,
    measures: Measures,
    names: tuple[str, ...] | None,
    swept: tuple[QParams, TableNoise | None],
    first: Any,
    blocks: Any,
) -> dict[str, Any]:
    layout = plan(graph)
    qparams, noise = swept
    prepared = jax.vmap(partial(prepare, layout))(qparams)
    origins = _origins(graph, measures, names, *first)

    def block(_: None, data: Any) -> tuple[None, dict[str, Any]]:
        parts, targets, numbers, keep = data
        exact = jax.vmap(partial(_exact, graph, names))(*parts)
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.PRNGKey(0)))(numbers)
        drawn = jax.vmap(partial(draws, layout))(keys)

        def measure(configuration: Any, target: Any, want: Any, drawn: Any, *sample: Array) -> dict[str, Any]:
            q, noise, known = configuration
            disturbed = None if noise is None else partial(missed, noise, drawn)
            y = _quantized(graph, names, q, tensor_values(layout, q, known, *sample, disturbed=disturbed))
            return {name: found(y, want, target, *origins[name]) for name, found, _ in measures}

        def total(configuration: Any) -> dict[str, Any]:
            values = jax.vmap(partial(measure, configuration))(targets, exact, drawn, *parts)
            return jax.tree.map(partial(_total, keep), values)

        # One after the other: together, the values of all would leave the caches after every operation.
        return None, jax.lax.map(total, (qparams, noise, prepared))

    return jax.lax.scan(block, None, blocks)[1]


def _origins(
    graph: Graph, measures: Measures, names: tuple[str, ...] | None, parts: Sequence[Array], target: Any
) -> dict[str, tuple[Any, ...]]:
    """What each measure is given beside its sample: the origin of its score, or nothing."""
    if all(origin is None for *_, origin in measures):
        return {name: () for name, *_ in measures}
    exact = _exact(graph, names, *parts)
    return {name: () if origin is None else (origin(exact, target),) for name, _, origin in measures}


def _total(keep: Array, values: Array) -> Array:
    values = jnp.asarray(values, jnp.result_type(float))
    return jnp.sum(jnp.where(keep.reshape(-1, *(1,) * (values.ndim - 1)), values, 0), axis=0)


def _exact(graph: Graph, names: tuple[str, ...] | None, *sample: Array) -> Any:
    if names is None:
        return unwrap([v.reshape(port.shape) for port, v in zip(graph.outputs, evaluate_sample(graph, *sample))])
    decomposed = plan(graph).graph
    return interpret(decomposed, dict(zip(plan(graph).inputs, sample)), targets=names)


def _quantized(graph: Graph, names: tuple[str, ...] | None, qparams: QParams, env: Mapping[str, Array]) -> Any:
    layout = plan(graph)
    outputs = output_values(layout, qparams, env)
    if names is None:
        return unwrap([v.reshape(port.shape) for port, v in zip(graph.outputs, results(layout, outputs))])
    found = {port.name: v for port, v in zip(layout.graph.outputs, outputs)}
    for name in names:
        if name not in found:
            planted = name in layout.points  # read as quantized, made as real
            found[name] = affine.fake_quant(qparams.tensors[name], env[name]) if planted else env[name]
    return {name: found[name] for name in names}
