"""Signals that concrete's runtime takes over when it first runs a circuit, given back.

HPX, which runs circuits, aborts the process on SIGPIPE. Python ignores this signal, so that writing to a pipe or a socket
whose reader is gone raises `BrokenPipeError`: a web server's client that hangs up, a pool's process that dies.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def broken_pipes_raise() -> Iterator[None]:
    """After what runs inside, SIGPIPE is ignored again, if Python had it so."""
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN:
            # signal.signal would do, but in the main thread alone.
            ctypes.pythonapi.PyOS_setsig(ctypes.c_int(signal.SIGPIPE), ctypes.c_void_p(int(signal.SIG_IGN)))
