"""A Ray cluster: machines that run already, or one started here for the time of a map."""

from __future__ import annotations

import itertools
import math
import os
import pickle
import re
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from pydantic import Field

from medssl.config import ComponentConfig
from medssl.errors import MachineError
from medssl.executors._outcomes import settle
from medssl.executors.base import Executor, Guard, Loss
from medssl.executors.local import default_workers

Item = TypeVar("Item")
Result = TypeVar("Result")

_REACH_SECONDS = 5.0  # Ray itself tries for minutes
_HOST_AND_PORT = re.compile(r"(?:ray://)?\[?(?P<host>[^/\[\]]+?)\]?:(?P<port>\d{1,5})")


class Config(ComponentConfig):
    """Workers of a Ray cluster.

    Attributes:
        address: of a cluster that runs (``host:port``, or ``auto`` for the one of this machine);
            absent: one is started on this machine and ended with the map.
        num_workers: guarded processes; absent: as many as the cluster has CPUs for, or on a
            cluster started here one a core, at most 16.
        num_cpus: that Ray sets aside for each.
    """

    name: Literal["ray"] = "ray"
    address: str | None = None
    num_workers: int | None = Field(default=None, ge=1)
    num_cpus: float = Field(default=1, gt=0)


class RayExecutor(Executor):
    """An ordered map over the workers of a Ray cluster.

    The function runs in a guarded process beside each Ray worker, under the same limits and as
    silent as with `LocalExecutor`: the results are the same. Files are read by the machines of the
    cluster, so they need the same paths, and the same medssl; the function must be one that they
    can import, not one of ``__main__``. A Ray worker that is lost costs no
    item its result; those it had are run again.

    No usage statistics are sent, no dashboard is started, and no log reaches this process. A
    cluster that this program is connected to already is used as it is.
    """

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config or Config())
        self._config = config or Config()

    def map(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        lost: Callable[[Item, Loss], Result] | None = None,
        guard: Guard | None = None,
        chunk_size: int = 1,
    ) -> Iterator[Result]:
        """See `Executor.map`.

        Raises:
            MachineError: also when Ray is not installed or its cluster cannot be reached.
        """
        from medssl.executors._fleet import Fleet

        in_flight: deque[Item] = deque()

        def packed() -> Iterator[bytes]:
            for item in items:
                in_flight.append(item)
                yield pickle.dumps(item, pickle.HIGHEST_PROTOCOL)

        stream = packed()
        first = next(stream, None)
        if first is None:  # no cluster for nothing
            return
        stream = itertools.chain((first,), stream)
        packed_function = pickle.dumps(function, pickle.HIGHEST_PROTOCOL)
        cpus = self._config.num_cpus
        with _cluster(self._config) as ray:
            workers = self._config.num_workers
            if workers is None:
                workers = max(1, int(ray.cluster_resources().get("CPU", 0) // cpus))
            with Fleet(ray, packed_function, workers, cpus, guard) as fleet:
                for outcome in fleet.map(stream, chunk_size):
                    yield settle(in_flight.popleft(), outcome, lost)


@contextmanager
def _cluster(config: Config) -> Iterator[Any]:
    """Give the ray module, connected; end the connection, and the cluster, if made here."""
    try:
        import ray
    except ImportError:
        raise MachineError(
            "the ray executor needs Ray, which is not installed. "
            "Install it with: pip install 'medssl[ray]'; or use the local executor."
        ) from None
    if ray.is_initialized():
        yield ray
        return
    try:
        _connect(ray, config)
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, config: Config) -> None:
    """Join the cluster at the address of a config, or start one on this machine."""
    settings: dict[str, Any] = {"address": config.address}
    if config.address is None:
        workers = config.num_workers or default_workers()
        settings = {
            "address": "local",
            "num_cpus": math.ceil(workers * config.num_cpus),
            "include_dashboard": False,
        }
    else:
        _check_reachable(config.address)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **settings)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        if config.address is not None:
            raise _unreachable(config.address) from error
        raise MachineError(
            "a Ray cluster cannot be started on this machine. Use the local executor, which "
            "needs none."
        ) from error
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own in place


def _check_reachable(address: str) -> None:
    if address == "auto":
        return
    match = _HOST_AND_PORT.fullmatch(address)
    if match is None:
        raise _unreachable(address)
    try:
        socket.create_connection((match["host"], int(match["port"])), _REACH_SECONDS).close()
    except (OSError, OverflowError):
        raise _unreachable(address) from None


def _unreachable(address: str) -> MachineError:
    return MachineError(
        f"no Ray cluster of this version answers at {address!r}. Start one with `ray start --head` "
        "and give the address it prints (host:port), or leave address out to start one on this "
        "machine."
    )
