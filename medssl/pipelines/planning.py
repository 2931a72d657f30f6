"""Plan a pretraining: what it would do, what it would take, and what to change if that is too much.

A few steps are really run, on random crops and in a process of their own; prepared scans are read
where there are some. Nothing is written.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from medssl.errors import DataError
from medssl.executors.base import Loss
from medssl.executors.local import Config as LocalConfig
from medssl.executors.local import LocalExecutor, available_cores
from medssl.pipelines import prepare, pretrain, pretraining
from medssl.pipelines.pretrain import PretrainConfig
from medssl.pretext import PRETEXT_TASKS
from medssl.scans.index import Index
from medssl.scans.store import Store
from medssl.training.devices import select_device
from medssl.training.feed import as_configured
from medssl.training.rehearsal import Rehearsal, Scene, free_memory, line_through, rehearse
from medssl.transforms.sampling import CropSampler

FILLED = 0.8
"""Share of the free memory that a plan fills: fragments and other programs need the rest."""

_GB = 1e9
_READING_S = 4.0
_STATES_KEPT = 3  # the newest, the one before it, and the draft of the next
_MEASURE = {
    "cuda": "the most that PyTorch allocated on the GPU",
    "cpu": "how far the peak of a process's resident memory rose",
}
_COUNTED = (
    "steps and validations. Preparing the scans, saving, and answers that need no network are not; "
    "patients and scans are the index's, of which preparation may lose some"
)


def plan(config: PretrainConfig, out: Path = Path("runs/pretrain")) -> dict[str, Any]:
    """Return what a pretraining would do and take, after running a few steps of it.

    Args:
        config: of the pretraining.
        out: where its run folder would lie, for the space on that disk.

    Raises:
        MedsslError: the configuration cannot be run; see `medssl.pipelines.pretrain.plan`.
    """
    found = pretrain.plan(config)
    task = PRETEXT_TASKS.build(config.pretext, config.sampling.spatial_dims)
    task.request(config.sampling.request())  # refuses crops that do not fit the task
    scene = Scene(
        config.backbone, config.pretext, config.sampling.request(), config.training,
        config.augmentation, config.seed, select_device(config.device), torch.get_num_threads(),
    )  # fmt: skip
    rehearsal = rehearsed(scene)
    read = seconds_to_read(config)
    pool = scans_in_pool(config)
    written = space(rehearsal, out)
    return {
        **found,
        "scans_trained_on": pool,
        **costs(config, scene.device.type, rehearsal, read),
        **written,
        "advice": advise(config, scene.device.type, rehearsal, read, pool, written),
    }


def rehearsed(scene: Scene) -> Rehearsal:
    """Rehearse in a process of its own, whose end for lack of memory is told like any other."""

    def ended(scene: Scene, _: Loss) -> Rehearsal:
        return Rehearsal(free_memory(scene.device), failed=True)

    executor = LocalExecutor(LocalConfig(num_workers=1))
    (found,) = executor.map(rehearse, [scene], lost=ended)
    return found


def scans_in_pool(config: PretrainConfig) -> int:
    """Return how many scans of the index would be trained on."""
    table = Index.open(config.index).select(config.select).accepted
    patients = table["patient_key"].astype(str)
    splits = pretraining.draw_splits(config.splits, dict.fromkeys(patients.unique()), config.seed)
    return int((~patients.isin(splits.held_out)).sum())


def seconds_to_read(config: PretrainConfig) -> float | None:
    """Return how long one process reads for one image; None if no scans are prepared yet.

    The loop's own sampler is asked, until it has visited every scan twice or some seconds are over;
    the second half of that counts, as decoded scans are kept.
    """
    try:
        store = Store.open(prepare.store_folder(config.index, config.preprocessing, config.store))
    except DataError:
        return None
    patients = dict.fromkeys(pretraining.patients_of(store))
    pool = pretraining.pretraining_pool(
        store, pretraining.draw_splits(config.splits, patients, config.seed)
    )
    keys = pretraining.scans_of(store, pool)
    if not keys:
        return None
    task = PRETEXT_TASKS.build(config.pretext, config.sampling.spatial_dims)
    request = task.request(config.sampling.request())
    sampler = as_configured(CropSampler(store, keys, request, config.seed, "plan"), config.training)
    size = config.training.global_batch_size // config.training.micro_batches(1)
    begun, seconds = time.monotonic(), []
    for number in range(max(2, -(-2 * len(keys) // size))):
        started = time.perf_counter()
        sampler.batch(number, size)
        seconds.append((time.perf_counter() - started) / size)
        if time.monotonic() - begun > _READING_S:
            break
    return statistics.median(seconds[len(seconds) // 2 :])


def num_validations(steps: int, every: int) -> int:
    """Return how often a training validates: every so often, and after the last step."""
    return 1 if every == 0 else -(-steps // every)


def costs(
    config: PretrainConfig, device: str, rehearsal: Rehearsal, read: float | None
) -> dict[str, Any]:
    """Return time and memory, for people and programs."""
    training = config.training
    batch = training.global_batch_size
    memory = {
        "free_gb": _short(rehearsal.free_bytes / _GB),
        "measured_as": _MEASURE[device],
        "by_micro_batch_gb": {size: _short(b / _GB) for size, b in rehearsal.peaks.items()},
        "validation_gb": _short(rehearsal.validation_bytes / _GB),
        "fits": fits(rehearsal),
    }
    if not rehearsal.step_seconds:
        return {"memory": memory, "time": {}}
    computing = statistics.median(rehearsal.step_seconds)
    reading = None if read is None else read * batch / _readers(training.num_workers)
    step = step_seconds(computing, reading, training.num_workers)
    checks = num_validations(training.steps, training.validate_every)
    each_check = config.validation_batches * (rehearsal.validation_seconds + (read or 0) * batch)
    total = training.steps * step + checks * each_check
    times = {
        "step_seconds": _short(step),
        "computing_seconds": _short(computing),
        "reading_seconds": None if reading is None else _short(reading),
        "steps_measured": len(rehearsal.step_seconds),
        "images_per_second": _short(batch / step),
        "validations": checks,
        "validation_seconds": _short(each_check),
        "total_seconds": _short(total),
        "total": in_words(total),
        "counted": _COUNTED,
    }
    return {"memory": memory, "time": times}


def step_seconds(computing: float, reading: float | None, num_workers: int) -> float:
    """Return the time of a step: workers read while others compute; without them it adds up."""
    if reading is None:
        return computing
    return max(computing, reading) if num_workers else computing + reading


def space(rehearsal: Rehearsal, out: Path) -> dict[str, Any]:
    """Return what the run would write, and what is free where it would."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    needed = _STATES_KEPT * rehearsal.state_bytes + rehearsal.checkpoint_bytes
    disk = {
        "training_state_gb": _short(rehearsal.state_bytes / _GB),
        "checkpoint_gb": _short(rehearsal.checkpoint_bytes / _GB),
        "needed_gb": _short(needed / _GB),
        "free_gb": _short(shutil.disk_usage(place).free / _GB),
    }
    return {"disk": disk}


def fits(rehearsal: Rehearsal) -> bool:
    """Return whether the configured batch fits the memory that is free."""
    if rehearsal.failed or rehearsal.foreseen_bytes or not rehearsal.step_seconds:
        return False
    return rehearsal.validation_bytes <= rehearsal.free_bytes


def largest_batch(
    peaks: dict[int, int], free_bytes: int, micro: int, batch: int, pool: int
) -> int | None:
    """Return the largest micro batch whose memory fits; None if none does, or too few were tried.

    Tried are the configured one halved and doubled while it divides the global batch, and the
    global batch doubled; none is larger than the number of scans to train on.
    """
    if len(peaks) < 2:
        return None
    sizes = {batch}
    for factor in (0.5, 2):
        size = float(micro)
        while size >= 1 and size.is_integer() and batch % int(size) == 0:
            sizes.add(int(size))
            size *= factor
    while 2 * max(sizes) <= pool:
        sizes.add(2 * max(sizes))
    good = [s for s in sizes if s <= pool and line_through(peaks, s) <= FILLED * free_bytes]
    return max(good, default=None)


def advise(
    config: PretrainConfig,
    device: str,
    rehearsal: Rehearsal,
    read: float | None,
    pool: int,
    written: dict[str, Any],
) -> dict[str, str]:
    """Return in words whether it fits, which batch would, what bounds it, and what to change."""
    training = config.training
    micro = training.global_batch_size // training.micro_batches(1)
    best = largest_batch(
        rehearsal.peaks, rehearsal.free_bytes, micro, training.global_batch_size, pool
    )
    told = {"memory": _memory_in_words(config, device, rehearsal, micro, best)}
    if fits(rehearsal):
        told["batch"] = _batch_in_words(device, micro, training.global_batch_size, best)
    if written["disk"]["needed_gb"] > written["disk"]["free_gb"]:
        told["disk"] = (
            "Training states and checkpoint do not fit the disk. Free some, or set --out."
        )
    if read is None:
        told["reading"] = (
            "Not measured, and not counted: no scans are prepared yet. `medssl prepare` with this "
            "config, then this plan again, tells whether reading keeps up."
        )
    elif rehearsal.step_seconds:
        told["reading"] = _reading_in_words(config, statistics.median(rehearsal.step_seconds), read)
    return told


def _memory_in_words(
    config: PretrainConfig, device: str, rehearsal: Rehearsal, micro: int, best: int | None
) -> str:
    free = f"{rehearsal.free_bytes / _GB:.3g} GB are free"
    if fits(rehearsal):
        most = max(rehearsal.peaks[micro], rehearsal.validation_bytes) / _GB
        return f"It fits: {most:.3g} GB at most, and {free}."
    if rehearsal.step_seconds:
        return (
            f"Training fits, validation does not ({free}): it looks at a whole batch at once. "
            "Lower training.global_batch_size."
        )
    needed = ""
    if rehearsal.foreseen_bytes:
        needed = f" about {rehearsal.foreseen_bytes / _GB:.3g} GB are needed, and"
    smaller = f"training.micro_batch_size={best}" if best and best < micro else "smaller crops"
    ways = [f"Set {smaller}"]
    if not config.training.recompute:
        ways.append("training.recompute=true")
    if config.training.precision == "fp32" and device == "cuda":
        ways.append("training.precision=bf16")
    return f"Micro batches of {micro} do not fit:{needed} {free}. {', or '.join(ways)}."


def _batch_in_words(device: str, micro: int, batch: int, best: int | None) -> str:
    if best is None or best <= micro:
        return f"{micro} images at once are about the most that fills {FILLED:.0%} of the memory."
    if best <= batch:
        return (
            f"training.micro_batch_size={best} fits as well: fewer, larger parts of the same step."
        )
    slower = " On a CPU that is hardly faster." if device == "cpu" else ""
    return (
        f"Up to {best} images at once would fit (global_batch_size={best}). That is another "
        f"training: its learning rate and steps need choosing anew.{slower}"
    )


def _reading_in_words(config: PretrainConfig, computing: float, read: float) -> str:
    workers = config.training.num_workers
    reading = read * config.training.global_batch_size / _readers(workers)
    told = f"A step computes for {computing:.3g} s, and its crops are read in {reading:.3g} s"
    if reading <= computing:
        return f"{told}: computing bounds this run."
    cores = available_cores()
    more = f"training.num_workers (now {workers}; {cores} cores are usable)"
    keep = "keep the scans on the device (training.resident)"
    if workers < cores - 1:
        return f"{told}: reading bounds this run. Raise {more}, or {keep}."
    return f"{told}: reading bounds this run. {keep.capitalize()}, or use a faster disk."


def _readers(num_workers: int) -> int:
    return max(1, min(num_workers, available_cores()))


def in_words(seconds: float) -> str:
    """Return a time as people say it."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _short(value: float) -> float:
    return float(f"{value:.3g}")
