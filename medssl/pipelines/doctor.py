"""Examine the machine: what medssl can do here, and what to mend."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medssl.config import ComponentConfig
from medssl.errors import MedsslError
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
from medssl.pipelines.machine import DiskRate, Gpu, Machine, gather
from medssl.pipelines.weights import remedy_of, table
from medssl.provenance import package_versions

_LITTLE_DISK_GB = 10
_LITTLE_MEMORY_GB = 8
_LITTLE_SHARED_MEMORY_GB = 1
_SLOW_DISK_MB_S = 100
_FEW_OPEN_FILES = 1024
_MOST_WORKERS = 8
_CORES_TO_SPARE = 2

_BF16, _FP16 = (8, 0), (7, 0)
"""Compute capabilities from which on GPUs have units for these precisions."""

LEAST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""The oldest Linux driver for a major version of CUDA. Source: NVIDIA, CUDA Toolkit release notes,
minimum required driver version for CUDA minor version compatibility."""

_WEIGHTS = "ImageNet weights"


@dataclass(frozen=True)
class Finding:
    """One thing found out about the machine."""

    level: Literal["ok", "note", "problem"]
    subject: str
    text: str


def examine(
    config: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    folder: Path | None = None,
    machine: Machine | None = None,
) -> list[Finding]:
    """Return what was found, in the order in which people look.

    Args:
        config: a config file, of any kind, whose ImageNet weights are looked for; None: those of
            all backbones.
        overrides: ``key=value``, of the config.
        folder: whose disk is measured; None: that of temporary files.
        machine: facts to go by; None: they are gathered.

    Raises:
        ConfigError: the config is wrong.
    """
    return [
        *_versions(),
        *describe(machine or gather(folder)),
        *(_imagenet() if config is None else _imagenet_of(config, overrides)),
        _tracking(),
    ]


def _versions() -> list[Finding]:
    versions = package_versions()
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [Finding("ok", "packages", text)]


def describe(machine: Machine) -> list[Finding]:
    """Return what the facts about a machine mean: what it can do, and what to mend."""
    return [
        _cores(machine),
        Finding("ok", "num_workers", workers_in_words(machine)),
        _memory(machine),
        _disk(machine),
        _disk_rate(machine.disk),
        *_shared_memory(machine),
        _open_files(machine),
        *_gpus(machine),
        _precision(machine.torch.gpus),
        _processes(machine),
    ]


def _cores(machine: Machine) -> Finding:
    text = f"{machine.usable_cores} usable"
    if machine.quota is not None and machine.quota < machine.cores:
        text += f" (the container's share is {machine.quota:.3g} of {machine.cores})"
    return Finding("ok", "cores", text)


def suggested_workers(machine: Machine) -> int:
    """Return the number of workers to start with, for each process of a training."""
    cores, gpus = machine.usable_cores, len(machine.torch.gpus)
    shared = machine.shared_memory_gb
    if shared is not None and shared < _LITTLE_SHARED_MEMORY_GB:
        return 0
    if gpus:
        return max(0, min(_MOST_WORKERS, cores // gpus - 1))
    return 1 if cores > _CORES_TO_SPARE else 0


def workers_in_words(machine: Machine) -> str:
    """Return how many workers to start with, and why."""
    number, gpus = suggested_workers(machine), len(machine.torch.gpus)
    if gpus:
        each = f"{machine.usable_cores} cores for {gpus} GPU(s), one of each kept to launch work"
    else:
        each = "without a GPU, computing needs the cores itself"
    return f"start with training.num_workers={number} ({each}); training.profile=true says more"


def _memory(machine: Machine) -> Finding:
    if machine.memory_gb < _LITTLE_MEMORY_GB:
        text = f"{machine.memory_gb:.0f} GB; choose small crops and batches"
        return Finding("note", "memory", text)
    return Finding("ok", "memory", f"{machine.memory_gb:.0f} GB")


def _disk(machine: Machine) -> Finding:
    free = machine.disk_free_gb
    if free < _LITTLE_DISK_GB:
        return Finding("note", "disk", f"{free:.1f} GB free here; prepared scans may need more")
    return Finding("ok", "disk", f"{free:.0f} GB free here")


def _disk_rate(disk: DiskRate | None) -> Finding:
    if disk is None:
        return Finding("note", "disk rate", "not measured: the folder cannot be written")
    source = {
        "disk": "read from the disk, not from the system's memory",
        "memory": "read from the system's memory, which would not forget it: the disk is slower",
        "unknown": "read perhaps from the system's memory, which this disk does not tell",
    }[disk.read_from]
    text = f"written at {disk.write_mb_s:.0f} MB/s, read at {disk.read_mb_s:.0f} MB/s ({source})"
    if disk.read_from == "disk" and disk.read_mb_s < _SLOW_DISK_MB_S:
        return Finding("note", "disk rate", f"{text}; put prepared scans (store) on a faster disk")
    return Finding("ok", "disk rate", text)


def _shared_memory(machine: Machine) -> list[Finding]:
    size = machine.shared_memory_gb
    if size is None:
        return []
    if size < _LITTLE_SHARED_MEMORY_GB:
        text = f"{size:.2f} GB; give the container more (shm_size), or set num_workers to 0"
        return [Finding("note", "shared memory", text)]
    return [Finding("ok", "shared memory", f"{size:.0f} GB")]


def _open_files(machine: Machine) -> Finding:
    limit = machine.open_files
    if limit is None:
        return Finding("ok", "open files", "no limit")
    if limit < _FEW_OPEN_FILES:
        text = f"{limit} at once; many workers need more: ulimit -n 4096"
        return Finding("note", "open files", text)
    return Finding("ok", "open files", f"{limit} at once")


def _gpus(machine: Machine) -> list[Finding]:
    torch = machine.torch
    if not torch.gpus:
        return [_no_gpu(machine)]
    names = ", ".join(f"{gpu.name} ({gpu.memory_gb:.0f} GB)" for gpu in torch.gpus)
    driver = f"driver {machine.driver or 'not named'}, torch built for CUDA {torch.cuda}"
    found = [Finding("ok", "GPU", f"{names}; {driver}")]
    blind = sorted({g.capability for g in torch.gpus if not runs_on(g, torch.architectures)})
    if blind:
        lacking = ", ".join(f"sm_{major}{minor}" for major, minor in blind)
        text = (
            f"this torch has no kernels for {lacking} (it has {', '.join(torch.architectures)}). "
            "Install one that has: a newer one for a new GPU (https://pytorch.org), an older one "
            "for an old GPU; or set device=cpu"
        )
        found.append(Finding("problem", "GPU kernels", text))
    if any("MIG" in gpu.name for gpu in torch.gpus):
        text = (
            "a slice of a GPU: batches must fit the slice, a process sees one, and slices cannot "
            "train together (NCCL). Start one process, without torchrun"
        )
        found.append(Finding("note", "MIG", text))
    if len({(gpu.name, gpu.memory_gb) for gpu in torch.gpus}) > 1:
        text = "they differ: together they train at the pace, and in the memory, of the weakest"
        found.append(Finding("note", "GPUs", text))
    return found


def _no_gpu(machine: Machine) -> Finding:
    if machine.driver is None:
        return Finding("note", "GPU", "none; everything runs on the CPU, slower")
    build = machine.torch.cuda
    seen = f"NVIDIA's driver {machine.driver} is there, and torch sees no device"
    if build is None:
        text = f"{seen}: it is a build without CUDA. Install one with it (https://pytorch.org)"
        return Finding("problem", "GPU", text)
    if machine.visible_devices in ("", "-1"):
        text = f"{seen}: CUDA_VISIBLE_DEVICES={machine.visible_devices!r} hides all. Unset it"
        return Finding("problem", "GPU", text)
    least = LEAST_DRIVER.get(int(build.split(".")[0]))
    if least is not None and _numbers(machine.driver) < _numbers(least):
        text = (
            f"{seen}: built for CUDA {build} it needs driver {least} or later. Update the driver, "
            "or install a torch built for an older CUDA"
        )
        return Finding("problem", "GPU", text)
    text = (
        f"{seen}, though the driver is new enough for its CUDA {build}. Give the container the "
        "device (docker run --gpus all), or see what nvidia-smi says"
    )
    return Finding("problem", "GPU", text)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def runs_on(gpu: Gpu, architectures: Sequence[str]) -> bool:
    """Return whether a build of torch has code for a GPU.

    Machine code (``sm_90``) runs on its own major version from its own minor version on; with
    ``a`` on exactly its own GPUs; code that the driver still compiles (``compute_90``) on all that
    are as new. Source: CUDA C++ Programming Guide, binary and PTX compatibility.
    """
    for architecture in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if found is None:
            continue
        kind, version = found[1], (int(found[2]), int(found[3]))
        same_family = gpu.capability[0] == version[0] and gpu.capability >= version
        if found[4] == "a":
            fits = gpu.capability == version
        elif kind == "compute" and not found[4]:
            fits = gpu.capability >= version
        else:
            fits = same_family
        if fits:
            return True
    return False


def _precision(gpus: Sequence[Gpu]) -> Finding:
    if not gpus:
        text = "fp32; on a CPU bf16 and fp16 are slower"
    elif all(gpu.capability >= _BF16 for gpu in gpus):
        text = "bf16 is computed natively: set training.precision=bf16"
    elif all(gpu.capability >= _FP16 for gpu in gpus):
        text = "no bf16 of its own: set training.precision=fp16"
    else:
        text = "fp32; bf16 and fp16 gain little on GPUs this old"
    return Finding("ok", "precision", text)


def _processes(machine: Machine) -> Finding:
    torch = machine.torch
    parts = {"torchrun": torch.torchrun, "gloo": torch.gloo, "NCCL": torch.nccl}
    text = ", ".join(f"{name} {'is there' if here else 'is not'}" for name, here in parts.items())
    if len(torch.gpus) > 1 and not torch.nccl:
        text += "; install a torch with NCCL to train on several GPUs"
        return Finding("problem", "several processes", text)
    if not torch.torchrun:
        text += "; python -m torch.distributed.run is the same"
    return Finding("ok", "several processes", text)


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
