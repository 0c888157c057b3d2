"""Bias correction: quantization shifts the mean of every channel; biases take the shift back (arXiv 1906.04721, 4.2)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.batching import check_arrays
from fheq.calibrate import by_channel
from fheq.fake_quant import prepare, tensor_values
from fheq.graph import Graph
from fheq.interpret import interpret
from fheq.planning.quantizers import plan_for
from fheq.qparams import QParams
from fheq.tuning.learned import Learned, applied, initial, with_learned


def correct_biases(graph: Graph, qparams: QParams, *inputs: Any) -> tuple[Graph, QParams]:
    """The graph with biases that give every channel of its linear layers the float model's mean on the data.

    Layers are corrected in order, each with those before it corrected already.

    Args:
        graph: what `import_onnx` gives.
        qparams: what `fit` gives for it.
        inputs: calibration data, as for `evaluate`.

    Returns:
        The graph with other biases, and its quantizers.

    Raises:
        DataError: the data do not fit.
    """
    layout = plan_for(graph, qparams)
    data = tuple(jnp.asarray(a) for a in check_arrays(graph.inputs, inputs))
    qparams = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), qparams)
    learned = initial(layout, qparams)
    names = tuple(learned.biases)
    mean = lambda name, v: jnp.mean(by_channel(layout, name, v), axis=(0, 1))

    @jax.jit
    def exact(*data: Any) -> dict[str, Any]:
        one = lambda *sample: interpret(layout.graph, dict(zip(layout.inputs, sample)), targets=names)
        return {name: mean(name, v) for name, v in jax.vmap(one)(*data).items()}

    @jax.jit
    def quantized(learned: Learned, *data: Any) -> dict[str, Any]:
        tuned, q = applied(layout, qparams, learned)
        prepared = prepare(tuned, q)

        def one(*sample: Any) -> dict[str, Any]:
            env = tensor_values(tuned, q, prepared, *sample)
            return {name: env[name] for name in names}

        return {name: mean(name, v) for name, v in jax.vmap(one)(*data).items()}

    wanted = exact(*data)
    for name in names:
        bias = learned.biases[name]
        shift = (wanted[name] - quantized(learned, *data)[name]).reshape(bias.shape)
        learned = replace(learned, biases={**learned.biases, name: bias + shift})
    return with_learned(graph, qparams, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), learned))
