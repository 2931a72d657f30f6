"""Measure how far shortcuts solve a pretext task: `medssl pretext audit`.

The task is trained anew on inputs that hold a shortcut alone, with the same backbone, crops,
puzzles and steps each time, and scored on the fixed puzzles of validation patients. What a probe
reaches without anatomy, the task could be solved by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from medssl.errors import DataError
from medssl.models.build import build_backbone
from medssl.pipelines.contract import image_contract
from medssl.pipelines.pretraining import Pretraining, scans_of
from medssl.pipelines.preview import (
    PretextConfigFile,
    check_index,
    gather,
    jobs_of,
    pool_sampler,
)
from medssl.pipelines.progress import Progress, silent
from medssl.pretext._shortcuts import (
    BODY_MASK,
    BORDER,
    EVERYTHING,
    MEAN_DEVIATION,
    THUMBNAIL_ONLY,
    Shortcut,
    ShortcutOnly,
)
from medssl.pretext.base import PretextBatch, PretextTask
from medssl.randomness import derive_seed, torch_generator
from medssl.reports.shortcuts import (
    CONSTANT_CHECK,
    Audit,
    Score,
    describe,
    facts_of,
    judge,
    save_audits,
)
from medssl.scans.splits import Splits
from medssl.scans.store import Store
from medssl.training.devices import autocast, select_device
from medssl.training.loop import Calls, start_state, train
from medssl.training.network import Network, build_network
from medssl.training.settings import TrainingConfig
from medssl.transforms.augmentation import AugmentationConfig
from medssl.transforms.sampling import CropSampler

__all__ = ["Audit", "audit_task", "describe", "facts_of", "plan", "run"]

DEFAULT_FOLDER = Path("runs/shortcuts")

DEFAULT_STEPS = 200
"""Steps of a probe: a shortcut is learnt first, so few are enough to find it."""

MIN_PUZZLES = 500
"""Validation puzzles of a probe: a Wilson interval at most 9 points wide."""

_MIN_RESTORED = 64
"""The same where images are restored: every puzzle is a mean over many voxels already."""

_MAX_BATCHES = 64

_SETTLING_BATCHES = 10
"""Batches over which the means of batch norm are taken anew after a probe's training."""

_CONSTANT = 0.5

_LOGGED = 20  # readings of a training's loss, for the progress line

_CLASSIFIED = (BORDER, BODY_MASK, MEAN_DEVIATION, THUMBNAIL_ONLY)
_RESTORED = (THUMBNAIL_ONLY,)
"""A restored voxel has no label that a border, a silhouette or a mean could give away."""


def run(
    config: PretextConfigFile,
    out: Path = DEFAULT_FOLDER,
    *,
    steps: int | None = None,
    progress: Progress = silent,
) -> list[Audit]:
    """Audit each pretext task of a config; ``shortcuts.csv``, ``.json`` and a PNG each are written.

    Several tasks on one backbone (`multi`) are audited one by one. Nothing is written before the
    last probe is done.

    Args:
        config: of a pretraining, or of a study with inits that have a pretext.
        out: folder of the results; they hold numbers alone, no pixels.
        steps: of each probe; by default those of the config, at most `DEFAULT_STEPS`.
        progress: told about each probe's steps.

    Raises:
        ConfigError: no init has a pretext.
        DataError: there is no index, no accepted scan, or no validation puzzle that counts.
        DivergedError: a probe's loss is not finite.
    """
    jobs = _jobs(config)
    _, store, splits = gather(config, progress)
    audits = [
        audit_task(name, job, store, splits, steps=steps, progress=progress)
        for name, job in jobs.items()
    ]
    save_audits(audits, out)
    return audits


def plan(
    config: PretextConfigFile, out: Path = DEFAULT_FOLDER, *, steps: int | None = None
) -> dict[str, Any]:
    """Return what `run` would do, touching nothing."""
    jobs = _jobs(config)
    check_index(config)
    probes = {
        name: [
            EVERYTHING.name,
            *(shortcut.name for shortcut in _shortcuts_of(job.task())),
            CONSTANT_CHECK,
        ]
        for name, job in jobs.items()
    }
    trained = {name: _training(job, steps).steps for name, job in jobs.items()}
    return {
        "probes": probes,
        "steps_of_each": trained,
        "steps": sum(len(probes[name]) * trained[name] for name in jobs),
        "out": str(out),
        "device": str(select_device(config.device)),
    }


def audit_task(
    name: str,
    job: Pretraining,
    store: Store,
    splits: Splits,
    *,
    steps: int | None = None,
    progress: Progress = silent,
) -> Audit:
    """Train and score the probes of one pretext task. See `run`."""
    training = _training(job, steps)
    task = job.task()
    real = _samplers(job, store, splits)
    flat = _samplers(job, _ConstantStore(store), splits)

    def probe(shortcut: Shortcut, samplers: _Samplers, told: str) -> Score:
        return _probe(job, task, shortcut, samplers, training, f"{name}: {told}", progress)

    whole = probe(EVERYTHING, real, EVERYTHING.name)
    shortcuts = [probe(shortcut, real, shortcut.name) for shortcut in _shortcuts_of(task)]
    constant = replace(
        probe(EVERYTHING, flat, CONSTANT_CHECK),
        shortcut=CONSTANT_CHECK,
        shown="scans of one value, padded as real ones",
    )
    settings = type(task.config).model_fields
    return judge(name, task.name, training.steps, whole, shortcuts, constant, settings)


def _jobs(config: PretextConfigFile) -> dict[str, Pretraining]:
    """Return one pretraining for every single task, by name."""
    jobs = {}
    for name, job in jobs_of(config).items():
        parts = list(job.task().parts().values())
        if len(parts) == 1:
            jobs[name] = job
        for part in parts if len(parts) > 1 else ():
            jobs[f"{name}_{part.name}"] = replace(job, pretext=part.config)
    return jobs


def _shortcuts_of(task: PretextTask) -> tuple[Shortcut, ...]:
    return _RESTORED if task.chance_level is None else _CLASSIFIED


def _training(job: Pretraining, steps: int | None) -> TrainingConfig:
    """Return how a probe is trained: as the config says, with its schedule cut to fewer steps."""
    whole = job.section.training
    wanted = steps or min(whole.steps, DEFAULT_STEPS)
    share = wanted / whole.steps
    return whole.model_copy(
        update={
            "steps": wanted,
            "warmup_steps": int(whole.warmup_steps * min(1, share)),
            "frozen_steps": int(whole.frozen_steps * min(1, share)),
            "log_every": max(1, wanted // _LOGGED),
            "validate_every": 0,
            "checkpoint_every": 0,
        }
    )


class _ConstantStore(Store):
    """A store whose scans hold one value alone, so that all else in the pipeline stays real.

    Padding comes from the sampler and noise from augmentation, as with real scans.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store.folder, store.preprocessing)

    def read(self, scan_key: str, region: Sequence[slice] | None = None) -> npt.NDArray[np.float16]:
        entry = self.entry(scan_key)
        sides = [
            len(range(*(part.indices(side))))
            for part, side in zip(
                region or [slice(None)] * len(entry.shape), entry.shape, strict=True
            )
        ]
        return np.full((entry.channels, *sides), _CONSTANT, np.float16)


@dataclass(frozen=True)
class _Samplers:
    pool: CropSampler
    validation: CropSampler


def _samplers(job: Pretraining, store: Store, splits: Splits) -> _Samplers:
    pool = pool_sampler(job, store, splits)
    held_out = scans_of(store, splits.val)
    return _Samplers(pool, CropSampler(store, held_out, pool.request, job.seed, "validation"))


def _probe(
    job: Pretraining,
    task: PretextTask,
    shortcut: Shortcut,
    samplers: _Samplers,
    training: TrainingConfig,
    told: str,
    progress: Progress,
) -> Score:
    """Train the task on what a shortcut leaves of its inputs, and score it on validation."""
    request = samplers.pool.request
    objective = ShortcutOnly(task, shortcut)
    backbone, _ = build_backbone(
        job.backbone,
        job.init,
        in_channels=task.in_channels(request),
        seed=job.seed,
        expected=image_contract(samplers.pool.store, request),
    )
    network = build_network(backbone, objective, derive_seed(job.seed, "head", job.label))
    state = start_state(network, training, job.device)
    train(
        state,
        objective,
        samplers.pool,
        training,
        seed=samplers.pool.seed,
        device=job.device,
        augmentation=_augmentation(job.section.augmentation, shortcut),
        calls=Calls(
            lambda step, metrics: progress(
                told, step, training.steps, f"loss {metrics.get('train/loss', math.nan):.3g}"
            )
        ),
    )
    _settle(job, objective, network, samplers.pool, training)
    return _score(job, objective, network, samplers.validation, training)


def _settle(
    job: Pretraining,
    objective: ShortcutOnly,
    network: Network,
    sampler: CropSampler,
    training: TrainingConfig,
) -> None:
    """Take the running means of batch norm anew, of puzzles of the pool.

    After few steps they lag behind the weights, and a probe that has learnt its shortcut would
    look as if it had not. Source: Wu and Johnson, "Rethinking 'batch' in BatchNorm", 2021.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
        norm.train()
    for number in range(_SETTLING_BATCHES if norms else 0):
        for batch in _puzzles(job, objective, sampler, training, number, "settle"):
            with torch.no_grad(), autocast(training, job.device):
                network(batch)


def _augmentation(config: AugmentationConfig, shortcut: Shortcut) -> AugmentationConfig:
    """Return how images are varied: a silhouette is taken of intensities that are as prepared.

    Otherwise a brighter image would have no air, and the probe would not see what it is to see.
    """
    if shortcut.of_images is None:
        return config
    return AugmentationConfig(
        flip_axes=config.flip_axes, brightness=0, contrast=0, gamma=0, noise_std=0
    )


def _score(
    job: Pretraining,
    objective: ShortcutOnly,
    network: Network,
    sampler: CropSampler,
    training: TrainingConfig,
) -> Score:
    """Score a network on puzzles that are the same for every probe."""
    task = objective.task
    wanted = _MIN_RESTORED if task.chance_level is None else MIN_PUZZLES
    network.eval()
    confusion: Tensor | None = None
    values, trivial, drawn = [], [], 0
    sides: tuple[int, ...] = ()
    for number in range(max(_MAX_BATCHES, job.section.validation_batches)):
        if drawn >= wanted and number >= job.section.validation_batches:
            break
        for batch in _puzzles(job, objective, sampler, training, number, "validation puzzle"):
            with torch.no_grad(), autocast(training, job.device):
                output = network(batch)
            found = task.confusion(output, batch)
            if found is not None:
                confusion = found if confusion is None else confusion + found
            metrics = task.metrics(output, batch)
            values.append(metrics[task.primary_metric])
            if task.trivial_metric is not None:
                trivial.append(metrics[task.trivial_metric])
            drawn += len(batch.target)
            sides = tuple(batch.inputs.shape[2:])
    score = Score(
        objective.shortcut.name, objective.shortcut.shown(sides), task.primary_metric,
        task.higher_is_better, trivial=math.nan, puzzles=drawn,
    )  # fmt: skip
    if task.chance_level is None or confusion is None:
        means = torch.stack(trivial).float().mean().item() if trivial else math.nan
        every = tuple(torch.stack(values).float().tolist())
        return replace(score, trivial=task.chance_level or means, values=every)
    right, counted = round(confusion.diagonal().sum().item()), round(confusion.sum().item())
    if not counted:
        raise DataError(
            f"pretext {task.name}: none of {drawn} puzzles of validation patients counts: each "
            "lacks foreground. Raise sampling.min_foreground, or lower pretext.min_foreground."
        )
    commonest = float(confusion.sum(1).max()) / counted  # always given, it is right as often
    most = max(task.chance_level, commonest)
    return replace(score, trivial=most, puzzles=counted, right=right)


def _puzzles(
    job: Pretraining,
    objective: ShortcutOnly,
    sampler: CropSampler,
    training: TrainingConfig,
    number: int,
    purpose: str,
) -> list[PretextBatch]:
    """Return the puzzles of one batch of crops, not augmented; every probe sees the same crops."""
    sample = sampler.batch(number, training.global_batch_size).to(job.device)
    generator = torch_generator(sampler.seed, purpose, number, device=job.device)
    return objective.puzzles(sample, generator)
