"""Examine the machine: what medssl can do here, and what to mend."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from medssl.config import ComponentConfig
from medssl.errors import MedsslError
from medssl.executors.local import available_cores
from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import ImagenetWeights
from medssl.models.inits._published import (
    check_hash,
    find_weights,
    hub_cache,
    local_name,
    torch_cache,
    wanted_hash,
)
from medssl.models.inits.imagenet import Config as ImagenetConfig
from medssl.pipelines.kinds import load_any
from medssl.pipelines.weights import remedy_of, table
from medssl.provenance import package_versions

_GB = 1e9
_LITTLE_DISK_GB = 10
_LITTLE_MEMORY_GB = 8
_LITTLE_SHARED_MEMORY_GB = 1
_WEIGHTS = "ImageNet weights"


@dataclass(frozen=True)
class Finding:
    """One thing found out about the machine."""

    level: Literal["ok", "note", "problem"]
    subject: str
    text: str


def examine(config: Path | None = None, overrides: Sequence[str] = ()) -> list[Finding]:
    """Return what was found, in the order in which people look.

    Args:
        config: a config file, of any kind, whose ImageNet weights are looked for; None: those of
            all backbones.
        overrides: ``key=value``, of the config.

    Raises:
        ConfigError: the config is wrong.
    """
    return [
        *_versions(),
        _cores(),
        _memory(),
        _disk(),
        *_shared_memory(),
        *_gpu(),
        *(_imagenet() if config is None else _imagenet_of(config, overrides)),
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
    """Say of every published file whether it is here; no network is asked."""
    rows = table()
    here = sum(row.place is not None for row in rows)
    looked = f"looked in {torch_cache()}, {hub_cache()} and the pip packages that carry some"
    text = f"{here} of {len(rows)} published files are here; {looked}"
    return [
        Finding("ok" if here else "note", _WEIGHTS, text),
        *(
            Finding("ok", f"ImageNet for {row.backbone}", f"in the {row.place}")
            if row.place
            else Finding("note", f"ImageNet for {row.backbone}", f"not here: {row.remedy}")
            for row in rows
        ),
    ]


def _imagenet_of(file: Path, overrides: Sequence[str]) -> list[Finding]:
    """Say of every init of a config that starts from ImageNet whether its weights are here."""
    kind, config = load_any(file, overrides)
    flat: Any = getattr(config, "backbone", None)
    while isinstance(getattr(flat, "backbone", None), ComponentConfig):  # inflated, slicewise
        flat = flat.backbone
    inits: dict[str, Any] = getattr(config, "inits", None) or {
        "init": getattr(config, "init", None)
    }
    starts = {label: getattr(init, "init", init) for label, init in inits.items()}
    wanted = {label: init for label, init in starts.items() if isinstance(init, ImagenetConfig)}
    if not wanted:
        return [Finding("ok", _WEIGHTS, f"none are needed by {file.name} ({kind})")]
    weights = BACKBONES.load(flat.name).published(flat)
    if weights is None:
        text = f"none are published for backbone {flat.name}, and {', '.join(wanted)} wants them"
        return [Finding("problem", _WEIGHTS, f"{text}; choose another backbone or init")]
    variant = f"{flat.name}:{getattr(flat, 'variant', '')}"
    return [
        _imagenet_for(f"ImageNet for {variant} ({label})", variant, weights, init)
        for label, init in wanted.items()
    ]


def _imagenet_for(
    subject: str, variant: str, weights: ImagenetWeights, init: ImagenetConfig
) -> Finding:
    name = local_name(weights)
    try:
        wanted_hash(weights, init.sha256)
        file = find_weights(weights, init.path)
        if file is not None:
            check_hash(file, weights, init.sha256)
    except MedsslError as error:
        return Finding("problem", subject, str(error))
    if file is not None:
        return Finding("ok", subject, f"{name} is here ({file}), and its hash is right")
    if init.path is not None:
        text = f"{name} is not at init.path ({init.path}); mend the path, or run: "
        return Finding("problem", subject, f"{text}medssl weights fetch {variant} --out FOLDER")
    if init.download:
        return Finding("note", subject, f"{name} is not here; the config has it downloaded")
    return Finding("problem", subject, f"{name} is not here: {remedy_of(variant, weights)}")


def _tracking() -> Finding:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    where = "the server of MLFLOW_TRACKING_URI" if uri else "sqlite beside the run folders"
    return Finding("ok", "MLflow", where)
