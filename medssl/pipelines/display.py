"""Show progress: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_SECONDS = 10.0
"""Where there is no terminal, a stage prints a line at most this often, and at its end."""


class Display:
    """Shows how far each stage is. Use it in a ``with`` statement, and call it as a `Progress`.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True)
        self._quiet = quiet
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._printed: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            self._bars = Progress(
                TextColumn("{task.description:24}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Report ``done`` of ``total`` of a stage."""
        if self._quiet:
            return
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total or None, note="")
            self._bars.update(self._tasks[stage], completed=done, total=total or None, note=note)
            return
        now = time.monotonic()
        self._started.setdefault(stage, now)
        last, printed = self._printed.get(stage, (-_LINE_SECONDS, -1))
        is_last = bool(total) and done >= total
        if printed == done or (not is_last and now - last < _LINE_SECONDS):
            return
        self._printed[stage] = (now, done)
        elapsed = now - self._started[stage]
        count = f"{done}/{total}, " if total else f"{done}, " if done else ""
        text = f"{stage}: {count}{elapsed:.0f} s"
        print(f"{text}, {note}" if note else text, file=sys.stderr, flush=True)  # noqa: T201
