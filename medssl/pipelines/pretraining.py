"""One backbone, pretrained: the job, its data, its training, and the contract of its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from medssl.atomic import atomic_write
from medssl.config import ComponentConfig, Config
from medssl.models.backbones.base import Backbone
from medssl.models.build import build_backbone
from medssl.models.checkpoints import (
    CONTRACT_FILE,
    Contract,
    history_of,
    load_contract,
    save_checkpoint,
)
from medssl.models.decoders import decoder_in
from medssl.models.inits.base import init_provenance
from medssl.pipelines.contract import image_contract
from medssl.pipelines.labels import init_tags
from medssl.pipelines.leakage import write_hashes
from medssl.pipelines.progress import Progress
from medssl.pipelines.sections import SamplingConfig, SplitConfig
from medssl.pretext import PRETEXT_TASKS
from medssl.pretext.base import PretextTask
from medssl.provenance import git_commit, package_versions
from medssl.randomness import derive_seed, numpy_generator
from medssl.reports.panels import save_panels
from medssl.scans.index import Index
from medssl.scans.splits import Splits, make_splits
from medssl.scans.store import Store
from medssl.tracking.base import RunHandle
from medssl.training.distributed import Ranks
from medssl.training.loop import BadBatch, Calls, start_state, train
from medssl.training.monitor import judge, summary
from medssl.training.network import build_network
from medssl.training.settings import TrainingConfig
from medssl.training.state import TrainingState, discard_states
from medssl.training.validation import ValidationPuzzles
from medssl.transforms.augmentation import AugmentationConfig
from medssl.transforms.sampling import CropSampler, SampleRequest

LABEL = "backbone"
"""What the one backbone of a run that only pretrains is called."""

VALIDATION_FILE = "validation.json"
"""What the last validation found, beside the checkpoint: metrics, confusion matrices, health."""


class PretrainSection(Config):
    """How a backbone is pretrained, whatever its task.

    Attributes:
        training: steps, batch, rates.
        augmentation: what is varied before the puzzle is made.
        validation_batches: fixed batches of puzzles, from validation patients.
        sampling: crops to pretrain on, where a study pretrains on others than it fine-tunes on.
        pool_fraction: share of the pool's patients to pretrain on; for one seed of the study the
            smaller choices lie inside the larger ones.
    """

    training: TrainingConfig
    sampling: SamplingConfig | None = None
    augmentation: AugmentationConfig = AugmentationConfig()
    validation_batches: int = Field(default=4, gt=0)
    pool_fraction: float = Field(default=1.0, gt=0, le=1)


@dataclass(frozen=True)
class Pretraining:
    """One backbone to be pretrained.

    Attributes:
        label: what it is called in tables; the journal says ``pretrain/<label>``.
        backbone, init, pretext: configurations.
        section: training, augmentation, validation.
        sampling: crops.
        seed: the study's.
        device: where to compute.
        ranks: the processes that share each step.
    """

    label: str
    backbone: ComponentConfig
    init: ComponentConfig
    pretext: ComponentConfig
    section: PretrainSection
    sampling: SamplingConfig
    seed: int
    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)

    def task(self) -> PretextTask:
        """Return the pretext task."""
        return PRETEXT_TASKS.build(self.pretext, self.sampling.spatial_dims)

    def parameters(self) -> dict[str, Any]:
        """Return the few settings that people filter runs by; the whole config is an artifact."""
        return {
            "pretext": self.pretext.name,
            "init": self.init.name,
            "backbone": self.backbone.name,
            "steps": self.section.training.steps,
            "global_batch_size": self.section.training.global_batch_size,
            "seed": self.seed,
            "chance_level": self.task().chance_level,
        }


def patients_of(store: Store) -> list[str]:
    """Return the patients of all prepared scans, sorted."""
    return sorted({str(patient) for patient in store.entries["patient_key"]})


def draw_splits(config: SplitConfig, patients: dict[str, Any], seed: int) -> Splits:
    """Return the splits of a config: read from its file, or drawn."""
    if config.file is not None:
        splits = Splits.read(config.file)
    else:
        splits = make_splits(
            patients,
            val_fraction=config.val_fraction,
            test_fraction=config.test_fraction,
            seed=seed,
        )
    return splits.for_choices(patients) if config.evaluate_on == "validation" else splits


def pretraining_pool(store: Store, splits: Splits) -> list[str]:
    """Return the patients to pretrain on: all but those that the splits hold out."""
    held_out = splits.held_out
    return [patient for patient in patients_of(store) if patient not in held_out]


def pool_of(job: Pretraining, store: Store, splits: Splits) -> list[str]:
    """Return the patients that one backbone is pretrained on: its share of the pool, sorted."""
    pool = pretraining_pool(store, splits)
    num_patients = max(1, round(job.section.pool_fraction * len(pool)))
    order = numpy_generator(job.seed, "pool").permutation(len(pool))
    return sorted(pool[index] for index in order[:num_patients])


def pretrain_backbone(
    job: Pretraining,
    index: Index,
    store: Store,
    splits: Splits,
    folder: Path,
    handle: RunHandle | None,
    progress: Progress,
    pictures: Path | None,
) -> None:
    """Pretrain one backbone into a checkpoint folder; does nothing where it is finished.

    Patients of the test side take no part; validation puzzles come from validation patients.

    Args:
        handle: where to log; None in a process that does not lead, which then writes nothing.
    """
    if (folder / CONTRACT_FILE).is_file():
        return
    task = job.task()
    request = task.request(job.sampling.request())
    training = job.section.training
    backbone, report = build_backbone(
        job.backbone,
        job.init,
        in_channels=task.in_channels(request),
        seed=job.seed,
        expected=image_contract(store, request),
    )
    network = build_network(backbone, task, derive_seed(job.seed, "head", job.label))
    state = start_state(network, training, job.device, job.ranks)
    state.resume(folder, job.device)
    pool = pool_of(job, store, splits)
    validation = CropSampler(store, scans_of(store, splits.val), request, job.seed, "validation")
    puzzles = ValidationPuzzles(
        task, validation, job.section.validation_batches, training, job.seed, job.device
    )
    calls = Calls(lambda *_: None, lambda _: {}, lambda: None)
    if handle is not None:
        for key, value in init_tags(report.to_dict()).items():
            handle.tag(key, value)
        handle.tag("pool_patients", len(pool))
        calls = _calls(job, puzzles, state, handle, folder, progress)
    seed = derive_seed(job.seed, "pretrain", job.label)
    train(
        state,
        task,
        CropSampler(store, scans_of(store, pool), request, seed, "pretrain"),
        training,
        seed=seed,
        device=job.device,
        augmentation=job.section.augmentation,
        calls=replace(
            calls,
            bad_batches=lambda bad: _write_bad(folder, job.ranks.rank, bad),
            profile=None if handle is None else profile_folder(folder, job.label),
        ),
        ranks=job.ranks,
    )
    if handle is None:
        return
    result: Any = state.result
    if pictures is not None:
        rows = [
            row for batch, output in puzzles.examples(result) for row in task.panels(batch, output)
        ]
        save_panels(
            pictures, [[(panel.image_XY.numpy(), panel.title) for panel in row] for row in rows],
            mode=0o600,  # patients' pixels
        )  # fmt: skip
    init = init_provenance(job.init, report)
    write_hashes(folder, store, scans_of(store, pool), job.init)
    save_checkpoint(
        folder,
        result.backbone,
        _contract(job, task, backbone, request, index, store, pool, init),
        decoder_in(result.head),
    )
    discard_states(folder)


def _calls(
    job: Pretraining,
    puzzles: ValidationPuzzles,
    state: TrainingState,
    handle: RunHandle,
    folder: Path,
    progress: Progress,
) -> Calls:
    """Return what the leading process does at the steps that a config names."""
    watch = _Watch(job, puzzles, state, handle, folder)
    training, task = job.section.training, puzzles.task

    def log(step: int, metrics: dict[str, float]) -> None:
        handle.log(step, metrics)
        note = _note(task, metrics, watch.states)
        progress(f"pretrain {job.label}", step, training.steps, note)

    return Calls(log, watch.validate, lambda: state.save(folder))


def profile_folder(checkpoint: Path, label: str) -> Path:
    """Return where a run's profile goes: one of many pretrainings has a folder of its own."""
    place = checkpoint.parents[1] / "profile"
    return place if label == LABEL else place / label


def _write_bad(folder: Path, rank: int, bad: list[BadBatch]) -> None:
    """Write which scans the batches that diverged were of, by key."""
    content = json.dumps({"batches": [asdict(batch) for batch in bad]}, indent=2) + "\n"
    atomic_write(folder / (f"diverged-{rank}.json" if rank else "diverged.json"), content)


class _Watch:
    """Validates, judges and keeps what the report shows of it, beside the checkpoint."""

    def __init__(
        self,
        job: Pretraining,
        puzzles: ValidationPuzzles,
        state: TrainingState,
        handle: RunHandle,
        folder: Path,
    ) -> None:
        self._job, self._puzzles, self._state = job, puzzles, state
        self._handle, self._folder = handle, folder
        self.states = ""

    def validate(self, step: int) -> dict[str, float]:
        """Return the metrics of a validation, and say how the task does."""
        task = self._puzzles.task
        scores = self._puzzles.score(self._state.result)
        # Both are kept with the training state: solved early stays suspicious after a restart.
        notes = self._state.notes
        if "baselines" not in notes:
            notes["baselines"] = self._puzzles.baselines()
        baselines, solved = notes["baselines"], notes.setdefault("solved_early", [])
        health = judge(task, scores, step, self._job.section.training.steps, solved, baselines)
        solved += [
            prefix
            for prefix, found in health.items()
            if found.state == "suspicious" and prefix not in solved
        ]
        for prefix, found in health.items():
            self._handle.tag(f"health.{prefix}".rstrip("._"), f"step {step}: {found}")
        self.states = ", ".join(
            f"{prefix.rstrip('_')} {found.state}".strip() for prefix, found in health.items()
        )
        content = {"step": step, **summary(task, scores, health)}
        atomic_write(self._folder / VALIDATION_FILE, json.dumps(content, indent=2) + "\n")
        return {**scores.metrics, **baselines}


def _contract(
    job: Pretraining,
    task: PretextTask,
    backbone: Backbone,
    request: SampleRequest,
    index: Index,
    store: Store,
    pool: Sequence[str],
    init: dict[str, Any],
) -> Contract:
    earlier = earlier_contract(job.init)
    return Contract(
        **image_contract(store, request),
        **task.contract(),
        in_channels=task.in_channels(request),
        spatial_dims=request.spatial_dims,
        backbone=backbone.config.model_dump(mode="json"),
        init=init,
        pretext=job.pretext.model_dump(mode="json"),
        index_digest=index.digest,
        store_digest=store.digest,
        patients=tuple(sorted({*pool, *(earlier.patients if earlier else ())})),
        history=history_of(earlier) if earlier else (),
        num_scans=len(scans_of(store, pool)),
        preprocessing=store.preprocessing,
        seed=job.seed,
        steps=job.section.training.steps,
        package_versions=package_versions(),
        git_commit=git_commit(),
    )


def earlier_contract(init: ComponentConfig) -> Contract | None:
    """Return the contract of the checkpoint that a pretraining goes on from, if it does."""
    path = getattr(init, "path", None)
    return load_contract(path) if init.name == "checkpoint" and path else None


def scans_of(store: Store, patients: Sequence[str]) -> list[str]:
    """Return the prepared scans of some patients."""
    wanted = set(patients)
    return [key for key in store.scan_keys if store.listed(key).patient_key in wanted]


def _note(task: PretextTask, metrics: dict[str, float], states: str) -> str:
    """Return what the progress line shows: the loss, what people judge by, and how it does."""
    side = "val/" if any(name.startswith("val/") for name in metrics) else "train/"
    primary = [prefix + part.primary_metric for prefix, part in task.parts().items()]
    words = [
        f"{name} {metrics[side + name]:.3g}"
        for name in ["loss", *primary]
        if side + name in metrics
    ]
    return ", ".join([*words, states] if side == "val/" else words)
