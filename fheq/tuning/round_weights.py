"""Second-order rounding of weights: GPTQ (arXiv 2210.17323)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import enable_x64

from fheq.arrays.compiled import compiled_for
from fheq.batching import check_arrays
from fheq.client.outputs import rejoined
from fheq.fake_quant import prepare, tensor_values
from fheq.graph import Graph
from fheq.integers.integer_weights import quantize_weight
from fheq.interpret import interpret
from fheq.planning.plan import Plan
from fheq.planning.quantizers import plan_for
from fheq.qparams import QParams
from fheq.rewriting.weights import replaceable, takes_bias, with_weights
from fheq.steps import Linear
from fheq.tuning.learned import zero_bias
from fheq.tuning.surgeon import Reader, features, one_matrix, weight_matrix


def round_weights(graph: Graph, qparams: QParams, *inputs: Any) -> Graph:
    """The graph with its weights on the grids of their quantizers.

    Layer after layer, input after input: a weight is rounded, and the weights that are not rounded yet make up for the error
    that this causes in the layer's results, given the quantized values that it reads. Quantizers stay as they are, and what
    a layer does not read, such as a pruned channel, it does not read afterwards either.

    Args:
        graph: what `import_onnx` gives.
        qparams: what `fit` gives for it.
        inputs: calibration data, as for `evaluate`; no labels.

    Raises:
        DataError: the data do not fit.
    """
    layout = plan_for(graph, qparams)
    data = tuple(jnp.asarray(a) for a in check_arrays(graph.inputs, inputs))
    steps = [s for s in layout.steps if isinstance(s, Linear) and replaceable(layout.graph, s) and one_matrix(s)]
    changed = {step.out: step for step in steps}
    with enable_x64():
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), qparams)
        exact = jax.vmap(lambda *x: interpret(layout.graph, dict(zip(layout.inputs, x)), targets=_read(layout)))(*data)
        for step in steps:
            weights = {out: (np.asarray(s.weight, np.float64), s.bias + zero_bias(s)) for out, s in changed.items()}
            values = _quantized(layout, wide, weights, *data)
            reader = Reader.observe(step, features(step, exact), features(step, values, qparams))
            rounded = _rounded(layout, qparams, reader)
            keeps = not takes_bias(layout.graph, layout.points, step)
            changed[step.out] = replace(rounded, bias=step.bias) if keeps else rounded
    return rejoined(graph, with_weights(layout.graph, changed)) if changed else graph


def _read(layout: Plan) -> list[str]:
    """The tensors that linear steps read."""
    return list(dict.fromkeys(step.x.key for step in layout.steps if isinstance(step, Linear)))


@compiled_for(1)
def _quantized(layout: Plan, qparams: QParams, weights: dict[str, tuple[Any, Any]], *data: Any) -> dict[str, Any]:
    """What linear steps read, all samples of it, with the weights and biases of some by the tensors that they make."""
    changed = lambda s: replace(s, weight=weights[s.out][0], bias=weights[s.out][1]) if s.out in weights else s
    tuned = replace(layout, steps=tuple(map(changed, layout.steps)))
    prepared, names = prepare(tuned, qparams), _read(layout)

    def one(*sample: Any) -> dict[str, Any]:
        env = tensor_values(tuned, qparams, prepared, *sample)
        return {name: env[name] for name in names}

    return jax.vmap(one)(*data)


def _rounded(layout: Plan, qparams: QParams, reader: Reader) -> Linear:
    """The layer's step, its weights rounded one input after the other."""
    step = reader.step
    a = qparams.weights[step.weight_name]
    scale, zero, qmin, qmax = (np.ravel(np.asarray(leaf, np.float64)) for leaf in (a.scale, a.zero_point, a.qmin, a.qmax))
    ratio = np.repeat(np.asarray(quantize_weight(layout, qparams, step).ratio), reader.weight.shape[1])
    unread = ~np.any(weight_matrix(step), axis=1)
    for at in np.flatnonzero(unread):
        reader = reader.fixed(slice(at, at + 1), np.zeros((1, len(reader.units))))
    for at in np.flatnonzero((ratio != 0) & ~unread):  # an input that does not vary is no weight's business
        unit = scale / ratio[at]
        weight = reader.weight.reshape(len(ratio), -1)[at] * reader.units
        rounded = (np.clip(np.round(weight / unit) + zero, qmin, qmax) - zero) * unit
        reader = reader.fixed(slice(at, at + 1), (rounded / reader.units)[None])
    return reader.pruned(np.ones(reader.channels, bool))
