"""The float model in JAX."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import enable_x64

from fheq.arrays.compiled import compiled_for
from fheq.batching import join, numbered, over_samples, split_all
from fheq.errors import DataError
from fheq.graph import Graph
from fheq.interpret import interpret

Array = Any


def unwrap(results: list[Array]) -> Array | tuple[Array, ...]:
    """One output as it is, several as a tuple."""
    return results[0] if len(results) == 1 else tuple(results)


def as_tuple(results: Any) -> tuple[Any, ...]:
    """The inverse of `unwrap`: several outputs as they are, one in a tuple."""
    return results if isinstance(results, tuple) else (results,)


def named(graph: Graph, results: list[Array]) -> list[Array]:
    """The outputs with strings in place of their numbers."""
    lists = [port.labels for port in graph.outputs]
    return [r if names is None else np.asarray(names, object)[np.asarray(r)] for names, r in zip(lists, results)]


def evaluate_sample(graph: Graph, *sample: Array) -> tuple[Array, ...]:
    """The outputs for one sample, in the graph's own shapes."""
    values = interpret(graph, {port.name: value for port, value in zip(graph.inputs, sample)})
    return tuple(values[port.name] for port in graph.outputs)


@compiled_for(1)
def _evaluate(graph: Graph, *inputs: Array) -> list[Array]:
    exact = all(np.shape(x) == port.type.shape for port, x in zip(graph.inputs, inputs))
    if exact:  # one sample in the model's own shape: no axis to map over
        return list(evaluate_sample(graph, *inputs))
    parts = over_samples(partial(evaluate_sample, graph), graph.inputs, inputs)
    return [join(port, part) for port, part in zip(graph.outputs, parts)]


def evaluate(graph: Graph, *inputs: Array) -> Array | tuple[Array, ...]:
    """Evaluates the float model on a batch.

    Args:
        graph: what `import_onnx` gives.
        inputs: one array per model input, in the model's own layout; the batch axis may have any size, also where the
            model was exported with a batch of 1.

    Returns:
        The outputs in the model's layout and dtypes: an array, or a tuple where the model has several outputs. Outputs of
        strings are arrays of str; those of ZipMap are arrays with a column per label.

    Raises:
        DataError: an array does not fit its input.
    """
    if len(inputs) != len(graph.inputs):
        split_all(graph.inputs, inputs)
    if any(isinstance(x, jax.core.Tracer) for x in inputs):
        return unwrap(_evaluate(graph, *inputs))
    arrays = [numbered(port, np.asarray(x)) for port, x in zip(graph.inputs, inputs)]
    for port, array in zip(graph.inputs, arrays):
        if array.dtype.kind not in "biuf" and array.dtype != port.type.dtype:
            raise DataError(f"input {port.name!r} has dtype {array.dtype}; expected {port.type.dtype}")
    with enable_x64():
        return unwrap(
            named(graph, _evaluate(graph, *[a.astype(p.type.dtype, copy=False) for p, a in zip(graph.inputs, arrays)]))
        )
