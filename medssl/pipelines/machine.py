"""Facts about the machine, gathered once; what they mean is said by `medssl.pipelines.doctor`."""

from __future__ import annotations

import math
import os
import re
import resource
import shutil
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import psutil

from medssl.executors.local import available_cores

_GB = 1e9
_DRIVER = Path("/proc/driver/nvidia/version")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (looked at, not written to)

DISK_BYTES = 64 * 2**20
_BLOCK = 4 * 2**20


@dataclass(frozen=True)
class Gpu:
    """One GPU, or slice of one.

    Attributes:
        capability: compute capability, (major, minor).
    """

    name: str
    memory_gb: float
    capability: tuple[int, int]


@dataclass(frozen=True)
class Torch:
    """What PyTorch was built for, and finds.

    Attributes:
        cuda: the version it was built with; None for a build without CUDA.
        architectures: those it has kernels for: ``sm_90``, ``compute_90``.
        gpus: that it can see.
        nccl, gloo, torchrun: what several processes need.
    """

    cuda: str | None
    architectures: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    nccl: bool
    gloo: bool
    torchrun: bool


@dataclass(frozen=True)
class DiskRate:
    """How fast a file was written and read.

    Attributes:
        read_from: ``disk``, ``memory`` (the system had kept it), or ``unknown``.
    """

    write_mb_s: float
    read_mb_s: float
    read_from: str


@dataclass(frozen=True)
class Machine:
    """The facts.

    Attributes:
        cores: that this process may run on.
        quota: cores' worth of time that a container allows; None: no limit.
        shared_memory_gb: what workers hand over batches in; None where the system has none.
        open_files: that a process may hold; None: no limit.
        disk: None where it was not measured.
        driver: of NVIDIA's, such as ``550.54.15``; None without one.
        visible_devices: of ``CUDA_VISIBLE_DEVICES``; None where it is not set.
    """

    cores: int
    quota: float | None
    memory_gb: float
    disk_free_gb: float
    shared_memory_gb: float | None
    open_files: int | None
    disk: DiskRate | None
    driver: str | None
    visible_devices: str | None
    torch: Torch

    @property
    def usable_cores(self) -> int:
        """Whole cores that this process gets time on."""
        return self.cores if self.quota is None else max(1, min(self.cores, int(self.quota)))


def gather(folder: Path | None = None) -> Machine:
    """Look at the machine.

    Args:
        folder: where to measure the disk, with a file that is deleted again; by default where
            temporary files go.
    """
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    shared = shutil.disk_usage(_SHARED_MEMORY).total / _GB if _SHARED_MEMORY.is_dir() else None
    return Machine(
        cores=available_cores(),
        quota=cpu_quota(),
        memory_gb=psutil.virtual_memory().total / _GB,
        disk_free_gb=shutil.disk_usage(folder or Path.cwd()).free / _GB,
        shared_memory_gb=shared,
        open_files=None if soft == resource.RLIM_INFINITY else soft,
        disk=disk_rate(folder or Path(tempfile.gettempdir()), DISK_BYTES),
        driver=driver_version(),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        torch=look_at_torch(),
    )


def look_at_torch() -> Torch:
    """Return what PyTorch was built for, and which GPUs it sees."""
    import torch
    from torch import distributed

    gpus = []
    with warnings.catch_warnings():  # of drivers and architectures: the doctor says it itself
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            for number in range(torch.cuda.device_count()):
                found = torch.cuda.get_device_properties(number)
                capability = (found.major, found.minor)
                gpus.append(Gpu(found.name, found.total_memory / _GB, capability))
    there = distributed.is_available()
    return Torch(
        cuda=torch.version.cuda,
        architectures=tuple(torch.cuda.get_arch_list()) if gpus else (),
        gpus=tuple(gpus),
        nccl=there and distributed.is_nccl_available(),
        gloo=there and distributed.is_gloo_available(),
        torchrun=shutil.which("torchrun") is not None,
    )


def driver_version() -> str | None:
    """Return the version of NVIDIA's kernel module."""
    try:
        text = _DRIVER.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else "unknown"


def cpu_quota() -> float | None:
    """Return how many cores' worth of time the container (cgroup v2) allows."""
    try:
        quota, period = _CPU_QUOTA.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def disk_rate(folder: Path, size: int) -> DiskRate | None:
    """Write a file to the disk and read it, in megabytes a second; None if it cannot be written.

    Writing ends when the disk has it (fsync). Before reading, the system is asked to forget what it
    keeps of the file, and then whether it has: it may not (files in memory, some network disks).
    """
    block = os.urandom(min(_BLOCK, size))
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".medssl-doctor-") as file:
            number = file.fileno()
            begun = time.perf_counter()
            for _ in range(math.ceil(size / len(block))):
                file.write(block)
            file.flush()
            os.fsync(number)
            written = time.perf_counter() - begun
            total = file.tell()
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
            read_from = _read_from(number, total)
            file.seek(0)
            begun = time.perf_counter()
            while file.read(_BLOCK):
                pass
            return DiskRate(total / 1e6 / written, _rate(total, begun), read_from)
    except OSError:
        return None


def _rate(size: int, begun: float) -> float:
    return size / 1e6 / max(time.perf_counter() - begun, 1e-9)


def _read_from(number: int, size: int) -> str:
    """Return where a file would be read from, by asking for what is in memory already."""
    if not hasattr(os, "RWF_NOWAIT"):
        return "unknown"
    kept = [_is_kept(number, offset) for offset in range(0, size, max(1, size // 8))]
    if None in kept:
        return "unknown"
    return "memory" if sum(map(bool, kept)) > len(kept) / 2 else "disk"


def _is_kept(number: int, offset: int) -> bool | None:
    try:
        return os.preadv(number, [bytearray(512)], offset, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except OSError:  # this file system cannot say
        return None
