"""Results kept in a folder, so that a long run that was stopped can go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from fheq.errors import DataError

RESULTS = "results.jsonl"


class Memory:
    """What was computed already, by name; without a folder it keeps nothing.

    Values are lines of a file that is only ever added to, arrays files of their own: whenever a run stops, what is there is
    whole, but perhaps for the last line, which is then dropped.

    Args:
        folder: made if need be.
        fingerprint: of everything that the results depend on.

    Raises:
        DataError: the folder holds results of something else, or damaged ones, or is none.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, fingerprint: str):
        self.folder = None if folder is None else Path(folder)
        self.values: dict[str, Any] = {}
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise DataError(f"{str(self.folder)!r} is a file; results are kept in a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RESULTS
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        for line in whole.splitlines():
            self.values.update(self._parsed(line))
        if self.values.setdefault("fingerprint", fingerprint) != fingerprint:
            raise DataError(
                f"{str(self.folder)!r} holds results of another model, other data, another score or other options"
            )
        if whole:
            os.truncate(path, len(whole) + 1)
        else:
            path.write_text(_line("fingerprint", fingerprint))

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            return dict(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"{RESULTS} in {str(self.folder)!r} is damaged ({error}): remove the folder to start anew"
            ) from error

    def value(self, name: str, compute: Callable[[], Any]) -> Any:
        """A value that JSON can hold."""
        if name not in self.values:
            self.values[name] = compute()
            if self.folder is not None:
                with (self.folder / RESULTS).open("a") as file:
                    file.write(_line(name, self.values[name]))
        return self.values[name]

    def arrays(self, name: str, compute: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """Arrays by name."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"
        if not path.exists():
            np.savez(path.with_suffix(".new.npz"), **compute())
            path.with_suffix(".new.npz").replace(path)
        try:
            with np.load(path) as found:
                return dict(found)
        except (EOFError, ValueError, BadZipFile) as error:
            raise DataError(f"{str(path)!r} is damaged ({error}): remove it, and it is made again") from error


def _line(name: str, value: Any) -> str:
    return json.dumps({name: value}) + "\n"


def fingerprint(*parts: Any) -> str:
    """A digest of arrays and of the texts of everything else."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.shape}{part.dtype}".encode() + np.ascontiguousarray(part).tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()
