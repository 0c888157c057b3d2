"""Configurations: many specs, and many quantizers of one graph as one `QParams` with a leading axis on every leaf."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any

import jax
import numpy as np

from fheq.affine import LEAVES, Affine
from fheq.errors import QuantizationError
from fheq.qparams import PARTS, QParams
from fheq.spec import Spec


def grid(spec: Spec | None = None, **axes: Iterable[Any]) -> list[Spec]:
    """The specs of a grid: every combination of the values given for fields of `Spec`, the last varying fastest.

    Args:
        spec: where the other fields come from.
        axes: by field of `Spec`, its values.

    Raises:
        QuantizationError: a name that is no field of `Spec`.
    """
    known = [f.name for f in fields(Spec)]
    for name in axes:
        if name not in known:
            raise QuantizationError(f"{name!r} is no field of Spec; it has {known}")
    spec = spec or Spec()
    return [replace(spec, **dict(zip(axes, values))) for values in product(*axes.values())]


def stack(configurations: Iterable[QParams]) -> QParams:
    """Quantizers of one graph as one `QParams` with a leading axis on every leaf.

    Exact and approximate rounding are one to fake quantization: where the mode differs it becomes "mixed", which `lower`
    refuses.

    Raises:
        QuantizationError: none is given, or they differ in more than values (graphs, granularities); the message says where.
    """
    given = list(configurations)
    if not given:
        raise QuantizationError("stack needs at least one QParams")
    parts = [{name: _stack_affines(name, part, given) for name in getattr(given[0], part)} for part in PARTS]
    return QParams(*parts)


def _stack_affines(name: str, part: str, given: Sequence[QParams]) -> Affine:
    found = [getattr(q, part).get(name) for q in given]
    for i, other in enumerate(found):
        if other is None or len(getattr(given[i], part)) != len(getattr(given[0], part)):
            raise QuantizationError(f"configurations 0 and {i} are not of one graph: their {part} differ ({name!r})")
        if other.axis != found[0].axis or other.signed != found[0].signed:
            raise QuantizationError(
                f"configurations 0 and {i} differ in the granularity or sign of {name!r}: sweep them separately"
            )
    modes = {a.rounding for a in found}
    leaves = {n: np.stack(np.broadcast_arrays(*(np.asarray(getattr(a, n)) for a in found))) for n in LEAVES}
    return replace(found[0], **leaves, rounding=modes.pop() if len(modes) == 1 else "mixed")


def configurations(**trees: Any) -> int:
    """The number of configurations that the leading axes of some pytrees hold."""
    sizes: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(trees)[0]:
        where = path[0].key + jax.tree_util.keystr(path[1:])
        if np.ndim(leaf) == 0 or len(leaf) == 0:
            raise QuantizationError(
                f"{where} lacks the leading axis of configurations: build qparams with stack or jax.vmap"
            )
        sizes.setdefault(len(leaf), where)
    if len(sizes) != 1:
        told = ", ".join(f"{where}: {n}" for n, where in sizes.items())
        raise QuantizationError(f"leaves hold different numbers of configurations ({told})")
    return next(iter(sizes))
