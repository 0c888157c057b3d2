"""Results kept in a folder, so that a long run that was stopped can go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fheq.errors import DataError

RESULTS = "results.json"


class Memory:
    """What was computed already, by name; without a folder it keeps nothing.

    Args:
        folder: made if need be.
        fingerprint: of everything that the results depend on.

    Raises:
        DataError: the folder holds results of something else.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, fingerprint: str):
        self.folder = None if folder is None else Path(folder)
        self.values: dict[str, Any] = {"fingerprint": fingerprint}
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / RESULTS).exists():
            self.values = json.loads((self.folder / RESULTS).read_text())
            if self.values.get("fingerprint") != fingerprint:
                raise DataError(f"{str(self.folder)!r} holds results of another model, other data or other options")

    def value(self, name: str, compute: Callable[[], Any]) -> Any:
        """A value that JSON can hold."""
        if name not in self.values:
            self.values[name] = compute()
            if self.folder is not None:
                written = self.folder / (RESULTS + ".new")
                written.write_text(json.dumps(self.values))
                written.replace(self.folder / RESULTS)  # whole or not at all
        return self.values[name]

    def arrays(self, name: str, compute: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """Arrays by name."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"
        if not path.exists():
            np.savez(path.with_suffix(".new.npz"), **compute())
            path.with_suffix(".new.npz").replace(path)
        with np.load(path) as found:
            return dict(found)


def fingerprint(*parts: Any) -> str:
    """A digest of arrays and of the texts of everything else."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.shape}{part.dtype}".encode() + np.ascontiguousarray(part).tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()
