"""How busy the machine is: processor, memory, disk, network, GPU, written into the journal.

Under the names that MLflow's own monitor uses, so that its page "System metrics" shows them. That
monitor is not used: it writes to the server itself, asks it before every sample whether the run
still goes on, and ends for good at the first answer that does not come.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

from medssl.tracking.nvml import Gpus

log = logging.getLogger(__name__)

_BYTES_PER_MEGABYTE = 1e6  # as MLflow counts
_DIGITS = 1
_PATIENCE_SECONDS = 1.0  # at the end of a run, for a sample under way


class Machine:
    """Samples this machine.

    Args:
        folder: lies on the disk to watch.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._gpus = Gpus()
        self._process = psutil.Process()
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()  # the next call tells of the time since this one

    def sample(self) -> dict[str, float]:
        """Return what is found now, and for the processor since the last sample."""
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage(str(self._folder))
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _BYTES_PER_MEGABYTE,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "process_memory_megabytes": self._own_memory() / _BYTES_PER_MEGABYTE,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / _BYTES_PER_MEGABYTE,
        }
        network = psutil.net_io_counters()
        if network is not None and self._network is not None:
            received = network.bytes_recv - self._network.bytes_recv
            sent = network.bytes_sent - self._network.bytes_sent
            found["network_receive_megabytes"] = received / _BYTES_PER_MEGABYTE
            found["network_transmit_megabytes"] = sent / _BYTES_PER_MEGABYTE
        found |= self._gpus.sample()
        return {f"system/{name}": round(value, _DIGITS) for name, value in found.items()}

    def _own_memory(self) -> int:
        """Return the resident memory of this process and its workers, in bytes."""
        total = 0
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.Error:  # it ended meanwhile
                continue
        return total


class Sampler(threading.Thread):
    """Hands a sample of the machine on at intervals, off the training thread.

    Args:
        folder: lies on the disk to watch.
        seconds: between two samples.
        write: takes a sample.
    """

    def __init__(
        self, folder: Path, seconds: float, write: Callable[[dict[str, float]], None]
    ) -> None:
        super().__init__(name="medssl-system-metrics", daemon=True)
        self._folder = folder
        self._seconds = seconds
        self._write = write
        self._stop_now = threading.Event()

    def run(self) -> None:
        """Sample until told to stop."""
        machine: Machine | None = None
        while not self._stop_now.wait(0.0 if machine is None else self._seconds):
            try:
                if machine is None:  # here, as a driver may take its time to answer
                    machine = Machine(self._folder)
                else:
                    self._write(machine.sample())
            # Whatever a driver, /proc or a disk does: training itself meets what matters.
            except Exception as error:  # noqa: BLE001
                log.debug("No sample of the machine: %s", type(error).__name__)
                if machine is None:
                    return

    def finish(self) -> None:
        """Stop; a driver or a disk that does not answer is not waited for."""
        self._stop_now.set()
        self.join(_PATIENCE_SECONDS)
