"""What import makes of models: batch axes, static shapes, folding, functions and opsets."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build_models import cnn, mlp, model, node, reference, tensor
from onnx import TensorProto, helper

import fheq
from fheq.errors import ShapeError, UnsupportedError
from fheq.onnx import problems


def check(proto: onnx.ModelProto, *inputs: np.ndarray, **options) -> fheq.Graph:
    """Imports, compares with onnxruntime, and returns the graph."""
    graph = fheq.import_onnx(proto, **options)
    got = fheq.evaluate(graph, *inputs)
    for a, b in zip(got if isinstance(got, tuple) else (got,), reference(proto, *inputs)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    return graph


def ops(graph: fheq.Graph) -> list[str]:
    return [n.op for n in graph.nodes]


def test_sources(tmp_path):
    proto, x = mlp(), tensor(3, 4)
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    want = reference(proto, x)[0]
    for source in (proto, proto.SerializeToString(), str(path), path):
        np.testing.assert_allclose(fheq.evaluate(fheq.import_onnx(source), x), want, atol=1e-6)


def test_external_data(tmp_path):
    proto, x = mlp(), tensor(3, 4)
    want = reference(proto, x)[0]
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, size_threshold=0, location="weights.bin")
    np.testing.assert_allclose(fheq.evaluate(fheq.import_onnx(path), x), want, atol=1e-6)


def test_batch_axis_and_shape_folding():
    graph = check(cnn(), tensor(5, 1, 6, 6))
    assert ops(graph) == ["Conv", "Relu", "MaxPool", "Reshape", "Gemm"]
    (inp,), (out,) = graph.inputs, graph.outputs
    assert (inp.type.shape, inp.batch_axis, inp.shape) == ((1, 1, 6, 6), 0, (1, 6, 6))
    assert (out.type.shape, out.batch_axis) == ((1, 3), 0)
    assert set(graph.types) >= set(graph.constants) | {n for node in graph.nodes for n in node.outputs}


def test_batch_axis_that_is_not_the_first():
    proto = model([node("Transpose", ["x"], ["y"], perm=[1, 2, 0])], {"x": [3, "N", 2]}, ["y"])
    graph = fheq.import_onnx(proto)
    assert graph.inputs[0].batch_axis == 1
    assert graph.outputs[0].batch_axis == 0
    x = tensor(3, 4, 2)
    np.testing.assert_array_equal(fheq.evaluate(graph, x), x.transpose(1, 2, 0))


def test_batch_folded_into_another_axis():
    proto = model([node("Reshape", ["x", "s"], ["y"])], {"x": ["N", 6]}, ["y"], {"s": np.array([-1, 2])})
    graph = check(proto, tensor(4, 6))
    assert (graph.outputs[0].type.shape, graph.outputs[0].batch_axis) == ((3, 2), 0)


def test_squeeze_without_axes_keeps_the_batch():
    graph = check(model([node("Squeeze", ["x"], ["y"])], {"x": ["N", 1, 3, 1]}, ["y"]), tensor(4, 1, 3, 1))
    assert (graph.outputs[0].type.shape, graph.outputs[0].batch_axis) == ((1, 3), 0)


def test_outputs_without_a_batch():
    nodes = [node("Relu", ["x"], ["y"]), node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=0)]
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 3]}, ["y", "mean", "k"], {"k": tensor(3)}))
    assert [port.batch_axis for port in graph.outputs] == [0, None, None]


def test_model_pinned_to_one_sample():
    proto = model([node("Reshape", ["x", "s"], ["y"])], {"x": ["N", 6]}, ["y"], {"s": np.array([1, 2, 3])})
    assert fheq.import_onnx(proto).outputs[0].batch_axis == 0


@pytest.mark.parametrize(("shape", "axis"), [((1, 4), 0), ((3, 4), None), ((), None)])
def test_static_inputs(shape, axis):
    graph = fheq.import_onnx(model([node("Relu", ["x"], ["y"])], {"x": shape}, ["y"]))
    assert graph.inputs[0].type.shape == shape
    assert (graph.inputs[0].batch_axis, graph.outputs[0].batch_axis) == (axis, axis)


def test_dims():
    proto = model([node("GlobalAveragePool", ["x"], ["y"])], {"x": ["N", 2, "height", None]}, ["y"])
    with pytest.raises(ShapeError, match=r"'x': axis 2.*dims=\{'height': 32\}"):
        fheq.import_onnx(proto)
    graph = check(proto, tensor(2, 2, 5, 7), dims={"height": 5, "x[3]": 7})
    assert graph.inputs[0].type.shape == (1, 2, 5, 7)
    for dims in ({"height": 0}, {"height": True}, {"heigth": 5}, {"height": 2.5}):
        with pytest.raises(ShapeError, match="dims"):
            fheq.import_onnx(proto, dims=dims)


def test_dims_decide_which_axis_is_the_batch():
    proto = model([node("Relu", ["x"], ["y"])], {"x": ["time", "batch", 3]}, ["y"])
    graph = fheq.import_onnx(proto, dims={"time": 7})
    assert (graph.inputs[0].type.shape, graph.inputs[0].batch_axis) == ((7, 1, 3), 1)


def test_batch_symbol_on_two_axes_of_one_input():
    proto = model([node("Relu", ["x"], ["y"])], {"x": ["N", "N"]}, ["y"])
    with pytest.raises(ShapeError, match="the batch"):
        fheq.import_onnx(proto)


def test_unknown_rank():
    with pytest.raises(ShapeError, match="'x' has no shape"):
        fheq.import_onnx(model([node("Relu", ["x"], ["y"])], {"x": None}, ["y"]))


def test_initializers_listed_as_inputs_and_unused_inputs():
    proto = model([node("Add", ["x", "b"], ["y"])], {"x": ["N", 3], "b": [3], "z": ["N", 2]}, ["y"], {"b": tensor(3)})
    graph = fheq.import_onnx(proto)
    assert [port.name for port in graph.inputs] == ["x", "z"]
    assert list(graph.constants) == ["b"]


def test_integers_stay_wide():
    nodes = [node("Mul", ["k", "k"], ["big"]), node("Add", ["x", "big"], ["y"])]
    kinds = {"x": TensorProto.INT64, "y": TensorProto.INT64}
    graph = check(model(nodes, {"x": ["N", 2]}, ["y"], {"k": np.array([2**31, 3])}, kinds=kinds), np.array([[1, 2]]))
    assert graph.constants["big"].dtype == np.int64
    assert graph.constants["big"][0] == 2**62


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_other_float_weights(kind):
    weights = helper.make_tensor("w", kind, [2, 2], [1.0, 2.0, 0.5, -1.0])
    nodes = [node("Cast", ["w"], ["v"], to=TensorProto.FLOAT), node("MatMul", ["x", "v"], ["y"])]
    proto = model(nodes, {"x": ["N", 2]}, ["y"])
    proto.graph.initializer.append(weights)
    graph = fheq.import_onnx(proto)
    np.testing.assert_array_equal(graph.constants["v"], np.float32([[1, 2], [0.5, -1]]))


def test_sparse_initializer():
    values = helper.make_tensor("w", TensorProto.FLOAT, [2], [3.0, 4.0])
    proto = model([node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 2]}, ["y"])
    for indices in ([1, 2], [[0, 1], [1, 0]]):
        flat = helper.make_tensor("", TensorProto.INT64, np.shape(indices), np.ravel(indices))
        proto.graph.ClearField("sparse_initializer")
        proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, flat, [2, 2]))
        np.testing.assert_array_equal(fheq.import_onnx(proto).constants["w"], np.float32([[0, 3], [4, 0]]))


def test_unsorted_nodes_are_sorted():
    proto = mlp()
    nodes = list(proto.graph.node)[::-1]
    proto.graph.ClearField("node")
    proto.graph.node.extend(nodes)
    assert ops(fheq.import_onnx(proto)) == ["Gemm", "Relu", "MatMul", "Add"]


def test_schema_defaults():
    proto = model(
        [node("LeakyRelu", ["x"], ["a"]), node("Gemm", ["a", "w"], ["y"])], {"x": ["N", 2]}, ["y"], {"w": tensor(2, 2)}
    )
    first, second = fheq.import_onnx(proto).nodes
    assert first.attrs["alpha"] == pytest.approx(0.01)
    assert second.attrs == {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    assert (first.domain, first.version) == ("", 17)


@pytest.mark.parametrize("opset", [7, 11, 13, 17, onnx.defs.onnx_opset_version()])
def test_opsets(opset):
    proto = model([node("Relu", ["x"], ["y"])], {"x": ["N", 3]}, ["y"], opset=opset)
    assert fheq.import_onnx(proto).nodes[0].version == opset


@pytest.mark.parametrize("opset", [1, 6, onnx.defs.onnx_opset_version() + 1])
def test_opsets_outside(opset):
    proto = model([node("Relu", ["x"], ["y"])], {"x": ["N", 3]}, ["y"], opset=opset)
    with pytest.raises(UnsupportedError, match=rf"opset {opset}.*convert"):
        fheq.import_onnx(proto)


def _scaled_relu() -> onnx.FunctionProto:
    nodes = [
        node("Constant", [], ["f"]),
        node("Mul", ["a", "f"], ["b"]),
        node("Relu", ["b"], ["c"]),
        node("Neg", ["b"], ["unused"]),
    ]
    nodes[0].attribute.append(
        onnx.AttributeProto(name="value_float", type=onnx.AttributeProto.FLOAT, ref_attr_name="factor")
    )
    return helper.make_function("own", "ScaledRelu", ["a"], ["c"], nodes, [helper.make_opsetid("", 17)], ["factor"])


def test_model_functions_are_inlined():
    outer = helper.make_function(
        "own",
        "Twice",
        ["a"],
        ["c"],
        [
            node("ScaledRelu", ["a"], ["b"], domain="own", factor=-2.0),
            node("ScaledRelu", ["b"], ["c"], domain="own", factor=3.0),
        ],
        [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)],
    )
    nodes = [node("Twice", ["x"], ["h"], domain="own"), node("Twice", ["h"], ["y"], domain="own")]
    proto = model(nodes, {"x": ["N", 3]}, ["y"], domains={"own": 1}, functions=[outer, _scaled_relu()])
    graph = check(proto, tensor(4, 3))
    assert ops(graph) == ["Mul", "Relu"] * 4


@pytest.mark.parametrize(
    ("op", "attrs", "shape", "opset"),
    [
        ("MeanVarianceNormalization", {"axes": [1, 2]}, ["N", 3, 4], 21),
        ("GroupNormalization", {"num_groups": 2}, ["N", 4, 3], 21),
        ("GroupNormalization", {"num_groups": 2}, ["N", 4, 3], 18),  # of scales by group; deprecated, and exported
    ],
)
def test_operators_with_a_function_in_their_schema(op, attrs, shape, opset):
    known = {} if op.startswith("Mean") else {name: tensor(4 if opset == 21 else 2) for name in ("s", "b")}
    proto = model([node(op, ["x", *known], ["y"], **attrs)], {"x": shape}, ["y"], known, opset=opset)
    graph = check(proto, tensor(2, *shape[1:]))
    assert op not in ops(graph)


def test_gather_with_computed_indices():
    kinds = {"i": TensorProto.INT64}
    for axis, table in ((0, tensor(7, 3)), (1, tensor(2, 5, 3)), (-1, tensor(2, 5))):
        proto = model([node("Gather", ["w", "i"], ["y"], axis=axis)], {"i": ["N", 4]}, ["y"], {"w": table}, kinds=kinds)
        indices = np.random.default_rng(0).integers(-5, 5, (6, 4))
        graph = fheq.import_onnx(proto)
        want = np.take(table, indices, axis=axis)
        np.testing.assert_allclose(fheq.evaluate(graph, indices), want, atol=1e-6)
        assert "Gather" not in ops(graph)


@pytest.mark.parametrize("axis", [0, -1])
def test_gather_elements_with_computed_indices(axis):
    rng = np.random.default_rng(0)
    x, indices = tensor(4, 5), rng.integers(-4, 4, (4, 5) if axis == 0 else (4, 3))
    nodes = [node("GatherElements", ["x", "i"], ["y"], axis=axis)]
    kinds = {"i": TensorProto.INT64}
    proto = model(nodes, {"x": [4, 5], "i": list(indices.shape)}, ["y"], kinds=kinds)
    graph = fheq.import_onnx(proto)
    want = np.take_along_axis(x, indices, axis)
    np.testing.assert_allclose(fheq.evaluate(graph, x, indices), want, atol=1e-6)
    assert "GatherElements" not in ops(graph)


def test_problems_collects_all():
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Unknown", ["a"], ["b"], domain="own"),
        node("Unique", ["b"], ["c"]),
        node("Multinomial", ["x"], ["d"]),
        node("If", ["x"], ["e"], then_branch=mlp().graph, else_branch=mlp().graph),
    ]
    proto = model(nodes, {"x": ["N", 3]}, ["a", "b", "c", "d", "e"], domains={"own": 1})
    found = problems(proto)
    assert len(found) == 4
    assert all(isinstance(error, UnsupportedError) for error in found)
    text = "\n".join(map(str, found))
    assert all(f"make_{name}" in text for name in "bcde")
    assert problems(mlp()) == []
    assert len(problems(b"junk")) == 1


def test_what_nothing_reads_does_not_matter():
    nodes = [node("Relu", ["x"], ["y"]), node("Unknown", ["x"], ["z"], domain="own")]
    known = {"left": np.float32([1, np.nan])}
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 3]}, ["y"], known, domains={"own": 1}))
    assert ops(graph) == ["Relu"]
    assert not graph.constants
