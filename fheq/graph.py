"""The graph of one sample: what import gives and every transform takes.

A graph describes the computation for **one sample**: every shape is static, a batch axis has size 1. Functions that take
batches map the graph over the samples (see `fheq.batching`), which is also what an encrypted circuit does.
"""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.dtypes import issubdtype

if TYPE_CHECKING:
    from fheq.affine import Affine


def _view(values: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(values)


copyreg.pickle(MappingProxyType, lambda view: (_view, (dict(view),)))  # graphs travel between processes


def is_float(dtype: np.dtype) -> bool:
    """Whether a type is one of floating-point numbers, those that numpy itself lacks (bfloat16) among them."""
    return bool(issubdtype(dtype, np.floating))


@dataclass(frozen=True)
class TensorType:
    """Shape (of one sample, a batch axis being 1) and numpy dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Port:
    """An input or output of the graph.

    `type.shape` is the shape inside the graph. `batch_axis` is the axis along which the samples of a batch are joined: for
    an input its size there is 1; for an output it may be larger (a reshape that folds the batch into another axis). None
    means that the graph has no such axis, and batches get a new leading one. `labels`: for strings, those that its integers
    stand for, sorted. `missing`: of an input, flat, what stands for NaN; None where NaN may not be.
    """

    name: str
    type: TensorType
    batch_axis: int | None = 0
    labels: tuple[str, ...] | None = None
    missing: tuple[float | None, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch axis."""
        shape, axis = self.type.shape, self.batch_axis
        if axis is None or shape[axis] != 1:
            return shape
        return shape[:axis] + shape[axis + 1 :]


@dataclass(frozen=True)
class Node:
    """One operator application.

    Args:
        name: the model's name for the node; may be empty.
        op: operator type, such as "Gemm".
        inputs: tensor names; "" marks an absent optional input.
        outputs: tensor names; "" marks an output that nobody reads.
        attrs: every attribute, the schema's defaults included. Tensors are numpy arrays, strings are str.
        domain: "" for ai.onnx.
        version: the opset of `domain` that the model imports.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    domain: str = ""
    version: int = 0


def describe(node: Node) -> str:
    """One phrase that finds a node in a model: its name, operator and first output."""
    name = repr(node.name) if node.name else "(unnamed)"
    domain = f"{node.domain}." if node.domain else ""
    output = next((o for o in node.outputs if o), "")
    return f"node {name} ({domain}{node.op}, output {output!r})"


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in topological order, with the known tensors and the type of every tensor.

    Args:
        constants: known tensors by name (weights, folded subgraphs).
        types: the type of every tensor, constants included.
        pinned: quantizers that the model itself states (QAT and QDQ graphs), by the name of the quantized tensor.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    constants: Mapping[str, np.ndarray]
    types: Mapping[str, TensorType]
    pinned: Mapping[str, Affine] = field(default_factory=dict)

    def replace(self, **changes: Any) -> Graph:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def producers(self) -> Mapping[str, Node]:
        """Tensor name to the node that computes it."""
        return self._producers

    @cached_property
    def _producers(self) -> Mapping[str, Node]:
        return MappingProxyType({out: node for node in self.nodes for out in node.outputs if out})

    def consumers(self) -> Mapping[str, list[Node]]:
        """Tensor name to the nodes that read it (each once), in topological order."""
        return self._consumers

    @cached_property
    def _consumers(self) -> Mapping[str, list[Node]]:
        readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                if name:
                    readers.setdefault(name, []).append(node)
        return MappingProxyType(readers)
