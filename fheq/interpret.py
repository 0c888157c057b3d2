"""The one loop over nodes.

`interpret` evaluates a graph for one sample. Calibration *reaps* values with a tap, fake quantization *plants* others: a
tap sees every tensor as it is made and returns what the rest of the graph shall read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from fheq.errors import FheqError, ShapeError
from fheq.graph import Graph, Node, describe
from fheq.ops.table import lookup

Tap = Callable[[str, Any], Any]


def run_node(node: Node, read: Callable[[str], Any], constants: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
    """The outputs of one node, its inputs being read by name.

    Raises:
        ShapeError: an input that must be known is computed from data, or shapes do not fit.
    """
    op = lookup(node)
    values: list[Any] = []
    for position, name in enumerate(node.inputs):
        if not name:
            values.append(None)
        elif op.is_static(position):
            if name not in constants:
                raise ShapeError(
                    f"{describe(node)}: input {position} ({name!r}) must be known before evaluation, but it is computed "
                    "from the model's inputs; make it a constant of the model: shapes, counts and places may not be secret"
                )
            values.append(constants[name])
        else:
            values.append(read(name))
    try:
        result = op.evaluate(node, *values)
    except FheqError:
        raise
    except (TypeError, ValueError, IndexError, KeyError, ZeroDivisionError, AssertionError, NotImplementedError) as error:
        raise ShapeError(f"{describe(node)}: cannot be evaluated on these inputs: {_first_line(error)}") from error
    return result if isinstance(result, tuple) else (result,)


def interpret(
    graph: Graph, inputs: Mapping[str, Any], *, tap: Tap | None = None, targets: Iterable[str] | None = None
) -> dict[str, Any]:
    """Evaluates the graph for one sample.

    Args:
        inputs: values of the graph's inputs by name, in the graph's own shapes (a batch axis is 1).
        tap: called as `tap(name, value)` for every input and every computed tensor; what it returns is used instead.
        targets: names of the tensors to return; the graph's outputs by default.
    """
    tap = tap or (lambda _, value: value)
    env: dict[str, Any] = {name: tap(name, value) for name, value in inputs.items()}

    def read(name: str) -> Any:
        return env[name] if name in env else jnp.asarray(graph.constants[name])

    for node in graph.nodes:
        for name, value in zip(node.outputs, run_node(node, read, graph.constants)):
            if name:
                env[name] = tap(name, value)
    names = [port.name for port in graph.outputs] if targets is None else targets
    return {name: read(name) for name in names}


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
