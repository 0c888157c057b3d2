"""What a sweep found: scores by configuration, as rows and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from fheq.display.console import number, text_table
from fheq.errors import DataError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Results:
    """What a sweep found, a pytree.

    Args:
        scores: by name; every leaf has the configurations as its leading axis.
    """

    scores: dict[str, Any]

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.scores)[0])

    def rows(self, **columns: Sequence[Any]) -> list[dict[str, Any]]:
        """A row per configuration: its number, the given columns (as long as the sweep), then its scores."""
        for name, values in columns.items():
            if len(values) != len(self):
                raise DataError(f"column {name!r} has {len(values)} values for {len(self)} configurations")
        leaves: dict[str, Any] = {
            _title(path): np.asarray(v) for path, v in jax.tree_util.tree_flatten_with_path(self.scores)[0]
        }
        known: dict[str, Any] = {"configuration": range(len(self)), **columns, **leaves}
        return [{name: values[i] for name, values in known.items()} for i in range(len(self))]

    def table(self, **columns: Sequence[Any]) -> str:
        """The rows as text."""
        rows = self.rows(**columns)
        return text_table(list(rows[0]), [[_cell(v) for v in row.values()] for row in rows])

    def __str__(self) -> str:
        return self.table()


def _title(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def _cell(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return number(float(value))
    return " ".join(str(value).split())
