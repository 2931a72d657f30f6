"""The server that workers are forked from: one process, without threads, kept for the next pool."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, SpawnContext

PRELOAD = ("numpy", "pydantic", "yaml", "pydicom", "nibabel", "medssl.executors._worker")
"""What the server imports, once for all workers: slow to import, and started without a thread.

Not torch or MONAI, and not pandas, whose pyarrow starts threads: a fork of a process with threads
can hang.
"""

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_STARTING = threading.Lock()


def worker_context() -> ForkServerContext | SpawnContext:
    """Return where worker processes come from: a fork server, or new ones where there is none."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    with _STARTING:
        resource_tracker.ensure_running()  # it would unblock the signal that is blocked below
        with _no_interrupt(), _one_thread():
            forkserver.ensure_running()
    return context


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Let what is started here never see Ctrl-C, which is the parent's to handle."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Give libraries of what is started here one thread each, unless the user has said other."""
    missing = [name for name in _ONE_THREAD if name not in os.environ]
    os.environ.update(dict.fromkeys(missing, "1"))
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


@contextmanager
def unimportable_main(*, wanted: bool) -> Iterator[None]:
    """Keep processes that are started here from importing the main module again, if wanted.

    multiprocessing imports it in every worker, which runs a script or notebook from its top unless
    all of it stands under ``if __name__ == "__main__":``. Only functions defined there need it.
    """
    main = sys.modules["__main__"]
    names: tuple[str, ...] = ("__file__", "__spec__")
    hidden = {name: vars(main)[name] for name in names if name in vars(main)}
    if not wanted or not hidden:
        yield
        return
    with _STARTING:
        main.__spec__ = None
        if "__file__" in hidden:
            del main.__file__
        try:
            yield
        finally:
            vars(main).update(hidden)
