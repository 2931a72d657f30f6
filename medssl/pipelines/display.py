"""Show progress: bars on a terminal, plain lines elsewhere, with rates and the time left."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_LINE_SECONDS = 10.0
"""Where there is no terminal, a stage prints a line at most this often, and at its end."""

_LINE_SHARE = 0.05
"""The longer a stage lasts, the fewer lines: the next comes after so much of the time it took."""

_MOST_LINE_SECONDS = 600.0


@dataclass
class _Stage:
    """What is known of one stage.

    Attributes:
        started: when it was first heard of.
        first: what was done then already, in an earlier start of the command.
        printed: when the last line came, and what it said was done.
    """

    started: float
    first: int
    printed: tuple[float, int] = field(default=(float("-inf"), -1))

    def rate(self, done: int, now: float) -> float | None:
        """Return how much is done a second, or None as long as nobody can know."""
        elapsed = now - self.started
        return (done - self.first) / elapsed if done > self.first and elapsed > 0 else None


class _RateColumn(ProgressColumn):
    """How much is done a second, or how many seconds one takes."""

    def render(self, task: Task) -> Text:
        return Text(_rate_in_words(task.finished_speed or task.speed), style="progress.data.speed")


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
        self._stages: dict[str, _Stage] = {}

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            self._bars = Progress(
                TextColumn("{task.description:24}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                _RateColumn(),
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
        self.pause()

    def pause(self) -> None:
        """Leave the terminal alone until more is reported: somebody is asked something."""
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Report ``done`` of ``total`` of a stage."""
        if self._quiet:
            return
        if self._bars is not None:
            if not self._bars.live.is_started:
                self._bars.start()
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(
                    stage, total=total or None, completed=done, note=""
                )
            self._bars.update(self._tasks[stage], completed=done, total=total or None, note=note)
            return
        self._print(stage, done, total, note)

    def _print(self, name: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        stage = self._stages.setdefault(name, _Stage(now, done))
        last, printed = stage.printed
        is_last = bool(total) and done >= total
        elapsed = now - stage.started
        pause = min(max(_LINE_SECONDS, _LINE_SHARE * elapsed), _MOST_LINE_SECONDS)
        if printed == done or (not is_last and now - last < pause):
            return
        stage.printed = (now, done)
        count = f"{done}/{total}" if total else f"{done}" if done else ""
        words = [count, _time_in_words(elapsed)]
        rate = stage.rate(done, now)
        if rate is not None and elapsed >= 1:
            words.append(_rate_in_words(rate))
            if total and not is_last:
                words.append(f"{_time_in_words((total - done) / rate)} left")
        text = f"{name}: {', '.join(word for word in [*words, note] if word)}"
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def _rate_in_words(rate: float | None) -> str:
    """Return a rate so that its number is 1 or more: 3.2/s, or 4.5 s each."""
    if not rate:
        return ""
    return f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.2g} s each"


def _time_in_words(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
