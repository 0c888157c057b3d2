"""Cases of operators beside ONNX's own, for opsets and domains that it has none for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import onnx
from onnx import defs, helper, numpy_helper

from benchmarks.op_cases import NEWEST, OLDEST, Case
from fheq.ops import rows


@cache
def versions_of(name: str) -> list[int]:
    """The opsets from 7 on at which the schema of an ai.onnx operator changes, its first one included."""
    schemas = (s for s in defs.get_all_schemas_with_history() if s.name == name and not s.domain and not s.deprecated)
    return sorted({max(schema.since_version, OLDEST) for schema in schemas})


def own(op: str, version: int, *inputs: Any, outputs: int = 1, domain: str = "", result: Any = None, **attrs: Any) -> Case:
    """A case of ours; None as an input means that it is absent."""
    arrays = [None if x is None else np.asarray(x) for x in inputs]
    names = ["" if x is None else f"x{i}" for i, x in enumerate(arrays)]
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], domain=domain, **attrs)
    given = [(name, x) for name, x in zip(names, arrays) if x is not None]
    graph = helper.make_graph(
        [node],
        op,
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in given],
        [helper.make_empty_tensor_value_info(name) for name in node.output],
    )
    imports = [
        helper.make_opsetid("", NEWEST if domain else version),
        *([helper.make_opsetid(domain, version)] if domain else []),
    ]
    model = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=imports, ir_version=10))
    name = f"own-{op}-opset{version}"
    return Case(name, model, [x for _, x in given], None if result is None else [np.asarray(result)], 1e-5, 1e-5)


def _real(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def own_cases() -> Iterator[Case]:
    """Older forms of operators that no case of ONNX fits, and forms that ONNX has no case for."""
    x, image, volume = _real(2, 3, 4), _real(2, 4, 7, 6), _real(1, 2, 5, 4, 6)
    for row in rows():
        if row.name.startswith("Reduce") and row.since > OLDEST:
            for version in (v for v in versions_of(row.name) if v < row.since):
                data = np.abs(x) if "Log" in row.name else x
                yield own(row.name, version, data, axes=[0, 2], keepdims=0)
                yield own(row.name, version, data)
    yield own("Clip", 7, x, min=-0.5, max=0.25)
    yield own("Clip", 7, x)
    yield own("DepthToSpace", 7, image, blocksize=2)
    yield own("SpaceToDepth", 13, image[:, :, :6], blocksize=2)
    yield own("Dropout", 7, x, ratio=0.3)
    apart = np.linalg.norm(x[0][:, None] - x[1][None], axis=-1)
    yield own("CDist", 1, x[0], x[1], domain="com.microsoft", metric="euclidean", result=apart)
    square = _real(4, 4)
    solved = np.linalg.solve(square, x[0].T)
    yield own("Solve", 1, square, np.ascontiguousarray(x[0].T), domain="com.microsoft", result=solved)
    for mode in ("constant", "reflect", "edge"):
        yield own("Pad", 7, x, mode=mode, pads=[1, 0, 2, 0, 2, 3])
    yield own("Pad", 7, x, pads=[0, -1, 2, 1, 0, -2], value=1.5)
    yield own("Pad", 19, x, np.array([2, 5, 1, 7]), None, np.array([-1, 1]), mode="wrap")
    yield own("Pad", 18, np.arange(6).reshape(2, 3), np.array([1, 2]), np.array(9), np.array([1]))
    yield own("Slice", 7, x, starts=[1, -3], ends=[9, -1], axes=[0, 2])
    yield own("Slice", 7, x, starts=[0, 1], ends=[1, 2**31 - 1])
    yield own("Slice", 13, x, np.array([-1, 5]), np.array([-(2**62), -5]), np.array([1, 2]), np.array([-1, -2]))
    for version in (7, 11):
        yield own("Squeeze", version, x[:, None, :, None], axes=[1])
        yield own("Squeeze", version, x[:, None, :, None])
        yield own("Unsqueeze", version, x, axes=[0, 4])
    yield own("Split", 7, x, axis=2, split=[3, 1], outputs=2)
    yield own("Upsample", 7, image, scales=[1.0, 1.0, 2.0, 3.0])
    yield own("Upsample", 7, image, scales=[1.0, 1.0, 1.5, 2.0], mode="linear")
    yield own("Resize", 10, image, np.array([1, 1, 0.6, 1.7], np.float32))
    yield own("Resize", 10, image, np.array([1, 1, 2, 3], np.float32), mode="linear")
    even = _real(2, 4, 8, 6)  # the runtimes disagree about align_corners when a length times its scale is no integer
    for mode in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"):
        scales = np.array([1, 1, 0.5, 3], np.float32)
        sizes = np.array([2, 4, 3, 11])
        for kind in ("nearest", "linear", "cubic"):
            options = {"mode": kind, "coordinate_transformation_mode": mode}
            yield own("Resize", 11, even, np.zeros(0, np.float32), scales, **options)
            yield own("Resize", 13, even, None, None, sizes, **options)
    for nearest in ("round_prefer_ceil", "floor", "ceil"):
        yield own("Resize", 19, image, None, np.array([1, 1, 1.5, 0.7], np.float32), nearest_mode=nearest)
    for version in (7, 11):
        yield own("Conv", version, _real(2, 4, 9), _real(6, 2, 3), _real(6), group=2, strides=[2], pads=[1, 2])
        yield own("ConvTranspose", version, _real(2, 4, 5), _real(4, 3, 3), group=2, strides=[2], dilations=[2])
    yield own("Conv", 22, volume, _real(3, 2, 2, 3, 2), dilations=[2, 1, 1], pads=[1, 0, 2, 0, 1, 1])
    yield own("ConvTranspose", 22, volume, _real(2, 3, 2, 3, 2), _real(3), strides=[2, 1, 2], pads=[1, 0, 1, 0, 1, 0])
    yield own("ConvTranspose", 11, image, _real(4, 2, 3, 2), output_padding=[1, 0], strides=[2, 2], pads=[1, 0, 1, 1])
    yield own("ConvTranspose", 11, image, _real(4, 2, 3, 2), output_shape=[15, 10], strides=[2, 2])
    for auto_pad in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        yield own("Conv", 11, image, _real(5, 4, 2, 4), auto_pad=auto_pad, strides=[2, 3])
        yield own("ConvTranspose", 11, image, _real(4, 2, 3, 2), auto_pad=auto_pad, strides=[2, 2])
        yield own("MaxPool", 7, image, kernel_shape=[3, 2], auto_pad=auto_pad, strides=[2, 1])
        yield own("AveragePool", 7, image, kernel_shape=[3, 2], auto_pad=auto_pad, strides=[2, 1])
    for counted in (0, 1):
        pool = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 1, 1], "count_include_pad": counted}
        yield own("AveragePool", 7, image, **pool)
        yield own("AveragePool", 10, image, ceil_mode=1, **pool)
        yield own("AveragePool", 19, image, ceil_mode=1, dilations=[2, 1], **pool)
    yield own("AveragePool", 10, volume, kernel_shape=[2, 2, 3], strides=[1, 2, 2])
    yield own("MaxPool", 10, image, kernel_shape=[3, 2], dilations=[2, 2], ceil_mode=1, strides=[2, 2], pads=[1, 1, 0, 1])
    yield own("MaxPool", 10, _real(2, 3, 8), kernel_shape=[3], strides=[3], ceil_mode=1)
    yield own("MaxPool", 12, np.arange(-60, 60, dtype=np.int8).reshape(1, 2, 10, 6), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    for version, p in ((7, 2), (22, 3)):
        norms = np.sum(np.abs(image.astype(np.float64)) ** p, axis=(2, 3), keepdims=True) ** (1 / p)
        yield own("GlobalLpPool", version, image, p=p, result=norms.astype(np.float32))
    yield own("BatchNormalization", 7, image, *np.abs(_real(4, 4)))
    yield own("Gemm", 7, _real(4, 3), _real(5, 4), _real(3, 1), alpha=0.5, beta=2.0, transA=1, transB=1)
    yield own("Gemm", 11, _real(3, 4), _real(4, 5))
    yield own("Div", 14, np.array([-7, 7, -8]), np.array([2, -2, 3]))
    yield own("Mod", 13, np.array([-7, 7, -8]), np.array([2, -2, 3]))
    yield own("Pow", 12, x, np.array(2))
    yield own("PRelu", 9, image, _real(4, 1, 1))
    yield own("Gather", 7, x, np.array([[1, 0], [0, 1]]), axis=1)
    yield own("Gather", 13, x, np.array(-1), axis=-1)
    yield own("Expand", 8, x[:, :1], np.array([5, 1, 3, 1]))
    yield own("Reshape", 7, x, np.array([0, -1]))
    yield own("Constant", 12, value_floats=[1.0, 2.5])
    yield own("Constant", 12, value_int=3)
    yield own("Range", 11, np.float32(1), np.float32(3), np.float32(0.3))
    for version in (7, 11):
        for softmax in ("Softmax", "LogSoftmax"):
            yield own(softmax, version, x)
    weights = _real(4, 3, 2, 2)
    scale = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    for zero in (None, np.array([0, 1, -2, 3], np.int8)):
        levels = (weights * 20).astype(np.int8)
        yield own("DequantizeLinear", 13, levels, scale, zero, axis=0)
    yield own("QuantizeLinear", 10, x, np.float32(0.1))
    yield own("QuantizeLinear", 13, weights, scale, np.zeros(4, np.int8), axis=-4)
    yield own("DequantizeLinear", 10, np.array([-5, 70000], np.int32), np.float32(0.1))
    for size in (1, 3, 4):
        yield own("Det", 11, _real(2, size, size))
    yield from _sampling_cases(image, volume)
    yield from _selection_cases(x)
    yield from _machine_learning_cases(x)
    yield from _quantizer_cases()


def _sampling_cases(image: np.ndarray, volume: np.ndarray) -> Iterator[Case]:
    """Points inside and far outside of an image, a grid for each sample; regions that are partly outside."""
    rng = np.random.default_rng(5)
    grid, points = (rng.uniform(-2.5, 2.5, shape).astype(np.float32) for shape in ((2, 3, 5, 2), (1, 2, 3, 2, 3)))
    for padding, corners in product(("zeros", "border", "reflection"), (0, 1)):
        for mode in ("bilinear", "nearest", "bicubic"):
            yield own("GridSample", 16, image, grid, mode=mode, padding_mode=padding, align_corners=corners)
        for mode in ("linear", "nearest"):
            yield own("GridSample", 20, volume, points, mode=mode, padding_mode=padding, align_corners=corners)
    rois = np.array([[-1, -2, 4, 5], [1, 0.5, 3, 8], [2, 2, 2.2, 2.1]], np.float32)
    size = {"output_height": 2, "output_width": 3, "spatial_scale": 0.7}
    for ratio in (0, 2):
        yield own("RoiAlign", 10, image, rois, np.array([0, 1, 1]), sampling_ratio=ratio, **size)
        for how in ("half_pixel", "output_half_pixel"):
            options = {"coordinate_transformation_mode": how, "sampling_ratio": ratio, **size}
            yield own("RoiAlign", 16, image, rois, np.array([1, 0, 1]), **options)
    places = np.array([0, 3, 9, 12, 21, 17, 30, 26]).reshape(1, 2, 2, 2)
    yield own("MaxUnpool", 9, _real(1, 2, 2, 2), places, kernel_shape=[2, 2], strides=[2, 2])


def _selection_cases(x: np.ndarray) -> Iterator[Case]:
    """ArgMax and its relatives where several elements are the largest, and the older forms of TopK and Hardmax."""
    ties = np.array([[3, 1, 3, 2, 3], [0, 0, 0, 0, 0]], np.float32)
    for op, last in product(("ArgMax", "ArgMin"), (0, 1)):
        yield own(op, 12, ties, axis=1, select_last_index=last, keepdims=0)
    for version in (7, 11):
        yield own("Hardmax", version, x, axis=1)
    yield own("Hardmax", 13, ties, axis=-1)
    yield own("TopK", 7, x, k=2, axis=1, outputs=2)
    yield own("TopK", 10, x, np.array([3]), axis=2, outputs=2)
    for largest in (0, 1):
        yield own("TopK", 11, ties, np.array([4]), largest=largest, outputs=2)
    yield own("Compress", 9, x, np.array([True, False, True]), axis=1)
    for equation in ("ij,jk", "i...,i...->...", "bij,bjk,bk->b", "iij->ji", "...ij->...ji", "ab,cb->", "i,j"):
        terms = equation.partition("->")[0].split(",")
        arrays = [_real(*(3 for _ in term.replace("...", "x"))) for term in terms]
        yield own("Einsum", 12, *arrays, equation=equation)


def _machine_learning_cases(x: np.ndarray) -> Iterator[Case]:
    domain, table = "ai.onnx.ml", x.reshape(4, 6)
    yield own("Scaler", 1, table, domain=domain, offset=[0.5] * 6, scale=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    yield own("Scaler", 1, table.astype(np.int64), domain=domain, offset=[0.5], scale=[2.0])
    for norm in ("MAX", "L1", "L2"):
        yield own("Normalizer", 1, np.abs(table), domain=domain, norm=norm)
    holes = np.where(np.abs(table) < 0.5, np.nan, table).astype(np.float32)
    fills = [float(i) for i in range(6)]
    yield own("Imputer", 1, holes, domain=domain, imputed_value_floats=fills, replaced_value_float=float("nan"))
    whole = np.arange(12).reshape(3, 4) % 5
    yield own("Imputer", 1, whole, domain=domain, imputed_value_int64s=[9], replaced_value_int64=3)
    yield own("FeatureVectorizer", 1, table, table[:, :2], domain=domain, inputdimensions=[5, 3])
    yield own("OneHotEncoder", 1, whole, domain=domain, cats_int64s=[0, 2, 4, 1], zeros=1)
    yield own("LabelEncoder", 1, whole, domain=domain, classes_strings=["a", "c", "b"], default_string="other")
    yield own("LabelEncoder", 2, whole, domain=domain, keys_int64s=[4, 0, 2], values_floats=[0.5, -1.0, 2.0])
    yield own("LabelEncoder", 2, whole, domain=domain, keys_int64s=[4, 0, 2], values_strings=["u", "v", "w"])
    keys, values = np.array([2.0, 0.0], np.float32), np.array([7, 8])
    tensors = {"keys_tensor": keys, "values_tensor": values, "default_tensor": np.array([1])}
    tensors = {name: numpy_helper.from_array(value, name) for name, value in tensors.items()}
    yield own("LabelEncoder", 4, whole.astype(np.float32), domain=domain, **tensors)
    strings = {"cats_int64s": [1, 2], "cats_strings": ["one", "two"], "default_string": "none"}
    yield own("CategoryMapper", 1, whole, domain=domain, **strings)
    zipped = [dict(zip((3, 1, 2), row)) for row in table[:, :3]]
    columns = np.array([[row[key] for key in (3, 1, 2)] for row in zipped], np.float32)
    yield own("ZipMap", 1, table[:, :3], domain=domain, classlabels_int64s=[3, 1, 2], result=columns)
    yield from _linear_cases(table)
    yield from _vector_machine_cases(table)
    yield from _tree_cases(table)


def _linear_cases(x: np.ndarray) -> Iterator[Case]:
    options: dict[str, Any] = {"domain": "ai.onnx.ml", "outputs": 2}
    weights = _real(3, 6).ravel().tolist()
    for transform in ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO"):
        named = {"classlabels_ints": [5, 3, 4], "post_transform": transform}
        yield own("LinearClassifier", 1, x, coefficients=weights, intercepts=[0.1, 0.2, -0.3], **named, **options)
        pair = {"classlabels_strings": ["no", "yes"], "post_transform": transform}
        yield own("LinearClassifier", 1, x, coefficients=weights[:12], intercepts=[0.1, 0.2], **pair, **options)
    one = {"coefficients": weights[:6], "intercepts": [0.1], "classlabels_ints": [0, 1], "post_transform": "LOGISTIC"}
    yield own("LinearClassifier", 1, x, **one, **options)
    domain = options["domain"]
    yield own("LinearRegressor", 1, x, domain=domain, coefficients=weights, intercepts=[1.0, 2.0, 3.0], targets=3)
    probit = np.clip(np.abs(x), 0.05, 0.95)
    share = {"coefficients": [0.4, 0.1, 0.05, 0.1, 0.1, 0.1], "intercepts": [0.1], "post_transform": "PROBIT"}
    yield own(
        "LinearRegressor", 1, probit, domain=domain, result=_probit(probit @ np.array(share["coefficients"]) + 0.1), **share
    )


def _probit(p: np.ndarray) -> np.ndarray:
    """By the definition of the approximation: Winitzki's inverse error function."""
    log = np.log(1 - (2 * p - 1) ** 2)
    a = 2 / (np.pi * 0.147) + log / 2
    return (np.sqrt(2) * np.sign(2 * p - 1) * np.sqrt(np.sqrt(a**2 - log / 0.147) - a)).astype(np.float32)[:, None]


def _vector_machine_cases(x: np.ndarray) -> Iterator[Case]:
    domain = "ai.onnx.ml"
    vectors, coefficients = _real(5, 6), _real(2, 5)
    for kernel in ("LINEAR", "POLY", "RBF", "SIGMOID"):
        shared = {"kernel_type": kernel, "kernel_params": [0.3, 0.5, 2.0], "support_vectors": vectors.ravel().tolist()}
        regression = {"coefficients": coefficients[0].tolist(), "n_supports": 5, "rho": [0.25]}
        yield own("SVMRegressor", 1, x, domain=domain, **regression, **shared)
        yield own("SVMRegressor", 1, x, domain=domain, one_class=1, **regression, **shared)
        classes = {"vectors_per_class": [2, 1, 2], "rho": [0.1, -0.2, 0.3], "coefficients": coefficients.ravel().tolist()}
        yield own("SVMClassifier", 1, x, domain=domain, outputs=2, classlabels_ints=[2, 0, 1], **classes, **shared)
        pair = {"vectors_per_class": [2, 3], "rho": [0.1], "coefficients": coefficients[0].tolist()}
        yield own("SVMClassifier", 1, x, domain=domain, outputs=2, classlabels_strings=["a", "b"], **pair, **shared)
        platt = {"prob_a": [-1.5, -2.0, -1.0], "prob_b": [0.1, 0.0, -0.1]}
        yield own("SVMClassifier", 1, x, domain=domain, outputs=2, classlabels_ints=[2, 0, 1], **platt, **classes, **shared)
    linear = {"coefficients": coefficients.ravel().tolist()[:6], "rho": [0.25]}
    yield own("SVMRegressor", 1, x, domain=domain, kernel_type="LINEAR", n_supports=0, **linear)


def _two_trees(mode: str, second: str) -> dict[str, Any]:
    """A tree of four leaves, one of them next to the root, and one of two."""
    return {
        "nodes_treeids": [0, 0, 0, 0, 0, 0, 0, 1, 1, 1],
        "nodes_nodeids": [0, 1, 2, 3, 4, 5, 6, 0, 1, 2],
        "nodes_featureids": [0, 0, 3, 0, 5, 0, 0, 2, 0, 0],
        "nodes_modes": [mode, "LEAF", mode, "LEAF", second, "LEAF", "LEAF", second, "LEAF", "LEAF"],
        "nodes_values": [0.1, 0.0, -0.2, 0.0, 0.3, 0.0, 0.0, 0.5, 0.0, 0.0],
        "nodes_truenodeids": [1, 0, 3, 0, 5, 0, 0, 1, 0, 0],
        "nodes_falsenodeids": [2, 0, 4, 0, 6, 0, 0, 2, 0, 0],
    }


def _tree_cases(x: np.ndarray) -> Iterator[Case]:
    domain = "ai.onnx.ml"
    leaves = {"treeids": [0, 0, 0, 0, 1, 1], "nodeids": [1, 3, 5, 6, 1, 2]}
    target = {f"target_{k}": v for k, v in leaves.items()}
    classes = {f"class_{k}": v for k, v in leaves.items()}
    weights = [0.5, -0.25, 1.0, 0.125, 0.75, -0.5]
    full = {k: v * 3 for k, v in leaves.items()}  # onnxruntime adds no base value to a target without a leaf value
    spread = [round(w * f, 4) for f in (1, -0.5, 0.75) for w in weights]
    for mode, other in (("LEQ", "LEQ"), ("LT", "GTE"), ("GT", "LEQ"), ("EQ", "NEQ")):
        trees = _two_trees(f"BRANCH_{mode}", f"BRANCH_{other}")
        edge = np.concatenate([x, np.full_like(x, 0.1), np.full_like(x, 0.3), np.full_like(x, 0.5)])
        for aggregate in ("SUM", "AVERAGE", "MIN", "MAX") if mode == "LEQ" else ("SUM",):
            ids = {"target_ids": [0] * 6 + [1] * 6 + [2] * 6, "target_weights": spread, "n_targets": 3}
            votes = {f"target_{k}": v for k, v in full.items()}
            found = {**trees, **votes, **ids, "aggregate_function": aggregate}
            yield own("TreeEnsembleRegressor", 1, edge, domain=domain, base_values=[0.5, 1.0, -0.25], **found)
        for transform in ("NONE", "SOFTMAX", "LOGISTIC"):
            many = {**trees, **classes, "class_weights": weights, "post_transform": transform}
            labels = {"class_ids": [0] * 6 + [1] * 6 + [2] * 6, "classlabels_strings": ["a", "b", "c"]}
            votes = {**{f"class_{k}": v for k, v in full.items()}, "class_weights": spread}
            yield own("TreeEnsembleClassifier", 1, edge, domain=domain, outputs=2, **{**many, **votes, **labels})
            signed = {"class_ids": [0] * 6, "classlabels_int64s": [7, 9], "base_values": [-0.2]}
            yield own("TreeEnsembleClassifier", 1, edge, domain=domain, outputs=2, **many, **signed)
            shares = {**many, "class_weights": [0.1, 0.4, 0.2, 0.3, 0.5, 0.35]}
            yield own(
                "TreeEnsembleClassifier",
                1,
                edge,
                domain=domain,
                outputs=2,
                class_ids=[1] * 6,
                classlabels_int64s=[7, 9],
                **shares,
            )
    holes = np.where(np.abs(x) < 0.5, np.nan, x).astype(np.float32)
    for tracked in (0, 1):
        trees = {**_two_trees("BRANCH_LEQ", "BRANCH_GT"), "nodes_missing_value_tracks_true": [tracked] * 10}
        yield own(
            "TreeEnsembleRegressor",
            1,
            holes,
            domain=domain,
            **trees,
            **target,
            target_ids=[0] * 6,
            target_weights=weights,
            n_targets=1,
        )
    precise = {k: v for k, v in _two_trees("BRANCH_LEQ", "BRANCH_LEQ").items() if k != "nodes_values"}
    precise["nodes_values_as_tensor"] = numpy_helper.from_array(np.array(_two_trees("", "")["nodes_values"]))
    doubles = {"target_weights_as_tensor": numpy_helper.from_array(np.array(weights)), "target_ids": [0] * 6, "n_targets": 1}
    yield own("TreeEnsembleRegressor", 3, x.astype(np.float64), domain=domain, **precise, **target, **doubles)
    both = {"class_weights_as_tensor": numpy_helper.from_array(np.array(spread)), "class_ids": [0] * 6 + [1] * 6 + [2] * 6}
    classes = {f"class_{k}": v for k, v in full.items()}
    yield own(
        "TreeEnsembleClassifier",
        3,
        x.astype(np.float64),
        domain=domain,
        outputs=2,
        classlabels_int64s=[0, 1, 2],
        **precise,
        **classes,
        **both,
    )


def _quantizer_cases() -> Iterator[Case]:
    """Quant and its family, with the values that their definitions give."""
    x = np.array([-3.0, -1.3, -1.25, -0.75, -0.25, 0.0, 0.25, 0.7, 0.75, 1.25, 3.0], np.float32)
    step, zero, bits = np.float32(0.5), np.float32(0), np.float32(3)
    for domain in ("onnx.brevitas", "qonnx.custom_op.general"):
        for signed, narrow, low, high in ((1, 0, -4, 3), (1, 1, -3, 3), (0, 0, 0, 7), (0, 1, 0, 6)):
            result = np.clip(np.round(x / step), low, high) * step
            for op in ("Quant", "IntQuant"):
                yield own(op, 1, x, step, zero, bits, domain=domain, signed=signed, narrow=narrow, result=result)
        for mode, function in (("CEIL", np.ceil), ("floor", np.floor), ("ROUND_TO_ZERO", np.trunc), ("round", np.round)):
            options = {"signed": 1, "narrow": 0, "rounding_mode": mode}
            result = (np.clip(function(x / step + 2), -4, 3) - 2) * step
            yield own("Quant", 1, x, step, zero + 2, bits, domain=domain, result=result, **options)
        yield own("BipolarQuant", 1, x, step, domain=domain, result=np.where(x >= 0, step, -step))
        result = np.floor(np.round(x / step) / 4) * step
        yield own("Trunc", 1, x, step, zero, bits + 1, bits - 1, domain=domain, rounding_mode="FLOOR", result=result)
