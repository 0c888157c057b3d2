"""`from_jax`: a JAX function as the graph of one sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from fheq.batching import doubled_axis, example_arrays
from fheq.errors import DataError, UnsupportedError
from fheq.graph import Graph, Node, Port, TensorType
from fheq.jaxpr.walk import Walker
from fheq.rewrites import DEFAULT_REWRITES
from fheq.rewriting.edit import VERSION, Draft

MIXED = 1e-3  # relative difference above which a sample's outputs depend on other samples


def from_jax(fn: Callable[..., Any], *example: Any) -> Graph:
    """A JAX function of batches as the graph of one sample. What it closes over (parameters) becomes constants.

    Args:
        fn: traceable by `jax.make_jaxpr`; from arrays to arrays (any pytree of them), samples along axis 0 of each input.
            Loops must have a static number of steps. Bind parameters first: `lambda x: model.apply(params, x)`.
        example: one array per argument, samples along axis 0. With two samples or more it is checked that none depends on
            the others.

    Returns:
        The graph, with inputs x0, x1, ... and outputs y0, y1, ... (the leaves of what `fn` returns).

    Raises:
        DataError: an example without samples, or outputs that mix samples.
        UnsupportedError: a primitive that has no form here, named with the line of `fn` that uses it.
    """
    arrays = example_arrays(example)
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*(x[:1] for x in arrays))
    _check_independent(fn, arrays)
    ports = tuple(
        Port(f"x{i}", TensorType((1, *x.shape[1:]), np.dtype(v.aval.dtype)), 0)
        for i, (x, v) in enumerate(zip(arrays, closed.jaxpr.invars))
    )
    types = MappingProxyType({port.name: port.type for port in ports})
    draft = Draft(Graph((), ports, (), MappingProxyType({}), types))
    walker = Walker(draft)
    found = [walker.name(value) for value in walker.closed(closed, [port.name for port in ports])]
    axes = _batch_axes(fn, arrays, [leaf.shape for leaf in jax.tree.leaves(shape)])
    outputs = []
    for i, (name, axis) in enumerate(zip(found, axes)):
        out = f"y{i}"
        draft.write(Node(out, "Identity", (name,), (out,), MappingProxyType({}), "", VERSION))
        outputs.append(Port(out, draft.types[out], axis))
    draft.graph = draft.graph.replace(outputs=tuple(outputs))
    return reduce(lambda graph, rewrite: rewrite(graph), DEFAULT_REWRITES, draft.finish())


def _check_independent(fn: Callable[..., Any], arrays: Sequence[np.ndarray]) -> None:
    if len(arrays[0]) < 2:
        return
    both, first = (jax.tree.leaves(fn(*(x[:n] for x in arrays))) for n in (2, 1))
    for i, (two, one) in enumerate(zip(both, first)):
        axis = doubled_axis(np.shape(one), np.shape(two))
        part = two if axis is None else np.take(np.asarray(two), np.arange(np.shape(one)[axis]), axis=axis)
        a, b = np.asarray(part, np.float64), np.asarray(one, np.float64)
        if a.shape != b.shape or not np.allclose(a, b, rtol=0, atol=MIXED * max(1e-30, np.max(np.abs(b), initial=0))):
            raise DataError(
                f"output {i} of a sample depends on the other samples of its batch (or on the size of the batch); "
                "fheq maps functions over samples, so make it a function of each sample (jax.vmap does)"
            )


def _batch_axes(fn: Callable[..., Any], arrays: Sequence[np.ndarray], one: Sequence[tuple[int, ...]]) -> list[int | None]:
    """For each output, the axis that doubles with a batch of two."""
    doubled = [jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype) for x in arrays]
    try:
        two = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(fn, *doubled))]
    except (TypeError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise UnsupportedError(
            f"the function takes no batch of two samples: {cause}; use jax.vmap for one of a sample"
        ) from error
    return [doubled_axis(a, b) for a, b in zip(one, two)]
