"""The errors that fheq raises: each names the place, the cause and the remedy."""

from __future__ import annotations


class FheqError(Exception):
    """Base of every error that fheq raises on purpose."""


class ModelError(FheqError):
    """The model itself is malformed: unreadable bytes, a cycle, a missing tensor, NaN weights."""


class UnsupportedError(FheqError):
    """The model is valid, but uses an operator or a form that fheq does not take."""


class ShapeError(FheqError):
    """A shape is not static where it must be, or shapes do not fit together."""


class DataError(FheqError):
    """Arrays given by the caller are empty, not finite, or of the wrong shape or type."""


class ArgumentError(FheqError, ValueError):
    """An option has a value that it cannot have, such as a probability outside of (0, 1)."""


class QuantizationError(FheqError):
    """Quantizer parameters or a specification do not fit the graph."""


class CompileError(FheqError):
    """concrete-python could not turn a program into a circuit."""
