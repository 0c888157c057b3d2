"""If, Loop and Scan with known conditions and trip counts are inlined; others are refused by name."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build_models import model, node, reference, tensor
from models import as_tuple
from onnx import TensorProto, helper, numpy_helper

import fheq
from fheq.errors import UnsupportedError

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def info(name: str, kind: int = FLOAT, shape: list | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def graph_of(nodes: list, inputs: list, outputs: list, known: dict | None = None) -> onnx.GraphProto:
    values = [numpy_helper.from_array(np.asarray(v), k) for k, v in (known or {}).items()]
    return helper.make_graph(nodes, "body", inputs, outputs, values)


def counting(more: str = "", outer: str = "x") -> onnx.GraphProto:
    """h' = 0.5 * h + outer, with h' as a scan output; goes on as long as the expression `more` says."""
    nodes = [
        node("Mul", ["h", "half"], ["m"]),
        node("Add", ["m", outer], ["next"]),
        node("Identity", ["next"], ["row"]),
        node("Less", ["i", more or "i_max"], ["going"]),
    ]
    inputs = [info("i", INT64, []), info("go", BOOL, []), info("h")]
    known = {"half": np.float32(0.5), "i_max": np.int64(2**40)}
    return graph_of(nodes, inputs, [info("going", BOOL, []), info("next"), info("row")], known)


def run(proto: onnx.ModelProto, *inputs: np.ndarray) -> fheq.Graph:
    """Imports the model, compares with onnxruntime."""
    graph = fheq.import_onnx(proto)
    for got, want in zip(as_tuple(fheq.evaluate(graph, *inputs)), reference(proto, *inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    return graph


def test_a_branch_decided_by_a_shape_and_its_outer_names() -> None:
    """As torch exports a squeeze: both branches make a tensor of one name, and read one of the graph around them."""
    squeeze = graph_of([node("Squeeze", ["r", "axis"], ["out"])], [], [info("out")])
    keep = graph_of([node("Unknown", ["r"], ["out"], domain="own")], [], [info("out")])
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "one"], ["size"]),
        node("Equal", ["size", "one"], ["single"]),
        node("If", ["single"], ["y"], then_branch=squeeze, else_branch=keep),
    ]
    proto = model(nodes, {"x": ["N", 1, 3]}, ["y"], {"one": np.array(1), "axis": np.array([1])}, domains={"own": 1})
    graph = fheq.import_onnx(proto)
    assert [n.op for n in graph.nodes] == ["Relu", "Squeeze"]
    assert graph.outputs[0].batch_axis == 0


def test_a_loop_of_known_length_with_scan_outputs() -> None:
    nodes = [node("Loop", ["trips", "", "x"], ["y", "rows"], body=counting())]
    graph = run(model(nodes, {"x": ["N", 3]}, ["y", "rows"], {"trips": np.int64(3)}), tensor(4, 3))
    assert not {n.op for n in graph.nodes} & {"Loop", "Less", "Identity"}
    assert [port.batch_axis for port in graph.outputs] == [0, 1]
    assert fheq.check(graph) == []


def test_a_loop_until_a_condition_that_counts() -> None:
    nodes = [node("Loop", ["", "yes", "x"], ["y", "rows"], body=counting("limit"))]
    known = {"limit": np.int64(2), "yes": np.bool_(True)}
    graph = run(model(nodes, {"x": ["N", 3]}, ["y", "rows"], known), tensor(4, 3))
    assert graph.outputs[1].type.shape[0] == 3


def test_a_loop_without_iterations_passes_its_states_on() -> None:
    nodes = [node("Loop", ["trips", "", "x"], ["s", "unused"], body=counting()), node("Relu", ["s"], ["y"])]
    assert [n.op for n in run(model(nodes, {"x": ["N", 3]}, ["y"], {"trips": np.int64(0)}), tensor(4, 3)).nodes] == ["Relu"]


def test_control_flow_inside_control_flow_and_functions() -> None:
    """A function with a Loop whose body has an If; names of all three levels and an attribute of the call are read."""
    scaled = node("Constant", [], ["factor"])
    scaled.attribute.append(onnx.AttributeProto(name="value_float", type=onnx.AttributeProto.FLOAT, ref_attr_name="gain"))
    then = graph_of([scaled, node("Mul", ["h", "factor"], ["out"])], [], [info("out")])
    other = graph_of([node("Add", ["h", "a"], ["out"])], [], [info("out")])
    body = graph_of(
        [
            node("Greater", ["i", "zero"], ["later"]),
            node("If", ["later"], ["next"], then_branch=then, else_branch=other),
            node("Identity", ["go"], ["going"]),
        ],
        [info("i", INT64, []), info("go", BOOL, []), info("h")],
        [info("going", BOOL, []), info("next")],
        {"zero": np.int64(0)},
    )
    trips = helper.make_node("Constant", [], ["n"], value_int=3)
    inner = [trips, node("Neg", ["x"], ["a"]), node("Loop", ["n", "", "a"], ["y"], body=body)]
    function = helper.make_function("own", "Repeat", ["x"], ["y"], inner, [helper.make_opsetid("", 15)], ["gain"])
    calls = [
        node("Repeat", ["x"], ["h"], domain="own", gain=0.5),
        node("Repeat", ["h"], ["y"], domain="own", gain=-2.0),
    ]
    run(model(calls, {"x": ["N", 2]}, ["y"], domains={"own": 1}, functions=[function]), tensor(3, 2))


def test_scan_backwards_along_other_axes() -> None:
    body = graph_of(
        [node("Add", ["s", "x"], ["t"]), node("Mul", ["t", "k"], ["o"])],
        [info("s"), info("x")],
        [info("t"), info("o")],
    )
    made = node(
        "Scan",
        ["init", "seq"],
        ["last", "y"],
        body=body,
        num_scan_inputs=1,
        scan_input_axes=[1],
        scan_input_directions=[1],
        scan_output_axes=[-1],
        scan_output_directions=[1],
    )
    known = {"k": tensor(3), "init": tensor(1, 3)}
    graph = run(model([made], {"seq": ["N", 4, 3]}, ["last", "y"], known), tensor(1, 4, 3))
    assert graph.outputs[1].batch_axis == 0


APART = [node("Sub", ["a", "b"], ["d"]), node("Abs", ["d"], ["e"])]
SQUARED = [APART[0], node("ReduceSumSquare", ["d"], ["o"], axes=[1], keepdims=0)]
TURNED = [node("Sub", ["b", "a"], ["d"]), node("ReduceSumSquare", ["d"], ["o"], axes=[-1], keepdims=0)]
CITY = [*APART, node("ReduceSum", ["e", "axes"], ["o"], keepdims=0)]
KING = [*APART, node("ReduceMax", ["e"], ["o"], axes=[1], keepdims=0)]
CUBES = [*APART, node("Pow", ["e", "p"], ["c"]), node("ReduceSum", ["c", "axes"], ["o"], keepdims=0)]
LEAST = [*APART, node("ReduceMin", ["e"], ["o"], axes=[1], keepdims=0)]


@pytest.mark.parametrize(
    ("body", "known"),
    [*((body, True) for body in (SQUARED, TURNED, CITY, KING, CUBES)), (LEAST, False)],
    ids=["squared", "turned", "city", "king", "cubes", "least"],
)
def test_distances_that_are_scanned_become_one_node(body: list, known: bool) -> None:
    """As skl2onnx writes neighbours: unrolled they would take a node, and tables, for each of the training samples. The
    square root of a distance of 0, which the sums of a product miss by float rounding, is 0."""
    constants = {"axes": np.array([1]), "p": np.float32(3)}
    nodes = [*body, node("Identity", ["a"], ["next"]), node("Identity", ["o"], ["row"])]
    scan = graph_of(nodes, [info("a"), info("b")], [info("next"), info("row")], constants)
    made = [
        node("Scan", ["x", "points"], ["last", "s"], body=scan, num_scan_inputs=1),
        node("Transpose", ["s"], ["t"]),
        node("Sqrt", ["t"], ["y"]),
    ]
    x = np.concatenate([tensor(4, 3), 10 + tensor(3, 3)])
    graph = run(model(made, {"x": ["N", 3]}, ["y"], {"points": x[:5]}), x)
    assert ("CDist" in {n.op for n in graph.nodes}) == known
    fheq.calibrate(graph, np.tile(x, (8, 1)))  # refuses what becomes NaN


@pytest.mark.parametrize(
    ("proto", "cause", "remedy"),
    [
        (
            model(
                [
                    node("ReduceMax", ["x"], ["m"], keepdims=0),
                    node("Cast", ["m"], ["c"], to=BOOL),
                    node("If", ["c"], ["y"], then_branch=counting(), else_branch=counting()),
                ],
                {"x": [1, 3]},
                ["y"],
            ),
            "condition 'c' depends on the model's inputs",
            "Where",
        ),
        (
            model(
                [node("Loop", ["n", "", "x"], ["y", "rows"], body=counting())],
                {"x": [1, 3], "n": []},
                ["y"],
                kinds={"n": INT64},
            ),
            "trip count 'n' depends on the model's inputs",
            "fixed number of iterations",
        ),
        (
            model([node("Loop", ["", "", "x"], ["y", "rows"], body=counting())], {"x": [1, 3]}, ["y"]),
            "unrolls to more than",
            "fewer iterations",
        ),
    ],
    ids=["condition", "trip count", "endless"],
)
def test_dynamic_control_flow_is_refused(proto: onnx.ModelProto, cause: str, remedy: str, monkeypatch) -> None:
    monkeypatch.setattr("fheq.onnx.control.MAX_NODES", 200)
    with pytest.raises(UnsupportedError, match="make_y"):
        fheq.import_onnx(proto)
    (found,) = fheq.check(proto)
    assert found.node.startswith("node 'make_y'") and cause in found.cause and remedy in found.remedy


def test_functions_with_defaults_optional_inputs_and_opsets_of_their_own() -> None:
    """The inner function states opset 12 (axes as attributes), the model 17; an absent input stays absent; an attribute
    that the call leaves out has its default, and one that a nested call refers to is handed on."""
    clip = node("Clip", ["a", "low", "high"], ["c"])
    squeeze = node("Unsqueeze", ["c"], ["d"], axes=[1])
    inner = helper.make_function(
        "own", "Bounded", ["a", "low", "high"], ["d"], [clip, squeeze], [helper.make_opsetid("", 12)]
    )
    leaky = node("LeakyRelu", ["e"], ["f"])
    leaky.attribute.append(onnx.AttributeProto(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="slope"))
    outer = helper.make_function(
        "own",
        "Layer",
        ["x", "high"],
        ["f"],
        [node("Bounded", ["x", "", "high"], ["e"], domain="own"), leaky],
        [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)],
        attribute_protos=[helper.make_attribute("slope", 0.25)],
    )
    nodes = [
        node("Layer", ["x", "top"], ["h"], domain="own"),
        node("Squeeze", ["h", "axis"], ["g"]),
        node("Layer", ["g"], ["y"], domain="own", slope=-0.5),
    ]
    known = {"top": np.float32(0.3), "axis": np.array([1])}
    proto = model(nodes, {"x": ["N", 4]}, ["y"], known, domains={"own": 1}, functions=[inner, outer])
    flat = []
    for begin, end, slope in (("x", "h", 0.25), ("g", "y", -0.5)):
        flat += [
            node("Clip", [begin, "", "top"], [f"{begin}1"]),
            node("Unsqueeze", [f"{begin}1", "axis"], [f"{begin}2"]),
            node("LeakyRelu", [f"{begin}2"], [end], alpha=slope),
        ]
    flat.insert(3, node("Squeeze", ["h", "axis"], ["g"]))
    x = tensor(3, 4)
    (want,) = reference(model(flat, {"x": ["N", 4]}, ["y"], known), x)  # no runtime at hand takes functions of mixed opsets
    np.testing.assert_allclose(fheq.evaluate(fheq.import_onnx(proto), x), want, rtol=1e-6)
