"""Processes on this machine."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar

from pydantic import Field

from medssl.config import ComponentConfig
from medssl.executors._outcomes import settle, settle_loss
from medssl.executors.base import Executor, Guard, Loss

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_AUTO_WORKERS = 16


class Config(ComponentConfig):
    """Local processes.

    Attributes:
        num_workers: processes; absent: one a core that this process may use, at most 16; 0: this
            one, where no guard holds: an item may take any time and memory, and one that crashes
            takes the whole run down.
    """

    name: Literal["local"] = "local"
    num_workers: int | None = Field(default=None, ge=0)


def available_cores() -> int:
    """Return how many cores this process may use: by its affinity, and by a container's quota."""
    from joblib import cpu_count

    return int(cpu_count())


def default_workers() -> int:
    """Return how many workers there are where none say how many: one a core, at most 16."""
    return min(available_cores(), MAX_AUTO_WORKERS)


class LocalExecutor(Executor):
    """An ordered map over worker processes, or in this process when there are none.

    Workers are forked from a server process that holds no threads, not from this one: a fork of a
    process with threads (PyTorch's, for example) can hang. The server stays, so that only the
    first map of a program waits for its imports. Workers print nothing, and end when this process
    does, however it ends.

    The time limit of a guard is raised inside the function, as a `BaseException`; code that no
    exception can interrupt is ended with its worker two seconds later. Of an item whose worker
    dies there is one more attempt, so the function may run twice on it.
    """

    def __init__(self, config: Config | None = None) -> None:
        config = config or Config()
        super().__init__(config)
        workers = config.num_workers
        self.num_workers = default_workers() if workers is None else workers

    def map(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        lost: Callable[[Item, Loss], Result] | None = None,
        guard: Guard | None = None,
        chunk_size: int = 1,
    ) -> Iterator[Result]:
        """See `Executor.map`."""
        if self.num_workers == 0:
            return _map_here(function, items, lost)
        return self._map(function, items, lost, guard, chunk_size)

    def _map(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        lost: Callable[[Item, Loss], Result] | None,
        guard: Guard | None,
        chunk_size: int,
    ) -> Iterator[Result]:
        from medssl.executors._crew import Crew

        in_flight: deque[Item] = deque()

        def packed() -> Iterator[bytes]:
            for item in items:
                in_flight.append(item)
                yield pickle.dumps(item, pickle.HIGHEST_PROTOCOL)

        packed_function = pickle.dumps(function, pickle.HIGHEST_PROTOCOL)
        with Crew(packed_function, self.num_workers, guard) as crew:
            for outcome in crew.map(packed(), chunk_size):
                yield settle(in_flight.popleft(), outcome, lost)


def _map_here(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    lost: Callable[[Item, Loss], Result] | None,
) -> Iterator[Result]:
    for item in items:
        try:
            result = function(item)
        except MemoryError:
            result = settle_loss(item, "out_of_memory", lost)
        yield result
