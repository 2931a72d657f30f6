"""Processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, TypeVar

from pydantic import Field

from medssl.config import ComponentConfig
from medssl.errors import MachineError
from medssl.executors.base import Executor

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_AUTO_WORKERS = 16
_MAX_CHUNK = 64  # items; small enough for a smooth progress bar
_AHEAD = 4  # chunks in flight per worker


class Config(ComponentConfig):
    """Local processes.

    Attributes:
        num_workers: processes; 0 works in this one.
    """

    name: Literal["local"] = "local"
    num_workers: int = Field(default=0, ge=0)


def available_cores() -> int:
    """Return how many cores this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def auto_workers(num_items: int, worthwhile: int) -> int:
    """Return a number of workers: none for few items, else one a core, at most 16."""
    cores = available_cores()
    return 0 if num_items < worthwhile or cores < 2 else min(cores, MAX_AUTO_WORKERS)


class LocalExecutor(Executor):
    """An ordered map over spawned processes, or in this process when there are none.

    Processes are spawned, not forked: a fork of a process with threads (PyTorch's, for example) can
    hang. They import only what the function needs.
    """

    def __init__(self, config: Config | None = None) -> None:
        config = config or Config()
        super().__init__(config)
        self.num_workers = config.num_workers

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        lost: Callable[[Item], Result] | None = None,
        chunk_size: int | None = None,
    ) -> Iterator[Result]:
        """See `Executor.map`."""
        if self.num_workers == 0 or not items:
            for item in items:
                yield function(item)
            return
        size = chunk_size or max(1, min(_MAX_CHUNK, len(items) // (self.num_workers * _AHEAD)))
        chunks = [items[start : start + size] for start in range(0, len(items), size)]
        done = 0
        while done < len(chunks):
            for results in self._completed(function, chunks[done:]):
                yield from results
                done += 1
            if done < len(chunks):  # a worker died somewhere in the chunks in flight
                for item in chunks[done]:
                    yield self._alone(function, item, lost)
                done += 1

    def _completed(
        self, function: Callable[[Item], Result], chunks: Sequence[Sequence[Item]]
    ) -> Iterator[list[Result]]:
        """Yield the results of chunks in order, and stop early when a worker dies."""
        pool = _start(min(self.num_workers, len(chunks)))
        waiting: deque[Future[list[Result]]] = deque()
        remaining = iter(chunks)
        try:
            for chunk in remaining:
                waiting.append(pool.submit(_apply, function, chunk))
                if len(waiting) < self.num_workers * _AHEAD:
                    continue
                yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            return
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _alone(
        self,
        function: Callable[[Item], Result],
        item: Item,
        lost: Callable[[Item], Result] | None,
    ) -> Result:
        """Run one item in a process of its own, so that it can only take itself down."""
        pool = _start(1)
        try:
            return pool.submit(function, item).result()
        except BrokenProcessPool:
            if lost is not None:
                return lost(item)
            raise MachineError(
                "a worker process died, most often for lack of memory. Free memory or give fewer "
                "workers (num_workers), and start the same command again: it resumes."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start(num_workers: int) -> ProcessPoolExecutor:
    """Start processes, and make sure that the first one answers."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_leave_signals_to_parent
    )
    try:
        pool.submit(_answer).result()
    except BrokenProcessPool:
        pool.shutdown(wait=False, cancel_futures=True)
        raise MachineError(
            "worker processes cannot start. In a script, put the call under "
            "`if __name__ == '__main__':`; or set num_workers: 0 to work in one process."
        ) from None
    return pool


def _leave_signals_to_parent() -> None:
    """Ignore Ctrl-C in a worker: the parent ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _answer() -> bool:
    return True


def _apply(function: Callable[[Any], Any], chunk: Sequence[Any]) -> list[Any]:
    return [function(item) for item in chunk]
