"""Work split over the devices of a mesh and over processes.

Samples are split along the mesh's axis "data", and a sweep's configurations along all its other axes. In several processes
(`jax.distributed`) each gives its own samples, works on its own devices, and all exchange their sums once, at the end: they
may have different numbers of samples. All get the same result.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import enable_x64, multihost_utils
from jax.sharding import Mesh

from fheq.errors import DataError

DATA = "data"


def local_mesh(mesh: Mesh | None) -> Mesh | None:
    """The part of a mesh on this process's devices.

    Raises:
        DataError: the mesh has no axis "data".
    """
    if mesh is None:
        return None
    if DATA not in mesh.axis_names:
        raise DataError(f'the mesh needs an axis "data", along which samples are split; it has {mesh.axis_names}')
    return mesh.local_mesh


def configuration_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes along which configurations are split."""
    return tuple(str(name) for name in mesh.axis_names if name != DATA)


def size(mesh: Mesh | None, axes: tuple[str, ...]) -> int:
    """The number of devices along some axes; 1 without a mesh."""
    return 1 if mesh is None else int(np.prod([mesh.shape[name] for name in axes], dtype=int))


def gather(mesh: Mesh | None, tree: Any) -> list[Any]:
    """A pytree of host arrays from every process that the mesh spans, in their order; this one's alone without a mesh."""
    if mesh is None or len({d.process_index for d in mesh.devices.flat}) == 1:
        return [tree]
    with enable_x64():
        found = jax.tree.map(np.asarray, multihost_utils.process_allgather(tree))
    return [jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(jax.process_count())]
