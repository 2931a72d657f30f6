"""The life of a worker process: silent, and never longer than its parent's."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import multiprocessing
import os
import pickle
import resource
import signal
from multiprocessing.connection import Connection

from medssl.executors._limits import Attempt
from medssl.executors._outcomes import pack_error, unpack_function
from medssl.executors.base import Guard

READY, UNUSABLE, OUTCOME = b"R", b"U", b"O"
"""First byte of what a worker sends: it can begin; it cannot load the function; an outcome."""


def serve(connection: Connection, function: bytes, guard: Guard | None) -> None:
    """Apply a packed function to packed items as they come, until the parent hangs up.

    Sends `READY` once the function is loaded, then for every item, in order, `OUTCOME` and what
    became of it.
    """
    _end_with_parent()
    _fall_silent()
    with contextlib.suppress(EOFError, OSError):  # the parent has hung up
        try:
            attempt = Attempt(unpack_function(function), guard)
        except BaseException as error:  # noqa: BLE001  (the caller sees it)
            connection.send_bytes(UNUSABLE + pack_error(error))
            return
        connection.send_bytes(READY)
        while True:
            for item in pickle.loads(connection.recv_bytes()):  # noqa: S301  (our own parent's)
                connection.send_bytes(OUTCOME + attempt(item))


def _end_with_parent() -> None:
    """Let the kernel end this process when its parent does, whatever code it is in.

    The parent holds one end of a pipe. When it closes, at the latest by the parent's death, the
    kernel sends SIGIO, whose default action ends a process. Ctrl-C is left to the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGIO, signal.SIGTERM})
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(parent.sentinel, fcntl.F_GETFL)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)
    if not parent.is_alive():  # it ended before the kernel was asked to tell
        os._exit(1)


def _fall_silent() -> None:
    """Print nothing and leave no core: what a library says of a file may name a patient."""
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
