"""A whole study: index → prepare → pretrain → transfer → compare → report."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from medssl.config import ComponentConfig, Config, Label, component
from medssl.downstream.base import DownstreamTask
from medssl.errors import ConfigError
from medssl.models.backbones import BACKBONES
from medssl.models.inits import INITS
from medssl.models.inits.checkpoint import Config as CheckpointConfig
from medssl.pipelines import compare, prepare, publish
from medssl.pipelines import index as indexing
from medssl.pipelines.cells import Evaluation
from medssl.pipelines.facts import data_digests, keep_dataset_facts
from medssl.pipelines.labels import evaluation_params
from medssl.pipelines.leakage import check_leakage
from medssl.pipelines.pretraining import (
    Pretraining,
    PretrainSection,
    draw_splits,
    pretrain_backbone,
    pretraining_pool,
)
from medssl.pipelines.progress import Progress, silent
from medssl.pipelines.run_folder import RunFolder, check_same_config, command_line
from medssl.pipelines.sections import EvaluationSection, SamplingConfig
from medssl.pipelines.starts import start_in_words
from medssl.pipelines.transfer import (
    build_tasks,
    check_inits,
    checkpoint_digests,
    evaluate,
    labelled_patients,
    mask_folders,
    raise_failures,
)
from medssl.pretext import PRETEXT_TASKS
from medssl.scans.building import IndexConfig
from medssl.scans.index import Index
from medssl.scans.selection import SelectionConfig
from medssl.scans.splits import Splits
from medssl.scans.store import Store
from medssl.tracking.base import RunHandle, Tracker, TrackingConfig
from medssl.training.devices import select_device
from medssl.transforms.preprocessing import PreprocessingConfig

_FILES_INDEXED_FOR_A_PLAN = 5000
"""Reading the headers of so many takes about a minute (80 a second measured on one core)."""


class StudyInit(Config):
    """One init of a study.

    Attributes:
        init: the weights to start from.
        pretext: pretrain on the study's own scans with this task first; the result is the init.
            Starting from ``imagenet`` this is continual pretraining.
        pretrain: replaces the study's own ``pretrain`` section for this init.
        decoder: fine-tuning on voxel tasks starts from the pretext task's decoder too, where it
            draws images (inpainting, colorization, or multi with one of them).
    """

    init: Annotated[ComponentConfig, component(INITS)] = ComponentConfig(name="random")
    pretext: Annotated[ComponentConfig, component(PRETEXT_TASKS)] | None = None
    pretrain: PretrainSection | None = None
    decoder: bool = False


class StudyConfig(EvaluationSection):
    """Configuration of ``medssl study``.

    Attributes:
        name: of the run folder, and in MLflow.
        seed: everything random derives from it.
        index: where the scans are, and how patients are told apart.
        workspace: folder for the index and the prepared scans, shared between studies; holds what
            only this machine may see, so it is never inside the run folder.
        select: which scans of the index the study works on.
        preprocessing: how scans are prepared.
        sampling: crops that training sees.
        backbone: the network, the same for every init.
        pretrain: how backbones are pretrained.
        inits: by the name they get in tables.
        device: ``auto`` takes the GPU where there is one.
        include_images: whether pictures of puzzles, made of patients' scans, go into the run
            folder and the report.
        tracking: MLflow.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    seed: int = 0
    index: IndexConfig
    workspace: Path = Path("data/workspace")
    select: SelectionConfig = SelectionConfig()
    preprocessing: PreprocessingConfig
    sampling: SamplingConfig
    backbone: Annotated[ComponentConfig, component(BACKBONES)]
    pretrain: PretrainSection | None = None
    inits: dict[Label, StudyInit] = Field(min_length=2)
    device: str = "auto"
    include_images: bool = False
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _pretraining_is_described(self) -> StudyConfig:
        for label, init in self.inits.items():
            if init.pretext is not None and self.section_of(init) is None:
                raise ValueError(f"inits.{label} has a pretext; add a pretrain section")
        return self

    @model_validator(mode="after")
    def _reference_is_an_init(self) -> StudyConfig:
        self.statistics.check_reference(self.inits)
        return self

    def crops_of(self, init: StudyInit) -> SamplingConfig:
        """Return the crops that an init is pretrained on."""
        section = self.section_of(init)
        return (section.sampling if section else None) or self.sampling

    def section_of(self, init: StudyInit) -> PretrainSection | None:
        """Return how an init is pretrained."""
        return init.pretrain or self.pretrain

    @property
    def workplace(self) -> Path:
        """The study's own folder in the workspace: another index config, another folder."""
        return self.workspace / self.index.digest()[:12]


def run(
    config: StudyConfig,
    out: Path | None = None,
    *,
    resume: bool = False,
    progress: Progress = silent,
) -> Path:
    """Run a study, or go on with it, and return the run folder.

    Args:
        config: what to do.
        out: the run folder, ``runs/<name>`` by default.
        resume: require that ``out`` already holds this study.
        progress: receives how far it is.

    Raises:
        MedsslError: see `medssl.errors`.
    """
    out = out or default_folder(config)
    check_same_config(out, config, resume=resume)
    device = select_device(config.device)
    for label in config.inits:
        _check_pretext(config, label)
    check_inits(config.backbone, (init.init for init in config.inits.values()), config.sampling)
    with Tracker(out, config.tracking) as tracker:
        folder = RunFolder(out, config, command_line(), resume=resume)
        with tracker.run("study", params=_parameters(config)) as handle:
            folder.send_config(handle)
            index, tasks, splits, store = gather(config, progress)
            starts = {label: init.init for label, init in config.inits.items()}
            digests = data_digests(index, store, splits, tasks.values())
            folder.pin_data({**digests, **checkpoint_digests(starts)})
            handle.inputs(digests, "evaluation")
            # What a pretraining goes on from must be free of test patients before it takes hours.
            check_leakage(
                starts, store, splits,
                pool=pretraining_pool(store, splits) if any(_pretexts(config).values()) else (),
                allow_patients=config.allow_test_patients_in_pretraining,
                allow_images=config.allow_duplicated_images,
                progress=progress,
            )  # fmt: skip
            splits.write(out / "splits.json")
            inits = {
                label: _init_of(config, label, index, store, splits, out, tracker, handle, progress)
                for label in config.inits
            }
            # Cells that are finished belong to these weights, and not to those of another
            # pretraining, should someone delete a checkpoint.
            folder.pin_data({"index": index.digest, **_pretrained_digests(config, inits)})
            pretexts = _pretexts(config)
            evaluation = Evaluation(
                config, config.backbone, config.sampling, config.seed, device, inits, pretexts,
                index, store, splits, tasks,
                pretraining_pool(store, splits) if any(pretexts.values()) else (),
            )  # fmt: skip
            failed = evaluate(evaluation, out, tracker, handle, folder, progress)
            progress("report", 0, 1)
            compare.conclude(out, config.statistics, evaluation.metrics(), handle, folder)
            progress("report", 1, 1)
            raise_failures(failed, len(evaluation.cells()))
    publish.after_run(out, config.tracking)
    return out


def _pretexts(config: StudyConfig) -> dict[str, str]:
    """Return the name of each init's pretext task by its label; empty where it has none."""
    return {
        label: init.pretext.name if init.pretext else "" for label, init in config.inits.items()
    }


def gather(
    config: StudyConfig, progress: Progress = silent
) -> tuple[Index, dict[str, DownstreamTask], Splits, Store]:
    """Return index, tasks, splits and store of a study; made where the workspace lacks them."""
    index = indexing.run(config.index, config.workplace / "index", progress=progress)
    index = index.select(config.select)
    keep_dataset_facts(config.index.folder, index.folder)
    tasks = build_tasks(config, config.sampling, index)
    splits = draw_splits(config.splits, labelled_patients(tasks, index), config.seed)
    store = prepare.prepare(
        index,
        config.preprocessing,
        prepare.store_folder(config.workplace, config.preprocessing),
        masks=mask_folders(config),
        executor=config.index.executor,
        progress=progress,
    )
    return index, tasks, splits, store


def pretraining_of(config: StudyConfig, label: str) -> Pretraining | None:
    """Return how an init is pretrained; ``None`` where it has no pretext."""
    init = config.inits[label]
    section = config.section_of(init)
    if init.pretext is None or section is None:
        return None
    return Pretraining(
        label, config.backbone, init.init, init.pretext, section, config.crops_of(init),
        config.seed, select_device(config.device),
    )  # fmt: skip


def plan(config: StudyConfig, out: Path | None = None) -> dict[str, Any]:
    """Return what `run` would do, touching nothing.

    What needs the index is counted on the study's own, or else on one that is made for the
    purpose and thrown away; for a large folder that would take long, and is left out.
    """
    found: dict[str, Any] = {
        "run_folder": str(out or default_folder(config)),
        "device": str(select_device(config.device)),
        "inits": {
            label: start_in_words(config.backbone, init.init, init.pretext)
            for label, init in config.inits.items()
        },
        "pretraining_steps": {
            label: section.training.steps
            for label, init in config.inits.items()
            if init.pretext is not None and (section := config.section_of(init)) is not None
        },
        "protocols": [protocol.name for protocol in config.protocols],
        "budgets": config.budgets(),
        "left_out": {f"{p} for {t}": why for (t, p), why in config.unfit().items()},
        "seeds": list(config.matrix.seeds),
    }
    for label in config.inits:
        _check_pretext(config, label)
    here = [init.init for init in config.inits.values() if not getattr(init.init, "download", None)]
    check_inits(config.backbone, here, config.sampling)
    found["data"] = indexing.plan(config.index, config.workplace / "index")
    with _index_to_plan_with(config, int(found["data"]["num_files"])) as index:
        if index is None:
            found["cells"] = "known after the first indexing"
            return found
        tasks = build_tasks(config, config.sampling, index)
        splits = draw_splits(config.splits, labelled_patients(tasks, index), config.seed)
        numbers = config.matrix.numbers(len(splits.train))
        found["patients"] = {
            "train": len(splits.train), "val": len(splits.val), "test": len(splits.test),
        }  # fmt: skip
        found["labelled_patients"] = list(numbers)
        found["cells"] = len(config.cells(tasks, config.inits, len(splits.train)))
        found["store"] = prepare.estimate(index, config.preprocessing)
    return found


@contextmanager
def _index_to_plan_with(config: StudyConfig, num_files: int) -> Iterator[Index | None]:
    """Open the study's index, or make one that lasts as long as the block; None if it is large."""
    kept = config.workplace / "index"
    if (kept / "index.parquet").is_file():
        yield Index.open(kept).select(config.select)
    elif num_files > _FILES_INDEXED_FOR_A_PLAN:
        yield None
    else:
        with tempfile.TemporaryDirectory(prefix="medssl-plan-") as place:
            yield indexing.run(config.index, Path(place) / "index").select(config.select)


def default_folder(config: StudyConfig) -> Path:
    """Return the run folder of a study that is given none."""
    return Path("runs") / config.name


def _check_pretext(config: StudyConfig, label: str) -> None:
    """Refuse a pretext task that does not fit the crops, before anything is written."""
    pretext = config.inits[label].pretext
    if pretext is not None:
        crops = config.crops_of(config.inits[label])
        task = PRETEXT_TASKS.build(pretext, crops.spatial_dims)
        task.request(crops.request())
    if config.inits[label].decoder and (pretext is None or not task.draws):
        raise ConfigError(
            f"inits.{label}.decoder: {pretext.name if pretext else 'an init without a pretext'} "
            "leaves no decoder behind. Leave decoder out, or pretrain with inpainting."
        )


def _init_of(
    config: StudyConfig,
    label: str,
    index: Index,
    store: Store,
    splits: Splits,
    out: Path,
    tracker: Tracker,
    parent: RunHandle,
    progress: Progress,
) -> ComponentConfig:
    """Return the init's configuration for the matrix, pretrained first where it has a pretext."""
    job = pretraining_of(config, label)
    if job is None:
        return config.inits[label].init
    checkpoint = out / "checkpoints" / label
    with tracker.run(f"pretrain/{label}", parent=parent.name, params=job.parameters()) as handle:
        handle.inputs(data_digests(index, store, splits), "pretraining")
        picture = out / "figures" / f"pretext_{label}.png" if config.include_images else None
        pretrain_backbone(job, index, store, splits, checkpoint, handle, progress, picture)
        handle.artifact(checkpoint)
    return CheckpointConfig(path=checkpoint, decoder=config.inits[label].decoder)


def _pretrained_digests(
    config: StudyConfig, inits: Mapping[str, ComponentConfig]
) -> dict[str, str]:
    """Return the hash of the weights of each init that this study has pretrained."""
    ours = {label: init for label, init in inits.items() if config.inits[label].pretext is not None}
    digests = checkpoint_digests(ours).values()
    return {f"pretrained {label}": digest for label, digest in zip(ours, digests, strict=True)}


def _parameters(config: StudyConfig) -> dict[str, Any]:
    return evaluation_params(config, config, config.backbone, config.inits, config.seed)
