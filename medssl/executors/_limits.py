"""Hold one call to its time and its memory, inside the worker process that makes it."""

from __future__ import annotations

import pickle
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from medssl.executors._outcomes import pack_error, pack_loss, pack_result
from medssl.executors.base import Guard, Loss

_STATM = Path("/proc/self/statm")
_STATM_DATA = 5  # field: pages of private writable memory, which is what RLIMIT_DATA counts


class TimeIsUp(BaseException):
    """One item has used its time; no Exception, for code that catches every one of those."""


class Attempt:
    """Calls a function on one item at a time, within the limits of a guard.

    The time is watched by an alarm that raises inside the call; it cannot interrupt C code, whose
    end is up to the parent. The memory is limited to what the process holds when the call begins
    and ``guard.megabytes`` more, counted as the kernel counts private writable memory
    (``RLIMIT_DATA``): maps of files and address space that is only reserved do not count. Where
    the kernel does not say what a process holds (no ``/proc``), memory is not limited.

    Needs the main thread of its process.
    """

    def __init__(self, function: Callable[[Any], Any], guard: Guard | None) -> None:
        self._function = function
        self._guard = guard
        self._armed = False
        self._memory = resource.getrlimit(resource.RLIMIT_DATA)
        signal.signal(signal.SIGALRM, self._ring)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})

    def __call__(self, item: bytes) -> bytes:
        """Return the packed outcome of one packed item."""
        loss: Loss
        try:
            self._arm()
            try:
                return pack_result(self._function(pickle.loads(item)))  # noqa: S301  (our parent's)
            finally:
                self._disarm()
        except TimeIsUp:
            loss = "too_slow"
        except MemoryError:
            loss = "out_of_memory"
        except BaseException as error:  # noqa: BLE001  (it is the caller's to handle)
            self._disarm()
            return pack_error(error)
        self._disarm()  # again: the alarm may have rung inside the first
        return pack_loss(loss)

    def _arm(self) -> None:
        if self._guard is None:
            return
        held = _held_bytes() if self._guard.megabytes is not None else None
        if held is not None and self._guard.megabytes is not None:
            allowed = held + self._guard.megabytes * 1_000_000
            hard = self._memory[1]
            if hard != resource.RLIM_INFINITY:
                allowed = min(allowed, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))
        self._armed = True
        signal.setitimer(signal.ITIMER_REAL, self._guard.seconds)

    def _disarm(self) -> None:
        self._armed = False
        if self._guard is None:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self._guard.megabytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, self._memory)

    def _ring(self, _: int, __: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            raise TimeIsUp


def _held_bytes() -> int | None:
    try:
        pages = int(_STATM.read_bytes().split()[_STATM_DATA])
    except (OSError, IndexError, ValueError):
        return None
    return pages * resource.getpagesize()
