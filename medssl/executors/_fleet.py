"""Stations on a Ray cluster: hands out chunks, collects outcomes, replaces lost stations."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from medssl import __version__
from medssl.errors import MachineError
from medssl.executors._outcomes import pack_loss
from medssl.executors._station import Station
from medssl.executors._window import AHEAD, Job, in_order
from medssl.executors.base import Guard

_START_SECONDS = 300.0  # for a cluster that must first find or start a machine
_MAX_FAILED_STARTS = 3  # in a row
_MAX_DEATHS = 3  # of Ray workers on one item: most often the machine's fault, not the item's
_IN_FLIGHT = 2  # chunks per station, so that it need not wait for this process


@dataclass
class _Post:
    """One station, as seen from here.

    Attributes:
        starting: Ray's promise of its version; None once it has answered.
        chunks: Ray's promises of outcomes with their jobs, in order; it works on the first.
    """

    actor: Any
    starting: Any
    chunks: deque[tuple[Any, list[Job]]] = field(default_factory=deque)


class Fleet:
    """Stations that apply one packed function; started when there is work, ended by `close`.

    When a Ray worker is lost, its items are given to others; those it may have been at are run
    alone. An item that lost three Ray workers is given up as ``died``.
    """

    def __init__(
        self, ray: Any, function: bytes, num_workers: int, num_cpus: float, guard: Guard | None
    ) -> None:
        self._ray = ray
        self._arguments = (function, guard)
        self._num_workers = num_workers
        self._class = ray.remote(Station).options(num_cpus=num_cpus, max_restarts=0)
        self._posts: list[_Post] = []
        self._todo: deque[Job] = deque()
        self._done: dict[int, bytes] = {}
        self._failed_starts = 0
        self._idle_since = time.monotonic()

    def __enter__(self) -> Fleet:
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

        At most ``AHEAD * num_workers * chunk_size`` items are read and not yet answered.

        Raises:
            MachineError: the cluster starts no workers, or they hold another version of medssl.
        """

        def turn(block: bool) -> None:
            self._hand_out(chunk_size)
            self._collect(block=block)

        window = AHEAD * self._num_workers * chunk_size
        return in_order(items, window, self._todo, self._done, turn)

    def close(self) -> None:
        """End all stations, whatever they are doing."""
        for post in self._posts:
            self._ray.kill(post.actor, no_restart=True)
        self._posts.clear()

    def _hand_out(self, chunk_size: int) -> None:
        for depth in range(_IN_FLIGHT):  # a second chunk only while there is enough for all
            spare = depth * self._num_workers * chunk_size
            for post in self._posts:
                if post.starting is None and len(post.chunks) == depth and len(self._todo) > spare:
                    chunk = self._next_chunk(chunk_size)
                    promise = post.actor.run.remote([job.packed for job in chunk])
                    post.chunks.append((promise, chunk))
        starting = sum(post.starting is not None for post in self._posts)
        wanted = -(-len(self._todo) // chunk_size) - starting
        for _ in range(min(wanted, self._num_workers - len(self._posts))):
            actor = self._class.remote(*self._arguments)
            self._posts.append(_Post(actor, actor.version.remote()))

    def _next_chunk(self, chunk_size: int) -> list[Job]:
        """Take the next jobs; one that was with a lost Ray worker goes alone."""
        chunk = [self._todo.popleft()]
        while (
            len(chunk) < chunk_size
            and self._todo
            and not chunk[0].deaths
            and not self._todo[0].deaths
        ):
            chunk.append(self._todo.popleft())
        return chunk

    def _collect(self, *, block: bool) -> None:
        promises = [post.starting or post.chunks[0][0] for post in self._posts if _awaits(post)]
        if not promises:
            return
        at_work = any(post.starting is None for post in self._posts)
        if at_work:
            self._idle_since = time.monotonic()
        patience = (None if at_work else _START_SECONDS) if block else 0
        kept, _ = self._ray.wait(promises, num_returns=1, timeout=patience)
        if not at_work and time.monotonic() - self._idle_since > _START_SECONDS:
            raise _cannot_start("none of its CPUs became free")
        if kept and len(promises) > 1:
            kept, _ = self._ray.wait(promises, num_returns=len(promises), timeout=0)
        for post in [*self._posts]:
            if _awaits(post) and (post.starting or post.chunks[0][0]) in kept:
                self._receive(post)

    def _receive(self, post: _Post) -> None:
        try:
            answer = self._ray.get(post.starting or post.chunks[0][0])
        except self._ray.exceptions.RayError:
            self._bury(post)
            return
        if post.starting is None:
            _, chunk = post.chunks.popleft()
            self._done.update(zip((job.index for job in chunk), answer, strict=True))
            return
        post.starting = None
        self._failed_starts = 0
        if answer != __version__:
            raise MachineError(
                f"the Ray cluster holds medssl {answer}, and this is medssl {__version__}: results "
                "could differ. Install the same version on every machine."
            )

    def _bury(self, post: _Post) -> None:
        """Take leave of a lost Ray worker: what it had goes to others."""
        self._posts.remove(post)
        self._ray.kill(post.actor, no_restart=True)
        if post.starting is not None:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise _cannot_start("workers ended while they started")
            return
        for job in post.chunks[0][1]:
            job.deaths += 1
        for job in reversed([job for _, chunk in post.chunks for job in chunk]):
            if job.deaths >= _MAX_DEATHS:
                self._done[job.index] = pack_loss("died")
            else:
                self._todo.appendleft(job)


def _awaits(post: _Post) -> bool:
    return post.starting is not None or bool(post.chunks)


def _cannot_start(why: str) -> MachineError:
    return MachineError(
        f"the Ray cluster starts no worker: {why}. See that it has free CPUs and that the same "
        "medssl and Python are installed on each of its machines, or use the local executor."
    )
