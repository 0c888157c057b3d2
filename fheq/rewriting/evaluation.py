"""One node: its values where they are known, else the types of its outputs; neither without a bound on their size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import enable_x64

from fheq.errors import FheqError, ShapeError
from fheq.graph import Node, TensorType, describe
from fheq.interpret import run_node
from fheq.ops.table import lookup

MAX_ELEMENTS = 2**28


def evaluated(node: Node, known: Mapping[str, np.ndarray], types: Mapping[str, TensorType]) -> dict[str, np.ndarray]:
    """Values of a node whose result depends on known tensors and shapes alone."""
    _guard_announced(node, known)
    if node.op != "Constant":
        output_types(node, known, types)

    def read(name: str) -> Any:
        if name in known:
            return jnp.asarray(known[name])
        return np.broadcast_to(np.zeros((), types[name].dtype), types[name].shape)

    results = guarded(node, lambda: run_node(node, read, known))
    return {name: np.asarray(value) for name, value in zip(node.outputs, results) if name}


def output_types(node: Node, known: Mapping[str, np.ndarray], types: Mapping[str, TensorType]) -> dict[str, TensorType]:
    """Types of the outputs of one node, by abstract evaluation.

    Raises:
        ShapeError: the node does not fit its inputs, or an output has more than 2**28 elements.
    """
    op = lookup(node)
    data = list(dict.fromkeys(n for i, n in enumerate(node.inputs) if n and not op.is_static(i)))

    def run(*values: Any) -> tuple[Any, ...]:
        return run_node(node, dict(zip(data, values)).__getitem__, known)

    _guard_announced(node, known)
    shapes = [jax.ShapeDtypeStruct(types[name].shape, types[name].dtype) for name in data]
    results = guarded(node, lambda: jax.eval_shape(run, *shapes))
    found = {name: TensorType(tuple(r.shape), np.dtype(r.dtype)) for name, r in zip(node.outputs, results) if name}
    for kind in found.values():
        _guard_size(node, math.prod(kind.shape), kind.shape)
    return found


def type_of(value: np.ndarray) -> TensorType:
    """The type of a known tensor."""
    return TensorType(tuple(value.shape), value.dtype)


def guarded(node: Node, call: Callable[[], Any]) -> Any:
    """What a call gives in 64 bits, its failure being that of a node.

    Raises:
        ShapeError: the call failed.
    """
    try:
        with enable_x64(), np.errstate(all="ignore"):
            return call()
    except FheqError:
        raise
    except Exception as error:
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise ShapeError(f"{describe(node)}: cannot be evaluated on these inputs: {cause}") from error


def _guard_announced(node: Node, known: Mapping[str, np.ndarray]) -> None:
    """Refuses huge results of the ops that say their size in known tensors."""
    values = [known.get(name) for name in node.inputs]
    if node.op == "ConstantOfShape" and values and values[0] is not None:
        dims = [int(d) for d in values[0].ravel()]
        _guard_size(node, math.prod(dims), dims)
    if node.op == "Range" and len(values) == 3 and all(v is not None and v.size == 1 for v in values):
        start, limit, delta = (float(v.item()) for v in values if v is not None)
        count = (limit - start) / delta if delta else math.inf
        _guard_size(node, count if math.isfinite(count) else math.inf, (start, limit, delta))


def _guard_size(node: Node, count: float, shape: Any) -> None:
    if count > MAX_ELEMENTS:
        raise ShapeError(f"{describe(node)}: its result would have more than {MAX_ELEMENTS} elements ({tuple(shape)})")
