"""fheq quantizes ONNX models and compiles them to run on encrypted data.

Names are loaded when first used: `import fheq` loads neither onnx nor concrete nor torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "import_onnx": "fheq.onnx",
    "evaluate": "fheq.evaluate",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fheq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
