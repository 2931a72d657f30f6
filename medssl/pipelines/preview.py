"""Show real puzzles of a pretext task: `medssl pretext preview`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from medssl.errors import ConfigError
from medssl.pipelines import prepare, study
from medssl.pipelines.kinds import load_any
from medssl.pipelines.pretrain import PretrainConfig
from medssl.pipelines.pretraining import (
    Pretraining,
    draw_splits,
    patients_of,
    pool_of,
    scans_of,
)
from medssl.pipelines.progress import Progress, silent
from medssl.pipelines.study import StudyConfig
from medssl.pretext.base import Panel
from medssl.randomness import derive_seed, torch_generator
from medssl.reports.panels import save_panels
from medssl.scans.index import Index
from medssl.scans.splits import Splits
from medssl.scans.store import Store
from medssl.training.devices import select_device
from medssl.transforms.augmentation import augment
from medssl.transforms.sampling import CropSampler

PretextConfigFile = PretrainConfig | StudyConfig

DEFAULT_FOLDER = Path("runs/preview")

NUM_ROWS = 6
"""Rows of pictures in a grid, at most, for one task: what fits on a screen."""

_COLUMNS = 6
"""Pictures that short rows of equal length are joined up to; a longer row stays whole."""

_IMAGES = 16
"""Images in a batch to show puzzles of: no more than training takes, and few enough for a CPU."""

_MAX_BATCHES = 20
"""Batches looked through for pictures; where a task shows few of them, a few rows must do."""

_OWNER_ONLY = 0o600


def run(
    config: PretextConfigFile, out: Path = DEFAULT_FOLDER, *, progress: Progress = silent
) -> dict[str, Path]:
    """Write a grid of puzzles for each pretext task of a config, drawn as in training.

    Crops, augmentation and puzzles are of the pretraining pool, by the seeds of training, but in
    batches of their own. A store is prepared first where it is missing; of a study, an index too.

    The pictures show pixels of patients: only their owner may read them, and nothing else gets
    them, neither a report nor MLflow.

    Args:
        config: of a pretraining, or of a study with inits that have a pretext.
        out: the folder to write ``preview_<name>.png`` into.
        progress: told about scans as they are prepared, then after each batch how many rows of
            a grid there are.

    Returns:
        The PNG files, by the name of the init, or of the pretext for a pretraining.

    Raises:
        ConfigError: no init has a pretext, a task does not fit its crops, or it draws nothing.
        DataError: a pretraining's index is not there, no scan is accepted or left to pretrain on,
            or one cannot answer what a task asks for.
    """
    jobs = jobs_of(config)
    _, store, splits = gather(config, progress)
    written = {}
    for name, job in jobs.items():
        rows = _rows(name, job, store, splits, progress)
        path = picture_file(out, name)
        save_panels(
            path,
            [[(panel.image_XY.numpy(), panel.title) for panel in row] for row in rows],
            heading=f"{name}: {job.task().name}" if name != job.pretext.name else name,
            mode=_OWNER_ONLY,
        )
        written[name] = path
    return written


def plan(config: PretextConfigFile, out: Path = DEFAULT_FOLDER) -> dict[str, Any]:
    """Return what `run` would do, touching nothing.

    Raises:
        ConfigError: no init has a pretext, or a task does not fit its crops.
        DataError: see `check_index`.
    """
    jobs = jobs_of(config)
    check_index(config)
    return {
        "pretext": {name: job.pretext.name for name, job in jobs.items()},
        "pictures": [str(picture_file(out, name)) for name in jobs],
        "device": str(select_device(config.device)),
    }


def picture_file(out: Path, name: str) -> Path:
    """Return where the grid of a name goes."""
    return out / f"preview_{name}.png"


def read_config(path: Path, overrides: Sequence[str] = ()) -> PretextConfigFile:
    """Read the config of a pretraining or of a study, with ``section.key=value`` overrides.

    Raises:
        ConfigError: there is no such file, it is of another kind, or does not fit its kind.
    """
    kind, config = load_any(path, overrides)
    if not isinstance(config, (PretrainConfig, StudyConfig)):
        raise ConfigError(
            f"{path.name} is a config of the kind {kind}, which has no pretext. Give one of the "
            "kind pretrain (configs/pretrain) or study (configs/studies)."
        )
    return config


def jobs_of(config: PretextConfigFile) -> dict[str, Pretraining]:
    """Return the pretrainings of a study by the name of the init, or the one of a pretraining.

    The one of a pretraining goes by the name of its pretext.

    Raises:
        ConfigError: there is none, or a task does not fit its crops.
    """
    if isinstance(config, StudyConfig):
        found = {label: study.pretraining_of(config, label) for label in config.inits}
        jobs = {label: job for label, job in found.items() if job is not None}
    else:
        jobs = {
            config.pretext.name: Pretraining(
                "backbone", config.backbone, config.init, config.pretext, config,
                config.sampling, config.seed, select_device(config.device),
            )
        }  # fmt: skip
    if not jobs:
        raise ConfigError(
            "inits: none has a pretext, so there are no puzzles. Give one of them a pretext."
        )
    for job in jobs.values():
        job.task().request(job.sampling.request())
    return jobs


def check_index(config: PretextConfigFile) -> None:
    """Refuse a pretraining whose index cannot be used; a study makes its own.

    Raises:
        DataError: there is no index, it is damaged, or ``select`` leaves none of its scans.
    """
    if isinstance(config, PretrainConfig):
        Index.open(config.index).select(config.select)


def gather(config: PretextConfigFile, progress: Progress = silent) -> tuple[Index, Store, Splits]:
    """Return index, store and splits of a config, as pretraining and study have them.

    The store is made where it is missing, and so is the index of a study.

    Raises:
        DataError: see `check_index`; or no scan is accepted, or some cannot be prepared.
    """
    if isinstance(config, StudyConfig):
        index, _, splits, store = study.gather(config, progress)
        return index, store, splits
    index = Index.open(config.index).select(config.select)
    store = prepare.prepare(
        index,
        config.preprocessing,
        prepare.store_folder(config.index, config.preprocessing, config.store),
        progress=progress,
    )
    splits = draw_splits(config.splits, dict.fromkeys(patients_of(store)), config.seed)
    return index, store, splits


def pool_sampler(job: Pretraining, store: Store, splits: Splits) -> CropSampler:
    """Return the sampler of a pretraining's crops, seeded as in training.

    Raises:
        DataError: the pool holds no scan, or one that cannot answer the task's request.
    """
    scans = scans_of(store, pool_of(job, store, splits))
    seed = derive_seed(job.seed, "pretrain", job.label)
    request = job.task().request(job.sampling.request())
    return CropSampler(store, scans, request, seed, "pretrain")


def _rows(
    name: str, job: Pretraining, store: Store, splits: Splits, progress: Progress
) -> list[list[Panel]]:
    """Return rows of pictures of puzzles of the pretraining pool, augmented as in training.

    `NUM_ROWS` at most; of several tasks on one backbone (`multi`) more, so that none is cut off.

    Raises:
        ConfigError: the task shows no puzzle of `_MAX_BATCHES` batches.
    """
    task = job.task()
    sampler = pool_sampler(job, store, splits)
    size = min(_IMAGES, job.section.training.global_batch_size)
    found: list[list[Panel]] = []
    rows: list[list[Panel]] = []
    for number in range(_MAX_BATCHES):
        sample = sampler.batch(number, size).to(job.device)
        generator = torch_generator(sampler.seed, "step", number, device=job.device)
        images, _ = augment(
            sample.images, None, job.section.augmentation, generator, sampler.request.axes
        )
        with torch.no_grad():
            for batch in task.puzzles(replace(sample, images=images), generator):
                found += [row for row in task.panels(batch, None) if row]
        rows = _side_by_side(found)
        progress(f"preview {name}", min(len(rows), NUM_ROWS), NUM_ROWS)
        if len(rows) >= NUM_ROWS:
            break
    if not rows:
        raise ConfigError(
            f"pretext: {job.pretext.name} draws no puzzle of {_MAX_BATCHES} batches. Perhaps its "
            "crops are mostly air: raise sampling.min_foreground."
        )
    return rows if len(task.parts()) > 1 else rows[:NUM_ROWS]


def _side_by_side(found: list[list[Panel]]) -> list[list[Panel]]:
    """Return rows of which short neighbours of equal length are joined, in order."""
    rows: list[list[Panel]] = []
    length = 0
    for row in found:
        if rows and len(row) == length and len(rows[-1]) + length <= _COLUMNS:
            rows[-1] = rows[-1] + row
        else:
            rows.append(row)
        length = len(row)
    return rows
