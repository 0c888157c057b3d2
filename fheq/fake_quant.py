"""Fake quantization: the quantized model in floating point, differentiable, with every parameter a leaf."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fheq import affine
from fheq.arrays.compiled import compiled_for
from fheq.arrays.slopes import with_finite_slopes
from fheq.arrays.taking import take
from fheq.batching import filled, join, over_samples
from fheq.evaluate import evaluate_sample, unwrap
from fheq.graph import Graph, Node, is_float
from fheq.integers.accumulator_decoders import accumulator_decoder, multipliers, summands, sums_accumulators
from fheq.integers.cell_thresholds import meets_stated_steps
from fheq.integers.decoders import join_pieces
from fheq.integers.integer_weights import along_inputs, apply_form, quantize_weight
from fheq.interpret import run_node
from fheq.ops.table import Kind, lookup
from fheq.planning.plan import Plan
from fheq.planning.quantizers import plan_for
from fheq.qparams import QParams
from fheq.steps import Add, Join, Linear, Maximum, Operand, Product, Step, Sum, makes_accumulator

Array = Any
NOISE = 2.0**-20  # relative; values are float32


def fake_quant(graph: Graph, qparams: QParams, *inputs: Array) -> Array | tuple[Array, ...]:
    """The quantized model in floating point: inputs, activations, weights and accumulators rounded as the integers are.

    A pure function, for `jit`, `vmap` and `grad`: gradients pass straight through roundings (arXiv 1308.3432) and reach
    scales as in LSQ (arXiv 1902.08153). Table inputs beyond an accumulator's range are not wrapped here; `simulate` does.

    Args:
        graph: what `import_onnx` gives.
        qparams: what `fit` gives; every leaf may be a tracer.
        inputs: as for `evaluate`.

    Returns:
        As `evaluate`, in float32 (float64 when JAX has 64-bit types enabled); labels that are strings as their numbers in
        `Port.labels` of the output.
    """
    return unwrap(_fake_quant(graph, qparams, *inputs))


@compiled_for(1)
def _fake_quant(graph: Graph, qparams: QParams, *inputs: Array) -> list[Array]:
    layout = plan_for(graph, qparams)
    parts = over_samples(partial(_sample, layout, qparams), graph.inputs, inputs)
    return [join(port, part) for port, part in zip(graph.outputs, parts)]


def _sample(layout: Plan, qparams: QParams, *sample: Array) -> tuple[Array, ...]:
    env = tensor_values(layout, qparams, prepare(layout, qparams), *sample)
    return results(layout, output_values(layout, qparams, env))


def results(layout: Plan, outputs: tuple[Array, ...]) -> tuple[Array, ...]:
    """The model's outputs: those of the planned graph, or what the client makes of them (0 where a value leaves the domain
    of its function, as after decryption)."""
    if layout.client is None:
        return outputs
    found = evaluate_sample(layout.client, *outputs)
    return tuple(jnp.where(jnp.isnan(v), 0, v) if is_float(v.dtype) else v for v in found)


class Prepared(NamedTuple):
    """What a step takes from the quantizers alone, worked out once however many samples follow.

    weight: the quantized weight of a linear step, in real values; scale, offset: decoder of its accumulator; taken: what a
    sum with an accumulator takes for each of its operands, slope and intercept; anchor: how far above a whole cell the
    accumulator's 0 lies; bias: of a linear step, with the correction of its weights' rounding.
    """

    weight: Array | None
    scale: Array
    offset: Array
    taken: tuple[tuple[Array, Array], ...] = ()
    anchor: Array | None = None
    bias: Array | float = 0.0


def prepare(layout: Plan, qparams: QParams) -> dict[str, Prepared]:
    """The `Prepared` of every step that makes an accumulator, by the tensor that it makes."""
    found = {}
    for step in layout.steps:
        if isinstance(step, Linear):
            found[step.out] = _prepare_linear(layout, qparams, step)
        elif makes_accumulator(step):
            found[step.out] = Prepared(None, *accumulator_decoder(layout, qparams, step), _taken(layout, qparams, step))
        if step.out in found and meets_stated_steps(layout, step):
            found[step.out] = found[step.out]._replace(anchor=_anchor(qparams, step, found[step.out]))
    return found


def _anchor(qparams: QParams, step: Step, known: Prepared) -> Array:
    """See `whole_shift`, which allows such shifts where an accumulator meets stated steps."""
    a = qparams.accumulators[step.out].expanded(len(step.shape))
    shift = a.zero_point - a.qmin + known.offset / jnp.where(known.scale == 0, 1, known.scale)
    return jax.lax.stop_gradient(jnp.round(jnp.mod(shift, affine.cell(a.lsbs, jnp.result_type(float)))))


def _taken(layout: Plan, qparams: QParams, step: Step) -> tuple[tuple[Array, Array], ...]:
    """Of a sum with an accumulator, whose multipliers are whole: see `Summand.multiplied`."""
    if not isinstance(step, Add) or not sums_accumulators(layout, step):
        return ()
    a, b = summands(layout, qparams, step)
    m, n, unit = multipliers(layout, qparams, step, a, b)
    return tuple(jax.tree.map(jax.lax.stop_gradient, x.multiplied(k, unit)) for x, k in ((a, m), (b, n)))


def _prepare_linear(layout: Plan, qparams: QParams, step: Linear) -> Prepared:
    weights = quantize_weight(layout, qparams, step)
    scale = qparams.weights[step.weight_name].expanded(step.weight.ndim).scale
    flat = jnp.where(weights.ratio == 0, 1.0, 0.0)
    real = weights.integers * scale + step.weight * along_inputs(step, flat)  # still channels keep their constant
    safe = jnp.where(weights.ratio == 0, 1.0, weights.ratio)
    return Prepared(real / along_inputs(step, safe), weights.scale, weights.offset, bias=step.bias + weights.correction)


def tensor_values(
    layout: Plan,
    qparams: QParams,
    prepared: Mapping[str, Prepared],
    *sample: Array,
    disturbed: Callable[[Step, Array], Array] | None = None,
    blocks: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """Every tensor of the decomposed graph for one sample, accumulators rounded; those of `Plan.unrounded` also as they are,
    under the name that `as_decrypted` gives.

    Args:
        disturbed: what is rounded in place of a step's accumulator, a real value; see `fheq.table_noise`.
        blocks: the block of each step, by the tensor that it makes: gradients stop where a block reads another one's result.
    """
    env: dict[str, Array] = {}
    samples = {port.name: filled(port, x) for port, x in zip(layout.graph.inputs, sample)}
    for name in layout.inputs:
        value = samples[layout.encoded.get(name, name)]
        real = jnp.asarray(value, jnp.result_type(float))
        quantized = affine.fake_quant(qparams.tensors[name], real)
        env[name] = quantized if is_float(layout.graph.types[name].dtype) else quantized.astype(value.dtype)
    steps = {step.out: step for step in layout.steps}
    for node in layout.graph.nodes:
        step = steps.get(node.outputs[0])
        if node.outputs[0] in layout.encoded:
            continue
        if step:
            given = env if blocks is None else {**env, **_from_other_blocks(layout, blocks, step, env)}
            y = run_step(qparams, prepared, step, given, disturbed)
            env[step.out] = rounded(qparams, prepared, step, y)
            if step.out in layout.unrounded:
                env[as_decrypted(step.out)] = rounded(qparams, prepared, step, y, decrypted=True)
            continue
        values = _node_values(layout.graph, node, env)
        env.update((n, v) for n, v in zip(node.outputs, values) if n)
        if any(n in layout.unrounded for n in node.outputs):
            exact = {n: env[as_decrypted(n)] for n in node.inputs if as_decrypted(n) in env}
            values = _node_values(layout.graph, node, {**env, **exact})
            env.update((as_decrypted(n), v) for n, v in zip(node.outputs, values) if n)
    return env


def _node_values(graph: Graph, node: Node, env: Mapping[str, Array]) -> tuple[Array, ...]:
    """The outputs of a node that is no step."""
    read = lambda name: env[name] if name in env else jnp.asarray(graph.constants[name])
    real = [n for n in dict.fromkeys(node.inputs) if n in env and is_float(env[n].dtype)]
    if lookup(node).kind is not Kind.ELEMENTWISE or not real or not is_float(graph.types[node.outputs[0]].dtype):
        return run_node(node, read, graph.constants)

    def value(*xs: Array) -> Array:
        given = dict(zip(real, xs))
        return run_node(node, lambda name: given[name] if name in given else read(name), graph.constants)[0]

    return (with_finite_slopes(value)(*(env[name] for name in real)),)


def as_decrypted(name: str) -> str:
    """The name of a tensor of `Plan.unrounded` that lost no low bits."""
    return f"{name} (decrypted)"


def _from_other_blocks(layout: Plan, blocks: Mapping[str, int], step: Step, env: Mapping[str, Array]) -> dict[str, Array]:
    """What a step reads of other blocks, as constants to gradients."""
    keys = {operand.key for operand in step.operands}
    other = {key for key in keys if blocks.get(layout.points.get(key, key)) != blocks[step.out]}
    return {key: jax.lax.stop_gradient(env[key]) for key in other}


def output_values(layout: Plan, qparams: QParams, env: Mapping[str, Array]) -> tuple[Array, ...]:
    """The outputs of the planned graph from what `tensor_values` gives."""
    found = []
    for port in layout.graph.outputs:
        operand = layout.outputs.get(port.name)
        if operand is not None:
            found.append(operand_values(qparams, operand, env))
        else:
            name = as_decrypted(port.name) if port.name in layout.unrounded else port.name
            found.append(env[name] if name in env else jnp.asarray(layout.graph.constants[name]))
    return tuple(found)


def operand_values(qparams: QParams, operand: Operand, env: Mapping[str, Array]) -> Array:
    """The real values that the integers of an operand stand for."""
    source = env[operand.key]
    if operand.key in qparams.tensors:
        real = jnp.asarray(source, jnp.result_type(float))
        real = jnp.where(jnp.isnan(real), 0, real)  # as tables have it where a value leaves the domain of its function
        source = affine.fake_quant(qparams.tensors[operand.key], real)
    index, fill = operand.elements.reshape(operand.shape), operand.fill.reshape(operand.shape)
    if operand.slope is None or operand.intercept is None:
        return take(source.ravel(), index, fill)
    slope, intercept = (v.reshape(operand.shape) for v in (operand.slope, operand.intercept))
    values, hole = take(source.ravel(), index) * slope + intercept, index < 0
    return jnp.where(hole, fill, values) if hole.any() else values


def run_step(
    qparams: QParams,
    prepared: Mapping[str, Prepared],
    step: Step,
    env: Mapping[str, Array],
    disturbed: Callable[[Step, Array], Array] | None,
) -> Array:
    """The real value of a step's result before its accumulator is rounded."""
    xs = [operand_values(qparams, operand, env) for operand in step.operands]
    if isinstance(step, Maximum):
        return step.sign * jnp.max(step.sign * jnp.concatenate(xs, axis=-1), axis=-1)
    if isinstance(step, Join):
        return join_pieces(step, xs, step.fill)
    known = prepared[step.out]
    y: Array
    if isinstance(step, Linear):
        y = apply_form(step, xs[0], known.weight) + known.bias
    elif isinstance(step, Sum):
        y = step.coefficient * jnp.sum(xs[0], axis=-1)
    elif isinstance(step, Add):
        xs = [slope * x + intercept for x, (slope, intercept) in zip(xs, known.taken)] or xs
        y = xs[0] + step.sign * xs[1]
    else:
        assert isinstance(step, Product)
        y = jnp.sum(xs[0] * xs[1], axis=-1) if step.contract else xs[0] * xs[1]
    y = y.reshape(step.shape)
    return y if disturbed is None else disturbed(step, y)


def rounded(qparams: QParams, prepared: Mapping[str, Prepared], step: Step, y: Array, *, decrypted: bool = False) -> Array:
    """The real value of a step's result on the grid of its accumulator, with low bits removed unless it is `decrypted`."""
    known = prepared.get(step.out)
    if known is None:
        return y
    lsbs = qparams.accumulators[step.out].lsbs * (0 if decrypted else 1)
    acc = (y - known.offset) / jnp.where(known.scale == 0, 1, known.scale)  # 0 of a constant
    anchor = 0.0 if known.anchor is None else known.anchor
    low = affine.round_accumulator(jnp.round(acc) + anchor, lsbs) - anchor
    # Integers already where nothing is removed. What float noise leaves of a difference of 0 would turn a comparison; large
    # accumulators are better off with their noise than rounded in float32.
    exact = low if isinstance(step, Add) else jnp.where(lsbs > 0, low, acc)
    # The gradient of exact * scale + offset, with one use of the scale: a reduction for each would take long to compile.
    plain = y + jax.lax.stop_gradient(exact - acc) * known.scale
    return affine.straight_through(_decoded(exact, known), plain).reshape(step.shape)


def _decoded(exact: Array, known: Prepared) -> Array:
    """The real values of integers by an offset in whole units, where it is one: float noise would turn decisions at 0."""
    whole = jnp.round(known.offset / jnp.where(known.scale == 0, 1, known.scale))
    rest = known.offset - whole * known.scale
    noise = NOISE * (jnp.abs(whole) + 1) * jnp.abs(known.scale)
    return (exact + whole) * known.scale + jnp.where(jnp.abs(rest) <= noise, 0.0, rest)
