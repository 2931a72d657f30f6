"""A crew of worker processes: hands out items, hears outcomes, replaces the fallen."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess, SpawnProcess
from types import TracebackType

from medssl.errors import MachineError
from medssl.executors._outcomes import pack_loss
from medssl.executors._server import unimportable_main, worker_context
from medssl.executors._window import AHEAD, Job, in_order
from medssl.executors._worker import OUTCOME, READY, UNUSABLE, serve
from medssl.executors.base import Guard, Loss

_GRACE_SECONDS = 2.0  # for a worker to end an item itself before the parent ends the worker
_START_SECONDS = 300.0  # for imports from a slow disk, many workers at once
_MAX_FAILED_STARTS = 3  # in a row, of a crew that once could start
_MAX_DEATHS = 2  # of workers on one item: once may be chance (the kernel chose a victim)
_PREFETCH_BYTES = 32_768  # a chunk behind another must fit the pipe, or both ends could wait


@dataclass
class _Worker:
    """One process.

    Attributes:
        jobs: handed to it and not answered, in order; it works on the first.
        since: when it began to start, or began the first of its jobs at the latest.
    """

    process: ForkServerProcess | SpawnProcess
    connection: Connection
    ready: bool = False
    jobs: deque[Job] = field(default_factory=deque)
    since: float = field(default_factory=time.monotonic)


class Crew:
    """Workers that apply one packed function; started when there is work, ended by `close`.

    An item whose worker dies is tried once more, for it may have died by chance. An item that is
    over its time or memory is not.
    """

    def __init__(self, function: bytes, num_workers: int, guard: Guard | None) -> None:
        self._function = function
        self._num_workers = num_workers
        self._guard = guard
        self._workers: list[_Worker] = []
        self._todo: deque[Job] = deque()
        self._done: dict[int, bytes] = {}
        self._failed_starts = 0
        self._ever_ready = False

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def map(self, items: Iterable[bytes], chunk_size: int) -> Iterator[bytes]:
        """Yield the packed outcome of every packed item, in order.

        At most ``AHEAD * num_workers * chunk_size`` items are read and not yet answered. A call
        must be exhausted before the next one.

        Raises:
            MachineError: workers cannot be started.
            Exception: a worker cannot load the function.
        """

        def turn(block: bool) -> None:
            self._hand_out(chunk_size)
            self._hear(block=block)

        window = AHEAD * self._num_workers * chunk_size
        return in_order(items, window, self._todo, self._done, turn)

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        for worker in self._workers:
            worker.process.kill()
        for worker in [*self._workers]:
            self._end(worker)
        self._todo.clear()
        self._done.clear()

    def _hand_out(self, chunk_size: int) -> None:
        """Give each worker that is ready its next chunk, and start workers for what is left."""
        for worker in self._workers:
            if worker.ready and not worker.jobs and self._todo:
                self._send(worker, chunk_size)
        for worker in self._workers:  # one more each, while there is enough for all
            plenty = len(self._todo) > self._num_workers * chunk_size
            if plenty and 0 < len(worker.jobs) <= chunk_size:
                self._send(worker, chunk_size)
        starting = sum(not worker.ready for worker in self._workers)
        wanted = -(-len(self._todo) // chunk_size) - starting
        for _ in range(min(wanted, self._num_workers - len(self._workers))):
            self._workers.append(self._start())

    def _send(self, worker: _Worker, chunk_size: int) -> None:
        chunk = [self._todo.popleft() for _ in range(min(chunk_size, len(self._todo)))]
        message = pickle.dumps([job.packed for job in chunk], pickle.HIGHEST_PROTOCOL)
        sent = False
        if not worker.jobs or len(message) <= _PREFETCH_BYTES:
            with contextlib.suppress(OSError):  # it has died; `_hear` finds the connection closed
                worker.connection.send_bytes(message)
                sent = True
        if not sent:
            self._todo.extendleft(reversed(chunk))
            return
        if not worker.jobs:
            worker.since = time.monotonic()
        worker.jobs.extend(chunk)

    def _start(self) -> _Worker:
        context = worker_context()
        ours, theirs = context.Pipe()
        process = context.Process(
            target=serve, args=(theirs, self._function, self._guard), daemon=True
        )
        is_of_main = b"__main__" in self._function  # pickled by the name of its module
        try:
            with unimportable_main(wanted=not is_of_main):
                process.start()
        except (OSError, EOFError) as error:
            ours.close()
            raise _cannot_start() from error
        finally:
            theirs.close()
        return _Worker(process, ours)

    def _hear(self, *, block: bool) -> None:
        """Take what workers have sent; see who has died and who is over the time."""
        heard = wait([worker.connection for worker in self._workers], self._patience(block=block))
        for worker in [*self._workers]:
            if worker.connection in heard:
                self._receive(worker)
            elif time.monotonic() > self._deadline(worker):
                self._overdue(worker)

    def _receive(self, worker: _Worker) -> None:
        try:
            message = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._bury(worker)
            return
        worker.since = time.monotonic()
        if message[:1] == READY:
            worker.ready = self._ever_ready = True
            self._failed_starts = 0
        elif message[:1] == UNUSABLE:
            raise pickle.loads(message[1:])[1]  # noqa: S301  (our own worker's)
        elif message[:1] == OUTCOME:
            self._done[worker.jobs.popleft().index] = message[1:]

    def _bury(self, worker: _Worker) -> None:
        """Take leave of a dead worker: all but the item it was at go back as they were."""
        if worker.jobs:
            victim = worker.jobs[0]
            victim.deaths += 1
            if victim.deaths >= _MAX_DEATHS:
                self._lose(worker, "died")
        elif not worker.ready:
            self._failed_starts += 1
            if not self._ever_ready or self._failed_starts >= _MAX_FAILED_STARTS:
                raise _cannot_start()
        self._end(worker)

    def _overdue(self, worker: _Worker) -> None:
        """End a worker that is in code which no alarm can interrupt."""
        if not worker.ready:
            raise _cannot_start()
        self._lose(worker, "too_slow")
        self._end(worker)

    def _lose(self, worker: _Worker, loss: Loss) -> None:
        self._done[worker.jobs.popleft().index] = pack_loss(loss)

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._todo.extendleft(reversed(worker.jobs))
        worker.connection.close()
        worker.process.kill()
        worker.process.join(_GRACE_SECONDS)
        if not worker.process.is_alive():  # else it hangs in the kernel: nothing can end it
            worker.process.close()

    def _deadline(self, worker: _Worker) -> float:
        """Return when a worker must have been heard of, on the clock of `time.monotonic`."""
        if not worker.ready and not worker.jobs:
            return worker.since + _START_SECONDS
        if self._guard is None or not worker.jobs:
            return float("inf")
        return worker.since + self._guard.seconds + _GRACE_SECONDS

    def _patience(self, *, block: bool) -> float | None:
        if not block:
            return 0.0
        first = min(map(self._deadline, self._workers), default=0.0)
        return None if first == float("inf") else max(0.0, first - time.monotonic())


def _cannot_start() -> MachineError:
    return MachineError(
        "worker processes cannot start. In a script that defines what they run, put the call under "
        "`if __name__ == '__main__':`; or set num_workers: 0 to work in one process."
    )
