"""The op table as mappings by operator name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fheq.graph import Node
from fheq.ops import Kind, Op, rows

T = TypeVar("T")
INTERNAL = "fheq"  # the domain of nodes that only fheq makes


@dataclass(frozen=True)
class FloatImplementation:
    """The float semantics of one operator, at the newest opset that its row covers.

    Calling it with arrays (None for an absent optional input) and the operator's attributes as keywords (the schema's
    defaults hold for the others) gives an array, or a tuple where the operator has several outputs. `outputs` says how many
    outputs to compute where that is open (Split).
    """

    op: Op

    @property
    def __name__(self) -> str:
        return self.op.name

    def __call__(self, *arrays: Any, outputs: int = 1, **attributes: Any) -> Any:
        version, attrs = _attributes(self.op, attributes)
        inputs = tuple("" if a is None else f"x{i}" for i, a in enumerate(arrays))
        names = tuple(f"y{i}" for i in range(outputs))
        node = Node(self.op.name, self.op.name, inputs, names, attrs, self.op.domain, version)
        return self.op.evaluate(node, *arrays)


def _attributes(op: Op, given: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """The newest opset, and all attributes of the operator there."""
    from onnx import defs
    from onnx.helper import make_attribute

    from fheq.onnx.attributes import read_attributes, schema_of

    version = defs.onnx_opset_version() if not op.domain else op.since
    schema = schema_of(op.name, version, op.domain)
    protos = [make_attribute(name, value) for name, value in given.items()]
    return version, read_attributes(protos, schema, op.name)


class _ByName(Mapping[str, T], Generic[T]):
    """The newest row of every operator, live: rows that are registered later are seen."""

    def __init__(self, keep: Callable[[Op], bool], value: Callable[[Op], T]):
        self._keep = keep
        self._value = value

    def _rows(self) -> dict[str, Op]:
        found: dict[str, Op] = {}
        for row in rows():
            known = found.get(row.name)
            if row.domain != INTERNAL and self._keep(row) and (known is None or known.domain == row.domain):
                found[row.name] = row
        return found

    def __getitem__(self, name: str) -> T:
        return self._value(self._rows()[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows())

    def __len__(self) -> int:
        return len(self._rows())

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{name!r}: ...' for name in self)}}}"


ONNX_OPS_TO_JAX_IMPL: Mapping[str, FloatImplementation] = _ByName(lambda op: True, FloatImplementation)
ONNX_OPS_TO_NUMPY_IMPL = ONNX_OPS_TO_JAX_IMPL
ONNX_OPS_TO_QUANTIZED_IMPL: Mapping[str, Kind] = _ByName(lambda op: op.kind is not Kind.CLIENT, lambda op: op.kind)
"""Operators that run on encrypted data, and how they are lowered (see `Kind`)."""
