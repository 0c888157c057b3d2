"""Malformed models and files: each is a `FheqError` that names the place, and never a crash."""

from __future__ import annotations

import random

import numpy as np
import onnx
import pytest
from build_models import cnn, mlp, model, node, tensor
from onnx import TensorProto, helper, numpy_helper

import fheq
from fheq.errors import FheqError, ModelError, UnsupportedError


def relu(**changes) -> onnx.ModelProto:
    """x to y through one Relu."""
    return model([node("Relu", ["x"], ["y"])], {"x": ["N", 3]}, ["y"], **changes)


def refuse(source, match: str, error: type[FheqError] = ModelError) -> None:
    with pytest.raises(error, match=match):
        fheq.import_onnx(source)


def test_files(tmp_path):
    refuse(tmp_path / "absent.onnx", "absent.onnx.*does not exist")
    refuse(str(tmp_path), "does not exist or is no file")
    (tmp_path / "empty.onnx").touch()
    refuse(tmp_path / "empty.onnx", "empty.onnx.*is empty")
    (tmp_path / "text.onnx").write_text("not a model at all")
    refuse(tmp_path / "text.onnx", "text.onnx")
    (tmp_path / "half.onnx").write_bytes(mlp().SerializeToString()[:-40])
    refuse(tmp_path / "half.onnx", "half.onnx")


@pytest.mark.parametrize("source", [None, 3, [], np.zeros(3), onnx.GraphProto()])
def test_wrong_type_of_argument(source):
    refuse(source, f"must be a path, bytes or an onnx.ModelProto, not {type(source).__name__}")


@pytest.mark.parametrize("source", [b"", b"\x00", b"\xff" * 64, onnx.ModelProto()])
def test_no_model(source):
    refuse(source, "bytes|model")


def test_missing_external_data(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(mlp(), path, save_as_external_data=True, size_threshold=0, location="weights.bin")
    refuse(path.read_bytes(), "another file.*path")
    (tmp_path / "weights.bin").unlink()
    refuse(path, "model.onnx")


def test_no_opset():
    proto = relu()
    proto.ClearField("opset_import")
    refuse(proto, "opset")


@pytest.mark.parametrize(
    ("nodes", "match"),
    [
        ([node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])], "'make_y'.*makes the tensor 'y'"),
        ([node("Relu", ["x"], ["x"]), node("Neg", ["x"], ["y"])], "'make_x'.*'x'.*input or initializer makes too"),
        ([node("Add", ["x", "b"], ["a"]), node("Neg", ["a"], ["b"]), node("Neg", ["b"], ["y"])], "'make_a'.*cycle"),
        ([node("Relu", ["missing"], ["y"])], "'make_y'.*reads the tensor 'missing'"),
        ([node("Relu", ["x"], ["z"])], "output 'y' is given by no node"),
        ([node("Gather", ["x"], ["y"])], "'make_y'.*has 1 inputs; Gather takes 2"),
        ([node("Relu", ["x", "x"], ["y"])], "'make_y'.*has 2 inputs; Relu takes 1"),
        ([node("Add", ["", "x"], ["y"])], r"'make_y'.*lacks its input 0 \(A\)"),
        ([node("Relu", ["x"], ["y", "z"])], "'make_y'.*has 2 outputs"),
        ([node("Concat", ["x", "x"], ["y"])], "'make_y'.*lacks the attribute 'axis'"),
        ([node("Concat", ["x", "x"], ["y"], axis=1.5)], "'make_y'.*'axis' has a wrong type"),
        ([node("LeakyRelu", ["x"], ["y"], alpha=[1.0])], "'make_y'.*'alpha' has a wrong type"),
        ([node("LeakyRelu", ["x"], ["y"], beta=1.0)], "'make_y'.*attribute 'beta', which LeakyRelu does not have"),
        ([node("Upsample", ["x"], ["y"])], "'make_y'.*no operator of opset 17"),
        ([node("", ["x"], ["y"])], "'make_y'.*no operator type"),
    ],
)
def test_graphs(nodes, match):
    refuse(model(nodes, {"x": ["N", 3]}, ["y"]), match)


def test_doubles():
    proto = mlp()
    proto.graph.initializer.append(proto.graph.initializer[0])
    refuse(proto, "initializer 'w1' is there twice")
    proto = relu()
    proto.graph.input.append(proto.graph.input[0])
    refuse(proto, "input 'x' is there twice")
    proto = relu()
    proto.graph.output.append(proto.graph.output[0])
    refuse(proto, "output 'y' is there twice")
    proto = relu()
    proto.graph.node[0].attribute.extend([helper.make_attribute("a", 1)] * 2)
    refuse(proto, "'make_y'.*attribute")


@pytest.mark.parametrize("dims", [[2**40, 2**40], [2**62], [-1, 3], [4], [0, 3]])
def test_sizes_that_do_not_match_the_data(dims):
    proto = model([node("Add", ["x", "b"], ["y"])], {"x": ["N", 3]}, ["y"], {"b": tensor(3)})
    for raw in (True, False):
        tensor_proto = helper.make_tensor(
            "b", TensorProto.FLOAT, [3], tensor(3).tobytes() if raw else [1.0, 2.0, 3.0], raw=raw
        )
        del tensor_proto.dims[:]
        tensor_proto.dims.extend(dims)
        proto.graph.initializer[0].CopyFrom(tensor_proto)
        refuse(proto, "initializer 'b'")


def test_huge_results_are_not_computed():
    nodes = [node("ConstantOfShape", ["s"], ["c"]), node("Add", ["x", "c"], ["y"])]
    for shape in ([2**40], [2**20, 2**20]):
        proto = model(nodes, {"x": ["N", 1]}, ["y"], {"s": np.array(shape)})
        refuse(proto, "'make_c'", FheqError)
    nodes = [node("Expand", ["x", "s"], ["c"]), node("Tile", ["c", "s"], ["y"])]
    refuse(model(nodes, {"x": [1, 1]}, ["y"], {"s": np.array([2**15, 2**15])}), "make_", FheqError)


def test_bad_sparse_initializer():
    proto = model([node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 2]}, ["y"])
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [3.0])
    for indices, dims in (([4], [2, 2]), ([0, 1], [2, 2]), ([0], [2**40, 2**40])):
        flat = helper.make_tensor("", TensorProto.INT64, np.shape(indices), indices)
        proto.graph.ClearField("sparse_initializer")
        proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, flat, dims))
        refuse(proto, "initializer 'w'")


def test_nan_and_infinity():
    for bad, match in ((np.nan, "initializer 'w' contains NaN"), (np.inf, "'make_y'.*weight 'w'.*infinity")):
        weights = tensor(3, 2)
        weights[0, 0] = bad
        refuse(model([node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 3]}, ["y"], {"w": weights}), match)
    bounds = {"low": np.float32(-np.inf), "high": np.float32(1)}
    graph = fheq.import_onnx(model([node("Clip", ["x", "low", "high"], ["y"])], {"x": ["N", 3]}, ["y"], bounds))
    assert np.isneginf(graph.constants["low"])


def test_types_of_inputs():
    strings = relu(kinds={"x": TensorProto.STRING})
    refuse(strings, "input 'x' holds string", UnsupportedError)
    refuse(relu(kinds={"x": 0}), "input 'x' has the unknown element type 0")
    proto = relu()
    proto.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [1]))
    refuse(proto, "input 'x' is no tensor", UnsupportedError)


def test_shapes_that_do_not_fit_name_the_node():
    proto = model([node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 3]}, ["y"], {"w": tensor(4, 2)})
    refuse(proto, "'make_y' .MatMul", fheq.errors.ShapeError)


def test_quantizer_parameters_that_do_not_fit():
    known = {"w": np.int8([[1, 2, 3]]), "s": np.float32([0.1, 0.2])}
    nodes = [node("DequantizeLinear", ["w", "s"], ["v"], axis=1), node("Add", ["x", "v"], ["y"])]
    refuse(model(nodes, {"x": ["N", 3]}, ["y"], known), "'make_v'", FheqError)


def test_functions_that_call_themselves():
    body = [node("Loop", ["a"], ["b"], domain="own")]
    function = helper.make_function("own", "Loop", ["a"], ["b"], body, [helper.make_opsetid("own", 1)])
    proto = model(
        [node("Loop", ["x"], ["y"], domain="own")], {"x": ["N", 3]}, ["y"], domains={"own": 1}, functions=[function]
    )
    refuse(proto, "call itself")


def survives(data: bytes) -> bool:
    """Whether a damaged model still works; anything but a `FheqError` fails the test."""
    try:
        graph = fheq.import_onnx(data)
        fheq.evaluate(graph, *[np.zeros(port.type.shape, port.type.dtype) for port in graph.inputs])
    except FheqError:
        return False
    return True


def quantized() -> onnx.ModelProto:
    """QuantizeLinear and DequantizeLinear around weights and activations."""
    known = {"s": np.float32(0.1), "z": np.int8(3), "w": np.int8([[1, -2], [3, 4]]), "zw": np.int8(0)}
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("DequantizeLinear", ["w", "s", "zw"], ["v"]),
        node("MatMul", ["d", "v"], ["y"]),
    ]
    return model(nodes, {"x": ["N", 2]}, ["y"], known)


@pytest.mark.parametrize("make", [mlp, cnn, quantized])
def test_damaged_bytes(make):
    whole, rng = make().SerializeToString(), random.Random(0)
    assert survives(whole)
    for _ in range(40):
        survives(whole[: rng.randrange(len(whole))])
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        survives(bytes(data))


@pytest.mark.parametrize("make", [mlp, cnn, quantized])
def test_damaged_fields(make):
    """Valid protobuf with absurd contents."""
    rng = random.Random(1)
    sizes = (0, -1, 2, 7, 2**31, 2**40, -(2**40), 2**62)
    for _ in range(40):
        proto = make()
        graph = proto.graph
        some, weight = rng.choice(graph.node), rng.choice(graph.initializer)
        names = [name for n in graph.node for name in (*n.input, *n.output)]
        change = rng.randrange(7)
        if change == 0 and some.attribute and some.attribute[0].ints:
            some.attribute[0].ints[0] = rng.choice(sizes)
        elif change == 1:
            some.input[rng.randrange(len(some.input))] = rng.choice([*names, ""])
        elif change == 2:
            some.op_type = rng.choice([n.op_type for n in graph.node])
        elif change == 3:
            weight.data_type = rng.randrange(28)
        elif change == 4 and weight.dims:
            weight.dims[0] = rng.choice(sizes)
        elif change == 5 and weight.data_type == TensorProto.INT64:
            weight.CopyFrom(numpy_helper.from_array(np.array([rng.choice(sizes)]), weight.name))
        else:
            graph.input[0].type.tensor_type.shape.dim[-1].dim_value = rng.choice(sizes)
        survives(proto.SerializeToString())
