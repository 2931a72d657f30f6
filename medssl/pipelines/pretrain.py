"""Pretrain a backbone on unlabelled scans with a pretext task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from medssl.atomic import atomic_write
from medssl.config import ComponentConfig, Config, component
from medssl.errors import MachineError
from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import Backbone
from medssl.models.build import build_backbone
from medssl.models.checkpoints import (
    CONTRACT_FILE,
    Contract,
    history_of,
    load_contract,
    save_checkpoint,
)
from medssl.models.inits import INITS
from medssl.models.inits.base import init_provenance
from medssl.pipelines import prepare, publish
from medssl.pipelines.contract import image_contract
from medssl.pipelines.facts import data_digests, data_facts
from medssl.pipelines.labels import init_tags
from medssl.pipelines.leakage import Leakage, write_hashes
from medssl.pipelines.progress import Progress, silent
from medssl.pipelines.run_folder import RunFolder, check_same_config, command_line
from medssl.pipelines.sections import SamplingConfig, SplitConfig
from medssl.pipelines.starts import start_in_words
from medssl.pretext import PRETEXT_TASKS
from medssl.pretext.base import PretextTask
from medssl.provenance import git_commit, package_versions
from medssl.randomness import derive_seed
from medssl.reports.html import build_report
from medssl.reports.panels import save_panels
from medssl.scans.index import Index
from medssl.scans.selection import SelectionConfig
from medssl.scans.splits import Splits, make_splits
from medssl.scans.store import Store
from medssl.tracking.base import RunHandle, Tracker, TrackingConfig
from medssl.training.devices import select_device
from medssl.training.distributed import Ranks, joined, peers_needed
from medssl.training.loop import BadBatch, Calls, start_state, train
from medssl.training.monitor import judge, summary
from medssl.training.network import build_network
from medssl.training.settings import TrainingConfig
from medssl.training.state import TrainingState, discard_states
from medssl.training.validation import ValidationPuzzles
from medssl.transforms.augmentation import AugmentationConfig
from medssl.transforms.preprocessing import PreprocessingConfig
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
    """

    training: TrainingConfig
    sampling: SamplingConfig | None = None
    augmentation: AugmentationConfig = AugmentationConfig()
    validation_batches: int = Field(default=4, gt=0)


class PretrainConfig(PretrainSection):
    """Configuration of ``medssl pretrain``.

    Attributes:
        seed: everything random derives from it.
        index: folder of the index, from ``medssl index``.
        select: which scans of the index to work on.
        preprocessing: how scans are prepared; done first where the store lacks them.
        store: folder of prepared scans; inside the index's folder by default.
        sampling: what is cut out of them.
        backbone: the network.
        init: its starting weights.
        pretext: the task.
        splits: which patients are held out; test patients never take part.
        device: ``auto`` takes the GPU where there is one.
        include_images: whether pictures of puzzles go into the run folder.
        tracking: MLflow.
    """

    seed: int = 0
    index: Path
    store: Path | None = None
    select: SelectionConfig = SelectionConfig()
    preprocessing: PreprocessingConfig
    sampling: SamplingConfig
    backbone: Annotated[ComponentConfig, component(BACKBONES)]
    init: Annotated[ComponentConfig, component(INITS)] = ComponentConfig(name="random")
    pretext: Annotated[ComponentConfig, component(PRETEXT_TASKS)]
    splits: SplitConfig = SplitConfig()
    device: str = "auto"
    include_images: bool = False
    tracking: TrackingConfig = TrackingConfig()


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


def run(
    config: PretrainConfig,
    out: Path = Path("runs/pretrain"),
    *,
    resume: bool = False,
    progress: Progress = silent,
) -> Path:
    """Pretrain a backbone and return the run folder (`medssl.load_backbone` takes it).

    Args:
        config: what to do.
        out: the run folder. One that holds the same configuration is resumed, or left as it is
            when it is finished.
        resume: require that ``out`` already holds this run.
        progress: receives how far it is.

    Raises:
        MedsslError: see `medssl.errors`.
    """
    check_same_config(out, config, resume=resume)
    with joined(config.device) as ranks:
        config.training.micro_batches(ranks.size)  # refuses a batch before anything is written
        index = Index.open(config.index).select(config.select)
        job = Pretraining(
            LABEL, config.backbone, config.init, config.pretext, config,
            config.sampling, config.seed, select_device(config.device, ranks), ranks,
        )  # fmt: skip
        job.task().request(config.sampling.request())  # refuses crops before anything is written
        if ranks.leads:
            _lead(job, config, index, out, resume, progress)
        else:
            with peers_needed():
                _follow(job, config, index, out)
    if ranks.leads:  # nobody waits for a registry
        publish.after_run(out, config.tracking)
    return out


def _lead(
    job: Pretraining,
    config: PretrainConfig,
    index: Index,
    out: Path,
    resume: bool,
    progress: Progress,
) -> None:
    """Prepare, pretrain, and write all there is to write."""
    with Tracker(out, config.tracking) as tracker:
        folder = RunFolder(out, config, command_line(), resume=resume)
        with tracker.run("pretrain/backbone", params=job.parameters()) as handle, peers_needed():
            folder.send_config(handle)

            def prepared() -> tuple[Store, Splits]:
                store = _prepared(config, index, progress)
                splits = draw_splits(config.splits, dict.fromkeys(patients_of(store)), config.seed)
                folder.pin_data(data_digests(index, store, splits))
                handle.inputs(data_digests(index, store, splits), "pretraining")
                splits.write(out / "splits.json")
                return store, splits

            store, splits = job.ranks.leader_first("prepare", prepared)
            earlier = earlier_contract(config.init)
            facts = data_facts(
                index, store, splits,
                pretraining_pool=pretraining_pool(store, splits),
                leakage=Leakage(len({*splits.test} & {*(earlier.patients if earlier else ())})),
            )  # fmt: skip
            folder.write_json("data.json", facts)
            pretrain_backbone(
                job, index, store, splits, out / "checkpoints" / "backbone", handle, progress,
                out / "figures" / "pretext_backbone.png" if config.include_images else None,
            )  # fmt: skip
            folder.finish()
            handle.artifact(out / "checkpoints" / "backbone")
            folder.send_report(handle, build_report(out))


def _follow(job: Pretraining, config: PretrainConfig, index: Index, out: Path) -> None:
    """Compute this process's part of every step, and write nothing."""
    store = job.ranks.leader_first("prepare", lambda: _prepared(config, index, silent))
    splits = out / "splits.json"
    if not splits.is_file():
        raise MachineError(
            f"process {job.ranks.rank} does not see the run folder that process 0 writes. Give an "
            "--out that every machine sees as the same folder."
        )
    pretrain_backbone(
        job, index, store, Splits.read(splits), out / "checkpoints" / "backbone", None, silent, None
    )


def _prepared(config: PretrainConfig, index: Index, progress: Progress) -> Store:
    folder = prepare.store_folder(config.index, config.preprocessing, config.store)
    return prepare.prepare(index, config.preprocessing, folder, progress=progress)


def plan(config: PretrainConfig) -> dict[str, Any]:
    """Return what `run` would do, touching nothing."""
    index = Index.open(config.index).select(config.select)
    patients = dict.fromkeys(map(str, index.accepted["patient_key"].unique()))
    splits = draw_splits(config.splits, patients, config.seed)
    return {
        "scans": len(index.accepted),
        "patients": len(patients),
        "patients_trained_on": len(splits.train),
        "patients_validated_on": len(splits.val),
        "pretext": config.pretext.name,
        "backbone": config.backbone.name,
        "init": start_in_words(config.backbone, config.init),
        "steps": config.training.steps,
        "images": config.training.steps * config.training.global_batch_size,
        "device": str(select_device(config.device)),
    }


def patients_of(store: Store) -> list[str]:
    """Return the patients of all prepared scans, sorted."""
    return sorted({str(patient) for patient in store.entries["patient_key"]})


def draw_splits(config: SplitConfig, patients: dict[str, Any], seed: int) -> Splits:
    """Return the splits of a config: read from its file, or drawn."""
    if config.file is not None:
        return Splits.read(config.file)
    return make_splits(
        patients, val_fraction=config.val_fraction, test_fraction=config.test_fraction, seed=seed
    )


def pretraining_pool(store: Store, splits: Splits) -> list[str]:
    """Return the patients to pretrain on: all but those of validation and test."""
    held_out = {*splits.val, *splits.test}
    return [patient for patient in patients_of(store) if patient not in held_out]


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
    pool = pretraining_pool(store, splits)
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
        folder, result.backbone, _contract(job, task, backbone, request, index, store, pool, init)
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
