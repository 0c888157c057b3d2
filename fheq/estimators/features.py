"""Preparation of features, and what turns labels into other labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from fheq.estimators.outputs import DOMAIN, constant_like, real_input
from fheq.graph import Node, is_float
from fheq.ops.mappings import mapping_of
from fheq.ops.table import Kind, Op, register
from fheq.rewriting.edit import Draft
from fheq.rewriting.primitives import imputed

Array = Any


def scaler(draft: Draft, node: Node) -> None:
    """ai.onnx.ml Scaler."""
    x = real_input(draft, node)
    offset, scale = (
        constant_like(draft, node, name, node.attrs.get(name) or (neutral,), x)
        for name, neutral in (("offset", 0), ("scale", 1))
    )
    draft.apply(node, "Mul", draft.apply(node, "Sub", x, offset), scale, out=node.outputs[0])


def feature_vectorizer(draft: Draft, node: Node) -> None:
    """ai.onnx.ml FeatureVectorizer: inputs cut or padded with zeros to their stated widths, side by side."""
    parts = []
    widths = node.attrs.get("inputdimensions") or [draft.types[name].shape[-1] for name in node.inputs]
    for i, width in enumerate(widths):
        x = real_input(draft, node, i)
        shape = draft.types[x].shape
        if len(shape) == 1:
            x = draft.apply(node, "Reshape", x, draft.constant(f"{x}/column", np.array([-1, 1])), allowzero=0)
        more = width - draft.types[x].shape[1]
        if more:
            pads = draft.constant(f"{x}/pads", np.array([0, 0, 0, more]))
            x = draft.apply(node, "Pad", x, pads, mode="constant")
        parts.append(x)
    draft.apply(node, "Concat", *parts, out=node.outputs[0], axis=1)


def one_hot_encoder(draft: Draft, node: Node) -> None:
    """ai.onnx.ml OneHotEncoder."""
    x = node.inputs[0]
    categories = np.asarray(node.attrs.get("cats_strings") or node.attrs.get("cats_int64s") or ())
    axes = draft.constant(f"{x}/axis", np.array([len(draft.types[x].shape)]))
    wide = draft.apply(node, "Unsqueeze", x, axes)
    same = draft.apply(node, "Equal", wide, constant_like(draft, node, "categories", categories, wide))
    draft.apply(node, "Cast", same, out=node.outputs[0], to=1)


def zip_map(draft: Draft, node: Node) -> None:
    """ai.onnx.ml ZipMap: its maps are given as an array with a column for each key."""
    draft.apply(node, "Identity", node.inputs[0], out=node.outputs[0])


# Rows of their own


def _label_encoder(node: Node, x: Array) -> Array:
    """ai.onnx.ml LabelEncoder and CategoryMapper: values by key, a default where there is none."""
    keys, values, default = mapping_of(node)
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], values[order]
    if is_float(keys.dtype) and np.isnan(keys[-1:]).any():
        x = jnp.where(jnp.isnan(x), np.inf, x)
        keys = np.where(np.isnan(keys), np.inf, keys)
    at = jnp.clip(jnp.searchsorted(jnp.asarray(keys), x), 0, len(keys) - 1)
    return jnp.where(jnp.asarray(keys)[at] == x, jnp.asarray(values)[at], np.asarray(default, values.dtype))


def without_strings(node: Node) -> Node:
    """A LabelEncoder or CategoryMapper as a LabelEncoder (of opset 2 at least) of numbers, which strings are by now."""
    keys, values, default = mapping_of(node)
    attrs: dict[str, Any] = {}
    for part, numbers in (("keys", keys), ("values", values)):
        kind = "floats" if is_float(numbers.dtype) else "int64s"
        attrs[f"{part}_{kind}"] = tuple(numbers.tolist())
    name, python = ("default_float", float) if is_float(values.dtype) else ("default_int64", int)
    return replace(node, op="LabelEncoder", attrs={**attrs, name: python(default)}, version=max(node.version, 2))


def _nearest(node: Node, x: Array) -> Array:
    """Values next to one of `values`, by less than half the smallest distance of two of them, exchanged for it."""
    known = np.asarray(node.attrs["values"])
    between = jnp.asarray((known[1:] + known[:-1]) / 2)
    found = jnp.asarray(known)[jnp.searchsorted(between, x)]
    return jnp.where(jnp.abs(x - found) < np.min(np.diff(known)) / 2, found, x).astype(x.dtype)


def _imputer(node: Node, x: Array) -> Array:
    """ai.onnx.ml Imputer."""
    values, replaced = imputed(node)
    missing = jnp.isnan(x) if np.isnan(replaced) else x == replaced
    return jnp.where(missing, jnp.asarray(values, x.dtype), x)


register(
    *(Op("LabelEncoder", since, Kind.ELEMENTWISE, _label_encoder, domain=DOMAIN) for since in (1, 2, 4)),
    Op("CategoryMapper", 1, Kind.ELEMENTWISE, _label_encoder, domain=DOMAIN),
    Op("Nearest", 1, Kind.ELEMENTWISE, _nearest, domain="fheq"),
    Op("Imputer", 1, Kind.COMPOSITE, _imputer, domain=DOMAIN),
)
