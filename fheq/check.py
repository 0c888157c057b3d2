"""`check`: everything that keeps a model from running on encrypted data, found without data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fheq.client.outputs import split
from fheq.errors import DataError, FheqError, ModelError, QuantizationError, ShapeError, UnsupportedError
from fheq.graph import Graph, Node, Port, describe, is_float
from fheq.planning.plan import Plan, plan
from fheq.planning.planner import walked
from fheq.planning.prediction import largest_sum, predicted_tables, tables_by_node
from fheq.rewrites import decompose

if TYPE_CHECKING:
    from fheq.onnx.declarations import Input
    from fheq.onnx.loading import Source

_NODE = re.compile(r"^(node .+? \(.*?, output .*?\)):? (.*)$", re.DOTALL)
_REMEDIES: dict[type[FheqError], str] = {
    ModelError: "repair the model or export it again",
    UnsupportedError: "rewrite the node with operators that fheq supports",
    ShapeError: "export the model with static shapes, or give dims={symbol: size}",
    QuantizationError: "change the quantizers that the model states",
    DataError: "correct the data",
}
_LIGHTER = {
    ("ArrayFeatureExtractor", "Gather", "GatherElements", "GatherND", "LabelEncoder", "OneHot"): (
        "a look-up takes a table for each row that it may find; make the rows an input, looked up before encryption"
    ),
    ("ArgMax", "ArgMin", "Hardmax", "LogSoftmax", "Softmax", "TopK"): (
        "choose among fewer elements, or end the model with it, where the client computes it without tables"
    ),
    ("CDist", "Scan"): "distances to fewer points, to centres of clusters for instance, take fewer",
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


@dataclass(frozen=True)
class Heavy:
    """A node that takes many tables.

    Args:
        node: the node (name, operator, output).
        tables: table applications of one sample.
        remedy: what would need fewer; "" where only a smaller layer would.
    """

    node: str
    tables: int
    remedy: str


@dataclass(frozen=True)
class Survey:
    """What can be said of a model without data.

    Args:
        inputs: name, dtype and shape of each, a batch or open axis by its symbol.
        outputs: the same for outputs; empty where the model cannot be imported.
        ops: operators of the model (functions inlined, what no output needs left out) with their counts.
        tables: table applications of one sample by kind, see `fheq.planning.prediction`; None where there are problems.
        heaviest: the node of the model with the most table applications; None where there are none.
        terms: of the largest sum of products; at n bits its accumulator takes up to 2 n + log2(terms) bits.
        problems: as `check` gives them.
    """

    inputs: tuple[tuple[str, str, tuple[int | str, ...]], ...]
    outputs: tuple[tuple[str, str, tuple[int | str, ...]], ...]
    ops: Mapping[str, int]
    tables: Mapping[str, int] | None
    heaviest: Heavy | None
    terms: int
    problems: tuple[Problem, ...]


def check(model: Source | Graph, *, dims: Mapping[str, int] | None = None) -> list[Problem]:
    """Every problem of a model, one per node where that is possible; none when it will work.

    Args:
        model: path, bytes, `onnx.ModelProto`, or an imported `Graph`.
        dims: as for `import_onnx`.
    """
    return list(survey(model, dims=dims).problems)


def survey(model: Source | Graph, *, dims: Mapping[str, int] | None = None) -> Survey:
    """A model's inputs, operators, tables and problems.

    Args:
        model: path, bytes, `onnx.ModelProto`, or an imported `Graph`.
        dims: as for `import_onnx`.
    """
    if isinstance(model, Graph):
        graph, nodes, errors = model, model.nodes, []
        declared: tuple[Input, ...] = ()
    else:
        from fheq.onnx.importer import examine

        examined = examine(model, dims=dims)
        graph, errors = examined.graph or Graph((), (), (), {}, {}), examined.errors
        nodes = examined.parsed.nodes if examined.parsed else ()
        declared = examined.parsed.inputs if examined.parsed else ()
    layout: Plan | None = None
    if not errors:
        errors = list(_not_a_number(graph))
        layout, more = _planned(graph)
        errors += more
    stated = tuple((i.name, str(i.dtype), tuple("?" if d is None else d for d in i.dims or ())) for i in declared)
    return Survey(
        stated if stated and not graph.inputs else tuple(map(_port, graph.inputs)),
        tuple(map(_port, graph.outputs)),
        Counter(f"{node.domain}.{node.op}" if node.domain else node.op for node in nodes),
        None if errors or layout is None else predicted_tables(layout),
        None if errors or layout is None else _heaviest(layout, nodes),
        0 if layout is None else largest_sum(layout),
        tuple(_unique(errors)),
    )


def _heaviest(layout: Plan, nodes: Iterable[Node]) -> Heavy | None:
    for node, count in tables_by_node(layout, nodes)[:1]:
        return Heavy(describe(node), count, next((text for ops, text in _LIGHTER.items() if node.op in ops), ""))
    return None


def _port(port: Port) -> tuple[str, str, tuple[int | str, ...]]:
    shape = tuple("N" if i == port.batch_axis and d == 1 else d for i, d in enumerate(port.type.shape))
    return port.name, str(port.type.dtype), shape


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
    bad = {name for name, v in graph.constants.items() if is_float(v.dtype) and np.any(np.isnan(v))}
    for node in graph.nodes if bad else ():
        for name in node.inputs:
            if name in bad:
                yield ModelError(f"{describe(node)}: its tensor {name!r} contains NaN; train or export the model again")


def _planned(graph: Graph) -> tuple[Plan | None, list[FheqError]]:
    """The plan; or nodes without an integer form, and what lowering refuses whatever the data."""
    try:
        layout = plan(graph)
    except FheqError as error:
        found: list[FheqError] = []
        try:
            walked(decompose(split(graph)[0]), found.append)
        except FheqError as other:
            found = [other]
        return None, found or [error]
    missing = [port.name for port in layout.graph.outputs if port.name not in layout.regions]
    return layout, [
        UnsupportedError(f"output {name!r} does not depend on the inputs; drop it from the model") for name in missing
    ]
