"""`check`: everything that keeps a model from running on encrypted data, found without data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fheq.errors import DataError, FheqError, ModelError, QuantizationError, ShapeError, UnsupportedError, describe
from fheq.graph import Graph, Node
from fheq.plan import Planner, plan
from fheq.rewrites import decompose

if TYPE_CHECKING:
    from fheq.onnx.loading import Source

_NODE = re.compile(r"^(node .+? \(.*?, output .*?\)):? (.*)$", re.DOTALL)
_REMEDIES: dict[type[FheqError], str] = {
    ModelError: "repair the model or export it again",
    UnsupportedError: "rewrite the node with operators that fheq supports",
    ShapeError: "export the model with static shapes, or give dims={symbol: size}",
    QuantizationError: "change the quantizers that the model states",
    DataError: "correct the data",
}


@dataclass(frozen=True)
class Problem:
    """What keeps a model from working.

    Args:
        node: the node (name, operator, output), or "the model".
        cause: what is wrong.
        remedy: what to do.
    """

    node: str
    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.node}: {self.cause}; {self.remedy}"


def check(model: Source | Graph, *, dims: Mapping[str, int] | None = None) -> list[Problem]:
    """Every problem of a model, one per node where that is possible; none when it will work.

    Args:
        model: path, bytes, `onnx.ModelProto`, or an imported `Graph`.
        dims: as for `import_onnx`.
    """
    if isinstance(model, Graph):
        graph = model
    else:
        from fheq.onnx import import_onnx
        from fheq.onnx.importer import problems

        found = problems(model, dims=dims)
        if found:
            return _unique(found)
        graph = import_onnx(model, dims=dims)
    return _unique([*_not_a_number(graph), *_unplanned(graph)])


def _unique(errors: list[FheqError]) -> list[Problem]:
    return list(dict.fromkeys(problem(error) for error in errors))


def problem(error: FheqError) -> Problem:
    """An error of fheq taken apart."""
    text = str(error)
    match = _NODE.match(text)
    node, rest = (match.group(1), match.group(2)) if match else ("the model", text.removeprefix("the model: "))
    cause, separator, remedy = rest.rpartition("; ")
    if not separator:
        known = next((r for kind, r in _REMEDIES.items() if isinstance(error, kind)), "see the message")
        cause, remedy = rest, known
    return Problem(node, cause, remedy)


def _not_a_number(graph: Graph) -> Iterator[FheqError]:
    """Nodes that read a known tensor with NaN in it."""
    bad = {name for name, v in graph.constants.items() if v.dtype.kind == "f" and np.any(np.isnan(v))}
    for node in graph.nodes if bad else ():
        for name in node.inputs:
            if name in bad:
                yield ModelError(f"{describe(node)}: its tensor {name!r} contains NaN; train or export the model again")


def _unplanned(graph: Graph) -> list[FheqError]:
    """Nodes without an integer form, and what lowering refuses whatever the data."""
    try:
        collector = _Collector(decompose(graph))
        if collector.errors:
            return collector.errors
        layout = plan(graph)
    except FheqError as error:
        return [error]
    missing = [port.name for port in graph.outputs if port.name not in layout.regions]
    return [UnsupportedError(f"output {name!r} does not depend on the inputs; drop it from the model") for name in missing]


class _Collector(Planner):
    """Plans on past nodes without an integer form, as if their results were new inputs."""

    def __init__(self, graph: Graph):
        self.errors: list[FheqError] = []
        super().__init__(graph)

    def visit(self, node: Node) -> None:
        try:
            super().visit(node)
        except FheqError as error:
            self.errors.append(error)
            for out in node.outputs:
                if out:
                    self.begin(out, quantized=True)
