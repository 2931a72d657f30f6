"""Measure how far shortcuts solve a pretext task: `medssl pretext audit`.

The task is trained anew on inputs that hold a shortcut alone, with the same backbone, crops,
puzzles and steps each time, and scored on the fixed puzzles of validation patients. What a probe
reaches without anatomy, the task could be solved by.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from scipy import stats
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from medssl.atomic import atomic_write
from medssl.errors import DataError
from medssl.models.build import build_backbone
from medssl.pipelines.contract import image_contract
from medssl.pipelines.pretrain import PretrainConfig, Pretraining, pretraining_pool, scans_of
from medssl.pipelines.preview import PretextConfigFile, gather, jobs_of
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
from medssl.pretext.base import PretextTask
from medssl.randomness import derive_seed, torch_generator
from medssl.reports.drawing import Theme, picture
from medssl.scans.index import Index
from medssl.scans.splits import Splits
from medssl.scans.store import Store
from medssl.training.loop import (
    Network,
    TrainingConfig,
    autocast,
    build_network,
    select_device,
    start_state,
    train,
)
from medssl.transforms.augmentation import AugmentationConfig
from medssl.transforms.sampling import CropSampler

DEFAULT_FOLDER = Path("runs/shortcuts")

DEFAULT_STEPS = 200
"""Steps of a probe: a shortcut is learnt first, so few are enough to find it."""

REFERENCE, NO_SHORTCUT, WEAK = "reference", "no shortcut", "weak"
SHORTCUT, UNDECIDED, NOT_JUDGED = "shortcut", "undecided", "not judged"

WEAK_SHARE = 0.1
"""A tenth of what the whole puzzle gains over guessing: below it, two seeds differ by as much."""

SHORTCUT_SHARE = 0.5
"""From half of the gain on, more is answered without anatomy than needs it."""

MIN_PUZZLES = 500
"""Validation puzzles of a probe: a Wilson interval at most 9 points wide."""

_MIN_RESTORED = 64
"""The same where images are restored: every puzzle is a mean over many voxels already."""

_MAX_BATCHES = 64

_SETTLING_BATCHES = 10
"""Batches over which the means of batch norm are taken anew after a probe's training."""

_LEVEL = 0.95
_CONSTANT_LEVEL = 0.99
"""Of the binomial interval around guessing: of a hundred honest checks one is a false alarm."""

_CONSTANT = 0.5

_LOGGED = 20  # readings of a training's loss, for the progress line

_CONSTANT_CHECK = "constant"
_CLASSIFIED = (EVERYTHING, BORDER, BODY_MASK, MEAN_DEVIATION, THUMBNAIL_ONLY)
_RESTORED = (EVERYTHING, THUMBNAIL_ONLY)
"""A restored voxel has no label that a border, a silhouette or a mean could give away."""

NOTE = (
    "Intervals: 95 %, Wilson, over puzzles as if each were independent; puzzles of one image or "
    "patient are not, so the true ones are wider. What more steps would find is not known."
)
_NOTE_RESTORED = "Intervals: 95 %, Student's t, over batches of validation puzzles."

_REMEDIES = {
    "border": "raise pretext.gap and pretext.jitter, or take crops that lie inside the scans.",
    "body_mask": "raise sampling.min_foreground, or take smaller crops, so that less of the "
    "silhouette is in them.",
    "mean_deviation": "set pretext.standardise=true, or raise pretext.intensity_jitter or "
    "augmentation.brightness and contrast.",
    "thumbnail": "the coarse layout is enough. That is anatomy, but not its detail: take smaller "
    "crops or tiles, or more classes, if detail is what should be learnt.",
    "constant": "the label reaches the network without any image: by padding, or by how the task "
    "makes its puzzles. Do not trust this task's accuracy.",
}


@dataclass(frozen=True)
class Row:
    """What one probe reached.

    Attributes:
        shortcut: what it saw, by name.
        shown: the same in words.
        metric: the task's primary metric.
        value: of the metric, on validation puzzles.
        low, high: its 95 % interval; NaN from a single batch of a task that restores.
        trivial: the metric of guessing, or of the answer that needs no network.
        share: of what the whole puzzle gains over ``trivial``; NaN where that gains nothing.
        puzzles: how many counted.
        verdict: see `SHORTCUT_SHARE` and `WEAK_SHARE`.
    """

    shortcut: str
    shown: str
    metric: str
    value: float
    low: float
    high: float
    trivial: float
    share: float
    puzzles: int
    verdict: str


@dataclass(frozen=True)
class Audit:
    """The probes of one pretext task.

    Attributes:
        name: of the init or pretext.
        pretext: the task.
        steps: of each probe.
        rows: one a probe.
        notes: what a reader must know, and what to do.
    """

    name: str
    pretext: str
    steps: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def verdicts(self) -> dict[str, str]:
        """Return the verdict of each probe, by its shortcut."""
        return {row.shortcut: row.verdict for row in self.rows}


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
    write(audits, out)
    return audits


def plan(
    config: PretextConfigFile, out: Path = DEFAULT_FOLDER, *, steps: int | None = None
) -> dict[str, Any]:
    """Return what `run` would do, touching nothing."""
    jobs = _jobs(config)
    if isinstance(config, PretrainConfig):
        Index.open(config.index).select(config.select)
    probes = {
        name: [*(shortcut.name for shortcut in _shortcuts_of(job.task())), _CONSTANT_CHECK]
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
    samplers = _samplers(job, task, store, splits)
    constant = _samplers(job, task, _ConstantStore(store), splits)
    rows: list[Row] = []
    for shortcut in _shortcuts_of(task):
        told = f"{name}: {shortcut.name}"
        score = _probe(job, task, shortcut, samplers, training, told, progress)
        rows.append(_judged(task, score, rows[0] if rows else None))
    told = f"{name}: {_CONSTANT_CHECK}"
    score = _probe(job, task, EVERYTHING, constant, training, told, progress)
    rows.append(_judged_constant(task, score))
    return Audit(name, task.name, training.steps, tuple(rows), tuple(_notes(task, rows)))


def describe(audits: Sequence[Audit]) -> list[str]:
    """Return the tables as lines for people."""
    lines = []
    for audit in audits:
        title = audit.name if audit.name == audit.pretext else f"{audit.name} ({audit.pretext})"
        metric = audit.rows[0].metric
        lines.append(f"{title}: {audit.steps} steps a probe, {audit.rows[0].puzzles} puzzles")
        lines.append(
            f"  {'sees':15}{metric:>10}  {'95 % interval':16}{'trivial':>8}{'share':>8}"
            "  verdict      in words"
        )
        for row in audit.rows:
            interval = "" if math.isnan(row.low) else f"{row.low:.3f} to {row.high:.3f}"
            share = "" if math.isnan(row.share) else f"{row.share:.0%}"
            lines.append(
                f"  {row.shortcut:15}{row.value:10.3f}  {interval:16}{row.trivial:8.3f}{share:>8}"
                f"  {row.verdict:13}{row.shown}"
            )
        lines.extend(f"  {note}" for note in audit.notes)
    return lines


def facts_of(audits: Sequence[Audit]) -> list[dict[str, Any]]:
    """Return the tables as plain values for JSON; what is undefined is ``None``."""
    facts: list[dict[str, Any]] = json.loads(
        json.dumps([asdict(audit) for audit in audits]), parse_constant=lambda _: None
    )
    return facts


def write(audits: Sequence[Audit], out: Path) -> None:
    """Write tables and figures of audits into a folder."""
    text = io.StringIO()
    columns = ["name", "pretext", "steps", *Row.__dataclass_fields__]
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    for audit in audits:
        head = {"name": audit.name, "pretext": audit.pretext, "steps": audit.steps}
        for row in audit.rows:
            values = {
                key: "" if isinstance(value, float) and math.isnan(value) else value
                for key, value in asdict(row).items()
            }
            table.writerow({**head, **values})
    for audit in audits:
        atomic_write(out / f"shortcuts_{audit.name}.png", _figure(audit))
    atomic_write(out / "shortcuts.csv", text.getvalue())
    atomic_write(out / "shortcuts.json", json.dumps(facts_of(audits), indent=2) + "\n")


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
    store: Store
    pool: CropSampler
    validation: CropSampler


def _samplers(job: Pretraining, task: PretextTask, store: Store, splits: Splits) -> _Samplers:
    request = task.request(job.sampling.request())
    seed = derive_seed(job.seed, "pretrain", job.label)
    pool = scans_of(store, pretraining_pool(store, splits))
    return _Samplers(
        store,
        CropSampler(store, pool, request, seed, "pretrain"),
        CropSampler(store, scans_of(store, splits.val), request, job.seed, "validation"),
    )


@dataclass(frozen=True)
class _Score:
    """What a trained probe answered.

    Attributes:
        shortcut, shown: see `Row`.
        values: of a task that restores: the primary metric of each batch.
        trivial: the metric of the trivial answer.
        right: of a task that classifies: puzzles answered rightly.
        puzzles: that counted.
    """

    shortcut: str
    shown: str
    values: tuple[float, ...]
    trivial: float
    right: int
    puzzles: int


def _probe(
    job: Pretraining,
    task: PretextTask,
    shortcut: Shortcut,
    samplers: _Samplers,
    training: TrainingConfig,
    told: str,
    progress: Progress,
) -> _Score:
    """Train the task on what a shortcut leaves of its inputs, and score it on validation."""
    request = samplers.pool.request
    objective = ShortcutOnly(task, shortcut)
    backbone, _ = build_backbone(
        job.backbone,
        job.init,
        in_channels=task.in_channels(request),
        seed=job.seed,
        expected=image_contract(samplers.store, request),
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
        log=lambda step, metrics: progress(
            told, step, training.steps, f"loss {metrics.get('train/loss', math.nan):.3g}"
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
        sample = sampler.batch(number, training.global_batch_size).to(job.device)
        generator = torch_generator(sampler.seed, "settle", number, device=job.device)
        for batch in objective.puzzles(sample, generator):
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
) -> _Score:
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
        sample = sampler.batch(number, training.global_batch_size).to(job.device)
        generator = torch_generator(job.seed, "validation puzzle", number, device=job.device)
        for batch in objective.puzzles(sample, generator):
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
    shown = objective.shortcut.shown(sides)
    name = objective.shortcut.name
    if task.chance_level is None or confusion is None:
        means = torch.stack(trivial).float().mean().item() if trivial else math.nan
        every = tuple(torch.stack(values).float().tolist())
        return _Score(name, shown, every, task.chance_level or means, 0, drawn)
    right, counted = round(confusion.diagonal().sum().item()), round(confusion.sum().item())
    if not counted:
        raise DataError(
            f"pretext {task.name}: none of {drawn} puzzles of validation patients counts: each "
            "lacks foreground. Raise sampling.min_foreground, or lower pretext.min_foreground."
        )
    commonest = float(confusion.sum(1).max()) / counted  # always given, it is right as often
    return _Score(name, shown, (), max(task.chance_level, commonest), right, counted)


def _judged(task: PretextTask, score: _Score, whole: Row | None) -> Row:
    """Return a probe's row; ``whole`` is that of the whole puzzle, for all but itself."""
    row = _row(task, score)
    if whole is None:
        return replace(
            row, verdict=REFERENCE, share=1.0 if _beats_guessing(task, row) else math.nan
        )
    beats = _beats_guessing(task, row)
    if not _beats_guessing(task, whole):
        return replace(row, verdict=SHORTCUT if beats else UNDECIDED)
    row = replace(row, share=(row.value - row.trivial) / (whole.value - whole.trivial))
    if not beats or row.share < WEAK_SHARE:
        return replace(row, verdict=NO_SHORTCUT)
    return replace(row, verdict=SHORTCUT if row.share >= SHORTCUT_SHARE else WEAK)


def _judged_constant(task: PretextTask, score: _Score) -> Row:
    """Return the row of the constant scans, on which guessing is all that an honest task allows."""
    row = replace(
        _row(task, score), shortcut=_CONSTANT_CHECK, shown="scans of one value, padded as real ones"
    )
    if score.values:  # there is nothing to restore, and the trivial answer is right already
        return replace(row, verdict=NOT_JUDGED)
    _, most = stats.binom.interval(_CONSTANT_LEVEL, score.puzzles, score.trivial)
    return replace(row, verdict=SHORTCUT if score.right > most else NO_SHORTCUT)


def _row(task: PretextTask, score: _Score) -> Row:
    if score.values:
        value = float(np.mean(score.values))
        low, high = math.nan, math.nan
        if len(score.values) > 1:
            error = float(stats.sem(score.values))
            reach = float(stats.t.ppf((1 + _LEVEL) / 2, len(score.values) - 1)) * error
            low, high = value - reach, value + reach
    else:
        value = score.right / score.puzzles
        interval = stats.binomtest(score.right, score.puzzles).proportion_ci(
            confidence_level=_LEVEL, method="wilson"
        )
        low, high = float(interval.low), float(interval.high)
    return Row(
        score.shortcut, score.shown, task.primary_metric, value, low, high, score.trivial,
        math.nan, score.puzzles, "",
    )  # fmt: skip


def _beats_guessing(task: PretextTask, row: Row) -> bool:
    return row.low > row.trivial if task.higher_is_better else row.high < row.trivial


def _notes(task: PretextTask, rows: Sequence[Row]) -> list[str]:
    notes = [NOTE if task.chance_level is not None else _NOTE_RESTORED]
    if not _beats_guessing(task, rows[0]):
        notes.append(
            "The whole puzzle itself was not learnt in these steps, so shares cannot be told. "
            "Give more --steps."
        )
    notes.extend(
        f"{row.shortcut} ({row.shown}): {_REMEDIES[row.shortcut]}"
        for row in rows
        if row.verdict == SHORTCUT
    )
    return notes


def _figure(audit: Audit) -> bytes:
    """Return the bar chart of an audit, PNG."""
    rows = audit.rows

    def draw(axes: Axes, theme: Theme) -> None:
        colours = {SHORTCUT: theme.inits[0], WEAK: theme.inits[4], REFERENCE: theme.ink}
        for place, row in enumerate(rows):
            axes.barh(place, row.value, height=0.62, color=colours.get(row.verdict, theme.baseline))
            axes.plot([row.low, row.high], [place, place], color=theme.faint, lw=1.5)
            axes.annotate(
                row.verdict, (np.nanmax([row.value, row.high]), place), xytext=(5, 0),
                textcoords="offset points", va="center", fontsize=8, color=theme.faint,
                annotation_clip=False,
            )  # fmt: skip
            axes.plot([row.trivial] * 2, [place - 0.42, place + 0.42], color=theme.inits[1], lw=1.5)
        axes.set_yticks(range(len(rows)), [row.shortcut.replace("_", " ") for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.margins(x=0.2)
        axes.set_xlabel(f"{rows[0].metric} on validation puzzles (blue: without looking)")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)

    title = f"What shortcuts reach: {audit.name}"
    alt = "; ".join(f"{row.shortcut} {row.value:.3f}, {row.verdict}" for row in rows)
    return picture(audit.name, title, "", alt, draw, height=0.4 * len(rows) + 0.7).light
