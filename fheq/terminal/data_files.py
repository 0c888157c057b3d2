"""Arrays for a model from .npz and .npy files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fheq.errors import DataError
from fheq.graph import Port

CALIBRATE = ("x_train", "in")
RUN = ("x_test", "t")


@dataclass(frozen=True, eq=False)
class Chosen:
    """Arrays of a file, one per model input.

    Args:
        keys: their names in the file.
        arrays: in the order of the model's inputs.
    """

    keys: tuple[str, ...]
    arrays: tuple[np.ndarray, ...]

    def __str__(self) -> str:
        return f"{', '.join(self.keys)} {', '.join(str(a.shape) for a in self.arrays)}"


def load_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name; that of an .npy file under the file's name.

    Raises:
        DataError: a missing or damaged file, or one without arrays.
    """
    if not Path(path).is_file():
        raise DataError(f"file {str(path)!r} does not exist or is no file")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {Path(path).stem: loaded}
        arrays = {key: loaded[key] for key in loaded.files}
    except Exception as error:  # numpy raises whatever zip and pickle raise
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"file {str(path)!r} cannot be read as .npz or .npy: {cause}") from error
    if not arrays:
        raise DataError(f"file {str(path)!r} holds no arrays")
    return arrays


def choose(arrays: dict[str, np.ndarray], ports: Sequence[Port], names: tuple[str, str] = CALIBRATE) -> Chosen:
    """The arrays for the model's inputs: those with the inputs' names; else `names[0]` (for one input); else `names[1]`
    followed by 0, 1, ...; else the only array of the file.

    Raises:
        DataError: none of these is in the file; the message says what it holds and what it should.
    """
    single, numbered = names
    options = [tuple(port.name for port in ports), tuple(f"{numbered}{i}" for i in range(len(ports)))]
    if len(ports) == 1:
        options.insert(1, (single,))
        if len(arrays) == 1:
            options.append(tuple(arrays))
    for keys in options:
        if all(key in arrays for key in keys):
            return Chosen(keys, tuple(arrays[key] for key in keys))
    wanted = " or ".join(", ".join(map(repr, keys)) for keys in options)
    raise DataError(f"the data hold the arrays {sorted(arrays)}, but the model needs {wanted}")


def choose_samples(arrays: dict[str, np.ndarray], ports: Sequence[Port]) -> Chosen:
    """As `choose`, but samples to run: `x_test` or t0, t1, ... where the file has them, else those of calibration."""
    single, numbered = RUN
    has_test = (len(ports) == 1 and single in arrays) or all(f"{numbered}{i}" in arrays for i in range(len(ports)))
    if not has_test:
        return choose(arrays, ports)
    others = {key: value for key, value in arrays.items() if key not in [port.name for port in ports]}
    return choose(others, ports, RUN)
