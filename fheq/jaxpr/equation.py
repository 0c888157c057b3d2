"""One equation of a jaxpr, as a rule reads it and writes nodes for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from fheq.errors import UnsupportedError
from fheq.graph import Node, TensorType
from fheq.rewriting.edit import VERSION, Draft
from fheq.rewriting.gather import with_known_inputs


@dataclass(frozen=True)
class Equation:
    """See the module's docstring.

    Args:
        draft: takes the nodes.
        origin: what the nodes stand for.
        inputs: names of the tensors that the equation reads.
        params: the primitive's parameters.
        avals: types of what it makes.
    """

    draft: Draft
    origin: Node
    inputs: tuple[str, ...]
    params: dict[str, Any]
    avals: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) result."""
        return tuple(self.avals[0].shape)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.draft.types[name].shape

    def dtype_of(self, name: str) -> np.dtype:
        """Type of a tensor's elements."""
        return self.draft.types[name].dtype

    def is_known(self, name: str) -> bool:
        """Whether a tensor is known before any data is."""
        return name in self.draft.constants

    def known(self, name: str, what: str) -> np.ndarray:
        """The value of a tensor that must be known."""
        if not self.is_known(name):
            raise UnsupportedError(f"{what} depends on data; it must be known")
        return self.draft.constants[name]

    def apply(self, op: str, *inputs: str, **attrs: Any) -> str:
        """One node; the name of its result."""
        return self.draft.apply(self.origin, op, *inputs, **attrs)

    def integers(self, values: Any, shape: tuple[int, ...] | None = None) -> str:
        """A known tensor of integers (axes, shapes, indices)."""
        array = np.asarray(values, np.int64)
        return self.draft.constant(f"{self.origin.name}/integers", array if shape is None else array.reshape(shape))

    def number(self, value: Any, like: str) -> str:
        """A known scalar of a tensor's type."""
        return self.draft.constant(f"{self.origin.name}/number", np.asarray(value, self.dtype_of(like)))

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """A tensor in another shape."""
        return x if self.shape_of(x) == tuple(shape) else self.apply("Reshape", x, self.integers(shape), allowzero=1)

    def transpose(self, x: str, order: Any) -> str:
        """A tensor with its axes in another order."""
        same = tuple(order) == tuple(range(len(self.shape_of(x))))
        return x if same else self.apply("Transpose", x, perm=tuple(int(axis) for axis in order))

    def rows(self, x: str, indices: str, axis: int) -> str:
        """Rows of a tensor by computed indices."""
        out = self.draft.fresh(f"{self.origin.name}/rows")
        node = Node(self.origin.name, "Gather", (x, indices), (out,), MappingProxyType({"axis": axis}), "", VERSION)
        for part in with_known_inputs(node, self.draft.types, self.draft.constants) or ():
            if part.op == "Constant":
                value = part.attrs["value"]
                self.draft.constants[part.outputs[0]] = value
                self.draft.types[part.outputs[0]] = TensorType(value.shape, value.dtype)
            else:
                self.draft.write(part)
        return out
