"""Ctrl-C and SIGTERM while training: the step is finished and saved, then the process ends.

Under torchrun a signal often comes twice: from the terminal or the batch system to every process,
and once more from torchrun. There a second one changes nothing; torchrun's patience
(TORCH_ELASTIC_SHUTDOWN_TIMEOUT, 30 seconds) sets the end.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any, Self

from medssl.errors import Terminated
from medssl.training.launch import by_torchrun

log = logging.getLogger(__name__)

_SECONDS_A_MINUTE = 60


class TimeUp(Terminated):
    """`training.max_minutes` are over; as after SIGTERM, the same command goes on."""

    is_planned = True


class Stop(IntEnum):
    """Why a training is to stop; of several reasons, the highest counts."""

    NO = 0
    TIME_UP = 1
    TERMINATED = 2
    INTERRUPTED = 3


class Interruption:
    """Holds signals back until the training asks for them; used in a ``with`` statement.

    The second signal is not held back, but under torchrun. Signals reach Python's main thread
    alone, so in another thread nothing is held back, and time limits alone apply.

    Args:
        max_minutes: wall time of the block, after which it is interrupted too; None for no limit.
        clock: seconds, for tests.
    """

    def __init__(
        self, max_minutes: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._end = None if max_minutes is None else clock() + max_minutes * _SECONDS_A_MINUTE
        self._max_minutes = max_minutes
        self._caught: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    @property
    def wanted(self) -> Stop:
        """Why the training is to stop at the next opportunity, if it is."""
        if self._caught is not None:
            return Stop.INTERRUPTED if self._caught is signal.SIGINT else Stop.TERMINATED
        late = self._end is not None and self._clock() >= self._end
        return Stop.TIME_UP if late else Stop.NO

    def error(self, why: Stop) -> BaseException:
        """Return what to raise once everything is saved."""
        if why is Stop.INTERRUPTED:
            return KeyboardInterrupt()
        if why is Stop.TIME_UP:
            return TimeUp(f"training.max_minutes: the {self._max_minutes:g} minutes are over.")
        return Terminated()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._hold)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _hold(self, number: int, _: FrameType | None) -> None:
        self._caught = signal.Signals(number)
        if by_torchrun():
            for each in self._handlers:
                signal.signal(each, signal.SIG_IGN)
            self._handlers = {}  # ignored from here on: what is left to do is to save and to leave
            log.warning("stopping after this step; its state is saved")
            return
        self._restore()  # a second signal ends the process at once
        log.warning("stopping after this step; its state is saved (again: stop at once)")

    def _restore(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)
