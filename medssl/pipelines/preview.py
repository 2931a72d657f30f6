"""Show real puzzles of a pretext task: `medssl pretext preview`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medssl.errors import ConfigError
from medssl.pipelines import prepare, study
from medssl.pipelines.kinds import load_any
from medssl.pipelines.pretrain import (
    PretrainConfig,
    Pretraining,
    draw_splits,
    patients_of,
    pretraining_pool,
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
from medssl.training.loop import select_device
from medssl.transforms.augmentation import augment
from medssl.transforms.sampling import CropSampler

PretextConfigFile = PretrainConfig | StudyConfig

DEFAULT_FOLDER = Path("runs/preview")

NUM_ROWS = 6
"""Rows of pictures in a grid: what fits on a screen."""

_COLUMNS = 6
"""Pictures in a row; shorter rows, of two or three pictures a puzzle, stand side by side."""

_IMAGES = 16
"""Images in a batch to show puzzles of: no more than training takes, and few enough for a CPU."""

_MAX_BATCHES = 20
"""Batches looked through for puzzles that count; where most are of air, a few rows must do."""

_OWNER_ONLY = 0o600


def run(
    config: PretextConfigFile, out: Path = DEFAULT_FOLDER, *, progress: Progress = silent
) -> dict[str, Path]:
    """Write a grid of puzzles for each pretext task of a config, as training makes them.

    The pictures show pixels of patients: only their owner may read them, and nothing else gets
    them, neither a report nor MLflow.

    Args:
        config: of a pretraining, or of a study with inits that have a pretext.
        out: the folder to write ``preview_<name>.png`` into.
        progress: told about rows as they are drawn.

    Returns:
        The PNG files, by the name of the init, or of the pretext for a pretraining.

    Raises:
        ConfigError: no init has a pretext, or a task draws nothing.
        DataError: there is no index, or it holds no accepted scan.
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
    """Return what `run` would do, touching nothing."""
    jobs = jobs_of(config)
    if isinstance(config, PretrainConfig):
        Index.open(config.index).select(config.select)
    return {
        "pretext": {name: job.pretext.name for name, job in jobs.items()},
        "pictures": [str(picture_file(out, name)) for name in jobs],
        "device": str(select_device(config.device)),
    }


def picture_file(out: Path, name: str) -> Path:
    """Return where the grid of a name goes."""
    return out / f"preview_{name}.png"


def read_config(path: Path, overrides: Sequence[str] = ()) -> PretextConfigFile:
    """Read the config of a pretraining or of a study.

    Raises:
        ConfigError: it is of another kind, or does not fit its kind.
    """
    kind, config = load_any(path, overrides)
    if not isinstance(config, (PretrainConfig, StudyConfig)):
        raise ConfigError(
            f"{path.name} is a config of the kind {kind}, which has no pretext. Give one of the "
            "kind pretrain (configs/pretrain) or study (configs/studies)."
        )
    return config


def jobs_of(config: PretextConfigFile) -> dict[str, Pretraining]:
    """Return the pretrainings of a config, by the name of the init or pretext.

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


def gather(config: PretextConfigFile, progress: Progress = silent) -> tuple[Index, Store, Splits]:
    """Return index, store and splits of a config, as pretraining and study have them.

    Raises:
        DataError: a pretraining's index is not there, or there is no accepted scan.
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


def _rows(
    name: str, job: Pretraining, store: Store, splits: Splits, progress: Progress
) -> list[list[Panel]]:
    """Return rows of pictures of puzzles of the pretraining pool, augmented as in training."""
    task = job.task()
    request = task.request(job.sampling.request())
    seed = derive_seed(job.seed, "pretrain", job.label)
    scans = scans_of(store, pretraining_pool(store, splits))
    sampler = CropSampler(store, scans, request, seed, "pretrain")
    size = min(_IMAGES, job.section.training.global_batch_size)
    found: list[list[Panel]] = []
    rows: list[list[Panel]] = []
    for number in range(_MAX_BATCHES):
        sample = sampler.batch(number, size).to(job.device)
        generator = torch_generator(seed, "step", number, device=job.device)
        sample.images, _ = augment(
            sample.images, None, job.section.augmentation, generator, request.axes
        )
        with torch.no_grad():
            for batch in task.puzzles(sample, generator):
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
    # Of several kinds of puzzles in a batch, none is cut off.
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
