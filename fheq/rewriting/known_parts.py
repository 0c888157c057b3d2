"""Known channels beside computed ones (coordinates, encodings of places) before weights: what they add is known.

A step takes a known channel for one value; of a channel of several values, pads included, zeros are read in its place, and
what it contributes is added behind the weights.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fheq.graph import Graph, Node
from fheq.rewriting.edit import Draft
from fheq.rewriting.evaluation import evaluated

_CONVOLUTIONS = ("Conv", "ConvTranspose")


def separate_known_parts(graph: Graph) -> Graph:
    """The graph with known channels of several values taken out of what products and convolutions read."""
    draft = Draft(graph)
    for node in graph.nodes:
        if not _separated(draft, node):
            draft.write(node)
    return draft.finish() if len(draft.nodes) > len(graph.nodes) else graph


def _separated(draft: Draft, node: Node) -> bool:
    joined = draft.graph.producers().get(node.inputs[0]) if node.inputs else None
    if node.domain or node.op not in (*_CONVOLUTIONS, "Gemm", "MatMul") or joined is None or joined.op != "Concat":
        return False
    rank = len(draft.types[joined.outputs[0]].shape)
    channel = 1 if node.op in _CONVOLUTIONS else 0 if node.attrs.get("transA", 0) else rank - 1
    if (
        joined.domain
        or joined.attrs["axis"] % rank != channel
        or any(n and n not in draft.constants for n in node.inputs[1:])
    ):
        return False
    parts = {n: draft.constants[n] for n in joined.inputs if n in draft.constants}
    uneven = {n for n, value in parts.items() if _is_uneven(node, value, channel)}
    if not uneven:
        return False
    out, nothing = node.outputs[0], lambda n: np.zeros(draft.types[n].shape, draft.types[n].dtype)
    names = [draft.constant(f"{out}/zeros", nothing(n)) if n in uneven else n for n in joined.inputs]
    alone = np.concatenate([parts[n] if n in uneven else nothing(n) for n in joined.inputs], axis=channel)
    place = draft.constant(f"{out}/alone", alone)
    added = evaluated(replace(node, inputs=(place, node.inputs[1])), draft.constants, draft.types)[out]
    varying = draft.fresh(f"{out}/varying")
    x = draft.apply(node, "Concat", *names, axis=channel)
    draft.write(replace(node, inputs=(x, *node.inputs[1:]), outputs=(varying,)))
    draft.apply(node, "Add", varying, draft.constant(f"{out}/known", added), out=out)
    return True


def _is_uneven(node: Node, value: np.ndarray, channel: int) -> bool:
    """Whether a channel of a known part has several values, the zeros that a convolution pads with among them."""
    if not value.size:
        return False
    rows = np.moveaxis(value, channel, 0).reshape(value.shape[channel], -1)
    padded = node.op in _CONVOLUTIONS and (
        node.op == "ConvTranspose" or any(node.attrs.get("pads") or ()) or "SAME" in str(node.attrs.get("auto_pad", ""))
    )
    return bool(np.any(rows != rows[:, :1]) or (padded and np.any(rows)))
