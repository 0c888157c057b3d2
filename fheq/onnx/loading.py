"""Bytes to a `ModelProto`: whatever is wrong with the file becomes a `ModelError` that names it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx import defs

from fheq.errors import FheqError, ModelError, UnsupportedError

OLDEST_OPSET = 7

Source = str | os.PathLike | bytes | onnx.ModelProto


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns whatever protobuf or onnx raise while `what` is read into a `ModelError`."""
    try:
        yield
    except FheqError:
        raise
    except Exception as error:
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"{what} cannot be read: {cause}; the file may be damaged, export the model again") from error


def load(model: Source) -> onnx.ModelProto:
    """The model behind a path, bytes or a `ModelProto`, with its external data and a checked opset.

    Raises:
        ModelError: a missing, empty or damaged file, bytes that are no model, or the wrong type of argument.
        UnsupportedError: an opset outside 7 .. the newest that the installed onnx knows.
    """
    if isinstance(model, onnx.ModelProto):
        proto, what = model, "the model"
    elif isinstance(model, bytes | bytearray | memoryview):
        proto, what = _from_bytes(bytes(model)), "the model's bytes"
    elif isinstance(model, str | os.PathLike):
        proto, what = _from_file(Path(os.fspath(model))), f"file {str(model)!r}"
    else:
        raise ModelError(f"model must be a path, bytes or an onnx.ModelProto, not {type(model).__name__}")
    with reading(what):
        if not proto.HasField("graph") or not proto.graph.output:
            raise ModelError(f"{what}: no ONNX model with a graph that has outputs; is this another kind of file?")
        _check_opset(proto, what)
    return proto


def _from_bytes(data: bytes) -> onnx.ModelProto:
    if not data:
        raise ModelError("the model's bytes are empty")
    with reading("the model's bytes"):
        return onnx.load_model_from_string(data)


def _from_file(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ModelError(f"file {str(path)!r} does not exist or is no file")
    with reading(f"file {str(path)!r}"):
        if path.stat().st_size == 0:
            raise ModelError(f"file {str(path)!r} is empty")
        return onnx.load(str(path))


def _check_opset(proto: onnx.ModelProto, what: str) -> None:
    newest = defs.onnx_opset_version()
    version = opsets(proto.opset_import).get("")
    if version is None and proto.opset_import and all(normal_domain(node.domain) for node in proto.graph.node):
        return  # models of ai.onnx.ml alone, as onnxmltools exports them: nothing is there to have a version
    if version is None:
        raise ModelError(f"{what}: the model does not say which opset of ai.onnx it uses; export it again")
    if not OLDEST_OPSET <= version <= newest:
        raise UnsupportedError(
            f"{what}: the model uses opset {version} of ai.onnx, but fheq takes {OLDEST_OPSET} to {newest}; convert it "
            f"with onnx.version_converter.convert_version(model, {min(max(version, 17), newest)}), or export it again"
            + (" (a newer onnx package may know this opset)" if version > newest else "")
        )


def opsets(imports: onnx.ModelProto.opset_import) -> dict[str, int]:
    """Domain ("" for ai.onnx) to version."""
    return {normal_domain(entry.domain): entry.version for entry in imports}


def normal_domain(domain: str) -> str:
    """The domain with the two names of ai.onnx made one."""
    return "" if domain == "ai.onnx" else domain
