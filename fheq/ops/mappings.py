"""What LabelEncoder and CategoryMapper map."""

from __future__ import annotations

from typing import Any

import numpy as np

from fheq.errors import ModelError
from fheq.graph import Node, describe, is_float


def mapping_of(node: Node) -> tuple[np.ndarray, np.ndarray, Any]:
    """Keys, values and the default of a LabelEncoder or CategoryMapper; strings are numbers of the model's strings."""
    attrs, dtypes = node.attrs, {"floats": np.float32, "int64s": np.int64, "strings": np.int64}
    if "keys_strings" not in attrs and (attrs.get("classes_strings") or attrs.get("cats_strings")):
        names = np.asarray(attrs.get("classes_strings") or attrs["cats_strings"], np.int64)
        numbers = np.asarray(attrs.get("cats_int64s") or range(len(names)), np.int64)
        if attrs.get("of_strings", False):
            return names, numbers, attrs.get("default_int64", -1)
        return numbers, names, attrs.get("default_string", -1)
    found: dict[str, tuple[str, np.ndarray]] = {}
    for part in ("keys", "values"):
        for kind, dtype in dtypes.items():
            if attrs.get(f"{part}_{kind}"):
                found[part] = kind, np.asarray(attrs[f"{part}_{kind}"], dtype)
        if attrs.get(f"{part}_tensor") is not None:
            found[part] = "tensor", np.ravel(attrs[f"{part}_tensor"])
    if len(found) < 2 or len(found["keys"][1]) != len(found["values"][1]) or not len(found["keys"][1]):
        raise ModelError(f"{describe(node)}: its keys and values do not fit together; export the model again")
    kind, values = found["values"]
    name = {"floats": "default_float", "int64s": "default_int64", "strings": "default_string", "tensor": "default_tensor"}[
        kind
    ]
    default = attrs.get(name)
    return found["keys"][1], values, (0 if is_float(values.dtype) else -1) if default is None else np.ravel(default)[0]
