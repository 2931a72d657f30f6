"""Pretrain a backbone on unlabelled scans with a pretext task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from medssl.config import ComponentConfig, Config, component
from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import Backbone
from medssl.models.build import build_backbone
from medssl.models.checkpoints import CONTRACT_FILE, Contract, load_contract, save_checkpoint
from medssl.models.inits import INITS
from medssl.models.inits.base import init_provenance
from medssl.pipelines import prepare
from medssl.pipelines.contract import image_contract
from medssl.pipelines.facts import data_digests
from medssl.pipelines.progress import Progress, silent
from medssl.pipelines.run_folder import RunFolder, check_same_config, command_line
from medssl.pipelines.sections import SamplingConfig, SplitConfig
from medssl.pretext import PRETEXT_TASKS
from medssl.pretext.base import PretextTask
from medssl.provenance import git_commit, package_versions
from medssl.randomness import derive_seed, torch_generator
from medssl.reports.html import build_report
from medssl.reports.panels import save_panels
from medssl.scans.index import Index
from medssl.scans.selection import SelectionConfig
from medssl.scans.splits import Splits, make_splits
from medssl.scans.store import Store
from medssl.tracking.base import RunHandle, Tracker, TrackingConfig
from medssl.training.loop import (
    Meter,
    Network,
    TrainingConfig,
    autocast,
    build_network,
    select_device,
    start_state,
    train,
)
from medssl.transforms.augmentation import AugmentationConfig
from medssl.transforms.preprocessing import PreprocessingConfig
from medssl.transforms.sampling import CropSampler, SampleRequest

_STATE_FILE = "training_state.pt"


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
    """

    label: str
    backbone: ComponentConfig
    init: ComponentConfig
    pretext: ComponentConfig
    section: PretrainSection
    sampling: SamplingConfig
    seed: int
    device: torch.device

    def task(self) -> PretextTask:
        """Return the pretext task."""
        return PRETEXT_TASKS.build(self.pretext, self.sampling.spatial_dims)


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
    index = Index.open(config.index).select(config.select)
    job = Pretraining(
        "backbone", config.backbone, config.init, config.pretext, config,
        config.sampling, config.seed, select_device(config.device),
    )  # fmt: skip
    job.task().request(config.sampling.request())  # refuses crops before anything is written
    with Tracker(out, config.tracking) as tracker:
        folder = RunFolder(out, config, command_line(), resume=resume)
        with tracker.run("pretrain/backbone", params=config.model_dump(mode="json")) as handle:
            store = prepare.prepare(
                index,
                config.preprocessing,
                prepare.store_folder(config.index, config.preprocessing, config.store),
                progress=progress,
            )
            splits = draw_splits(config.splits, dict.fromkeys(patients_of(store)), config.seed)
            folder.pin_data(data_digests(index, store, splits))
            splits.write(out / "splits.json")
            pretrain_backbone(
                job, index, store, splits, out / "checkpoints" / "backbone", handle, progress,
                out / "figures" / "pretext_backbone.png" if config.include_images else None,
            )  # fmt: skip
            folder.finish()
            build_report(out)
            handle.artifact(out / "checkpoints" / "backbone")
            handle.artifact(out / "report.html")
    return out


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
        "init": config.init.name,
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
    handle: RunHandle,
    progress: Progress,
    pictures: Path | None,
) -> None:
    """Pretrain one backbone into a checkpoint folder; does nothing where it is finished.

    Patients of the test side take no part; validation puzzles come from validation patients.
    """
    if (folder / CONTRACT_FILE).is_file():
        return
    task = job.task()
    request = task.request(job.sampling.request())
    training = job.section.training
    backbone, report = build_backbone(
        job.backbone,
        job.init,
        in_channels=request.in_channels,
        seed=job.seed,
        expected=image_contract(store, request),
    )
    handle.tag("init_report", str(report))
    network = build_network(backbone, task, derive_seed(job.seed, "head", job.label))
    state = start_state(network, training, job.device)
    if (folder / _STATE_FILE).is_file():
        state.load(folder / _STATE_FILE, job.device)
    pool = pretraining_pool(store, splits)
    validation = CropSampler(store, _scans(store, splits.val), request, job.seed, "validation")
    seed = derive_seed(job.seed, "pretrain", job.label)
    stage = f"pretrain {job.label}"

    def log(step: int, metrics: dict[str, float]) -> None:
        handle.log(step, metrics)
        progress(stage, step, training.steps, _note(metrics))

    train(
        state,
        task,
        CropSampler(store, _scans(store, pool), request, seed, "pretrain"),
        training,
        seed=seed,
        device=job.device,
        augmentation=job.section.augmentation,
        log=log,
        validate=lambda _: _validate(network, task, validation, job),
        save=lambda: state.save(folder / _STATE_FILE),
    )
    if pictures is not None:
        batch, output = _validation_batch(network, task, validation, job, 0)
        rows = task.panels(batch, output)
        save_panels(
            pictures, [[(panel.image_XY.numpy(), panel.title) for panel in row] for row in rows]
        )
    init = init_provenance(job.init, report)
    save_checkpoint(folder, backbone, _contract(job, backbone, request, index, store, pool, init))


def _validate(
    network: Network, task: PretextTask, sampler: CropSampler, job: Pretraining
) -> dict[str, float]:
    """Return loss and metrics on puzzles that are the same at every validation."""
    meter = Meter()
    for number in range(job.section.validation_batches):
        batch, output = _validation_batch(network, task, sampler, job, number)
        meter.add({"loss": task.loss(output, batch), **task.metrics(output, batch)})
    return meter.read()


def _validation_batch(
    network: Network, task: PretextTask, sampler: CropSampler, job: Pretraining, number: int
) -> tuple[Any, Any]:
    training = job.section.training
    network.eval()
    sample = sampler.batch(number, training.global_batch_size).to(job.device)
    generator = torch_generator(job.seed, "validation puzzle", number, device=job.device)
    with torch.no_grad(), autocast(training, job.device):
        batch = task.batch_of(sample, generator)
        return batch, network(batch)


def _contract(
    job: Pretraining,
    backbone: Backbone,
    request: SampleRequest,
    index: Index,
    store: Store,
    pool: Sequence[str],
    init: dict[str, Any],
) -> Contract:
    return Contract(
        **image_contract(store, request),
        in_channels=request.in_channels,
        spatial_dims=request.spatial_dims,
        backbone=backbone.config.model_dump(mode="json"),
        init=init,
        pretext=job.pretext.model_dump(mode="json"),
        index_digest=index.digest,
        store_digest=store.digest,
        patients=tuple(sorted({*pool, *_earlier_patients(job.init)})),
        seed=job.seed,
        steps=job.section.training.steps,
        package_versions=package_versions(),
        git_commit=git_commit(),
    )


def _earlier_patients(init: ComponentConfig) -> tuple[str, ...]:
    """Return the patients that an init was itself pretrained on."""
    path = getattr(init, "path", None)
    return load_contract(path).patients if init.name == "checkpoint" and path else ()


def _scans(store: Store, patients: Sequence[str]) -> list[str]:
    wanted = set(patients)
    return [key for key in store.scan_keys if store.entry(key).patient_key in wanted]


def _note(metrics: dict[str, float]) -> str:
    shown = [name for name in metrics if name.startswith("val/")] or [
        name for name in metrics if name.startswith("train/")
    ]
    return ", ".join(f"{name.split('/')[1]} {metrics[name]:.3g}" for name in shown)
