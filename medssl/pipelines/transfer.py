"""Evaluate how well inits transfer to downstream tasks: the matrix of cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator

from medssl.atomic import atomic_write
from medssl.config import ComponentConfig, Config, Label, component
from medssl.downstream import DOWNSTREAM_TASKS
from medssl.downstream.base import DownstreamTask
from medssl.errors import ConfigError, LabelError, LeakageError
from medssl.evaluation.matrix import build_cells, collect, run_cells, write_cell
from medssl.evaluation.protocols import PROTOCOLS
from medssl.evaluation.protocols import base as protocols_base
from medssl.evaluation.protocols.base import Cell, Setting
from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import Backbone
from medssl.models.build import build_backbone
from medssl.models.checkpoints import load_contract
from medssl.models.inits import INITS
from medssl.models.inits.base import LoadReport
from medssl.pipelines import compare, prepare
from medssl.pipelines.contract import image_contract
from medssl.pipelines.facts import data_digests, data_facts
from medssl.pipelines.pretrain import draw_splits
from medssl.pipelines.progress import Progress, silent
from medssl.pipelines.run_folder import RunFolder, check_same_config, command_line
from medssl.pipelines.sections import MatrixConfig, SamplingConfig, SplitConfig, StatisticsConfig
from medssl.pipelines.starts import start_in_words
from medssl.randomness import derive_seed
from medssl.scans.index import Index
from medssl.scans.selection import SelectionConfig
from medssl.scans.splits import Splits
from medssl.scans.store import Store
from medssl.tracking.base import RunHandle, Tracker, TrackingConfig
from medssl.training.devices import select_device
from medssl.transforms.preprocessing import PreprocessingConfig

TaskConfig = Annotated[ComponentConfig, component(DOWNSTREAM_TASKS)]
ProtocolConfig = Annotated[ComponentConfig, component(PROTOCOLS)]


class EvaluationSection(Config):
    """What is evaluated, whatever the inits.

    Attributes:
        tasks: downstream tasks, with their labels.
        protocols: how each is evaluated.
        matrix: label fractions and seeds.
        splits: how patients are divided.
        statistics: how inits are compared.
        allow_test_patients_in_pretraining: permit checkpoints that were pretrained on scans of
            test patients; the report then says so.
    """

    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    protocols: tuple[ProtocolConfig, ...] = Field(min_length=1)
    matrix: MatrixConfig
    splits: SplitConfig = SplitConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    allow_test_patients_in_pretraining: bool = False

    @model_validator(mode="after")
    def _labels_are_different(self) -> EvaluationSection:
        labels = [getattr(task, "label", None) or task.name for task in self.tasks]
        if len(set(labels)) != len(labels):
            raise ValueError(f"two tasks are called the same ({labels}); give them a label each")
        names = [protocol.name for protocol in self.protocols]
        if len(set(names)) != len(names):
            raise ValueError(f"a protocol is given twice ({names})")
        return self

    @model_validator(mode="after")
    def _protocols_suit_the_tasks(self) -> EvaluationSection:
        for task in self.tasks:
            for protocol in self.protocols:
                why = PROTOCOLS.load(protocol.name).refusal(DOWNSTREAM_TASKS.load(task.name))
                if why:
                    raise ValueError(
                        f"protocol {protocol.name} does not suit task {task.name}: {why}. "
                        "Leave one of them out, or give the task a study of its own"
                    )
        return self

    def cells(
        self, tasks: Iterable[str], inits: Iterable[str], num_train_patients: int
    ) -> list[Cell]:
        """Return the cells of the matrix, in the order in which they run."""
        names = [protocol.name for protocol in self.protocols]
        return build_cells(
            tasks=list(tasks),
            inits=list(inits),
            protocols=names,
            labelled_patients=self.matrix.numbers(num_train_patients),
            num_train_patients=num_train_patients,
            seeds=self.matrix.seeds,
            once=[name for name in names if not PROTOCOLS.load(name).uses_label_fractions],
        )

    def budgets(self) -> dict[str, str]:
        """Return what one cell of each protocol costs, in words."""
        return {
            protocol.name: protocol.budget()
            for protocol in self.protocols
            if isinstance(protocol, protocols_base.ProtocolConfig)
        }


class TransferConfig(EvaluationSection):
    """Configuration of ``medssl transfer``.

    Attributes:
        seed: everything random derives from it.
        index: folder of the index.
        store: folder of prepared scans; inside the index's folder by default.
        select: which scans of the index to work on.
        preprocessing: how scans are prepared.
        sampling: crops that fine-tuning trains on.
        backbone: the network, the same for every init.
        inits: by the name they get in tables.
        device: ``auto`` takes the GPU where there is one.
        tracking: MLflow.
    """

    seed: int = 0
    index: Path
    store: Path | None = None
    select: SelectionConfig = SelectionConfig()
    preprocessing: PreprocessingConfig
    sampling: SamplingConfig
    backbone: Annotated[ComponentConfig, component(BACKBONES)]
    inits: dict[Label, Annotated[ComponentConfig, component(INITS)]] = Field(min_length=2)
    device: str = "auto"
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _reference_is_an_init(self) -> TransferConfig:
        self.statistics.check_reference(self.inits)
        return self


@dataclass
class Evaluation:
    """All that the matrix needs.

    Attributes:
        section: tasks, protocols, cells, statistics.
        backbone, sampling, seed, device: the same for every init.
        inits: configuration of each init by its label.
        pretexts: name of each init's pretext task by its label; empty where it has none.
        index, store, splits: the data.
        tasks: the built tasks by label.
        pretraining_pool: patients that this run pretrained backbones on.
        reports: what was loaded into each init, filled as backbones are built.
    """

    section: EvaluationSection
    backbone: ComponentConfig
    sampling: SamplingConfig
    seed: int
    device: torch.device
    inits: Mapping[str, ComponentConfig]
    pretexts: Mapping[str, str]
    index: Index
    store: Store
    splits: Splits
    tasks: Mapping[str, DownstreamTask]
    pretraining_pool: Sequence[str] = ()
    reports: dict[str, LoadReport] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """Return the cells of the matrix, in the order in which they run."""
        return self.section.cells(self.tasks, self.inits, len(self.splits.train))

    def metrics(self) -> dict[str, str]:
        """Return the primary metric of each task."""
        return {label: task.metric for label, task in self.tasks.items()}

    def new_backbone(self, init: str, seed: int) -> Backbone:
        """Return a fresh backbone with an init's weights, under the study's contract."""
        request = self.sampling.request()
        backbone, report = build_backbone(
            self.backbone,
            self.inits[init],
            in_channels=request.in_channels,
            seed=derive_seed(self.seed, "init", seed),
            expected=image_contract(self.store, request),
        )
        self.reports[init] = report
        return backbone

    def setting(self, task: str, init: str) -> Setting:
        """Return what the cells of one task and init share."""
        return Setting(
            task=self.tasks[task],
            store=self.store,
            request=self.sampling.request(),
            splits=self.splits,
            new_backbone=lambda seed: self.new_backbone(init, seed),
            seed=self.seed,
            device=self.device,
            seeded_init=self.inits[init].name == "random",
        )


def run(
    config: TransferConfig,
    out: Path = Path("runs/transfer"),
    *,
    resume: bool = False,
    progress: Progress = silent,
) -> Path:
    """Evaluate inits on downstream tasks, compare them, and return the run folder.

    Args:
        config: what to do.
        out: the run folder; resumed where it holds the same configuration.
        resume: require that ``out`` already holds this run.
        progress: receives how far it is.

    Raises:
        MedsslError: see `medssl.errors`.
    """
    check_same_config(out, config, resume=resume)
    check_inits(config.backbone, config.inits.values(), config.sampling)
    index = Index.open(config.index).select(config.select)
    tasks = build_tasks(config, config.sampling, index)
    with Tracker(out, config.tracking) as tracker:
        folder = RunFolder(out, config, command_line(), resume=resume)
        with tracker.run("transfer", params=config.model_dump(mode="json")) as handle:
            store = prepare.prepare(
                index,
                config.preprocessing,
                prepare.store_folder(config.index, config.preprocessing, config.store),
                masks=mask_folders(config),
                progress=progress,
            )
            splits = draw_splits(config.splits, labelled_patients(tasks, index), config.seed)
            digests = data_digests(index, store, splits, tasks.values())
            folder.pin_data({**digests, **checkpoint_digests(config.inits)})
            splits.write(out / "splits.json")
            evaluation = Evaluation(
                config, config.backbone, config.sampling, config.seed,
                select_device(config.device), config.inits, pretexts_of(config.inits),
                index, store, splits, tasks,
            )  # fmt: skip
            evaluate(evaluation, out, tracker, handle, folder, progress)
            compare.conclude(out, config.statistics, evaluation.metrics(), handle, folder)
    return out


def plan(config: TransferConfig) -> dict[str, Any]:
    """Return what `run` would do, touching nothing."""
    index = Index.open(config.index).select(config.select)
    tasks = build_tasks(config, config.sampling, index)
    splits = draw_splits(config.splits, labelled_patients(tasks, index), config.seed)
    numbers = config.matrix.numbers(len(splits.train))
    return {
        "scans": len(index.accepted),
        "patients": {
            "train": len(splits.train), "val": len(splits.val), "test": len(splits.test),
        },
        "inits": {
            label: start_in_words(config.backbone, init) for label, init in config.inits.items()
        },
        "tasks": list(tasks),
        "protocols": [protocol.name for protocol in config.protocols],
        "labelled_patients": list(numbers),
        "seeds": list(config.matrix.seeds),
        "budgets": config.budgets(),
        "cells": len(config.cells(tasks, config.inits, len(splits.train))),
        "device": str(select_device(config.device)),
    }  # fmt: skip


def check_inits(
    backbone: ComponentConfig, inits: Iterable[ComponentConfig], sampling: SamplingConfig
) -> None:
    """Build the backbone with every init once, so that missing weights show before hours of work.

    Raises:
        ConfigError: the backbone takes images of other dimensions than the crops.
        MedsslError: an init's weights are not there, or do not fit the backbone.
    """
    in_channels = sampling.request().in_channels
    seen: list[ComponentConfig] = []
    for init in inits:
        if init not in seen:
            seen.append(init)
            built, _ = build_backbone(backbone, init, in_channels=in_channels, seed=0)
            if built.spatial_dims != sampling.spatial_dims:
                raise ConfigError(
                    f"sampling.crop_size: {list(sampling.crop_size)} cuts {sampling.spatial_dims}D "
                    f"images, and the backbone {backbone.name} takes {built.spatial_dims}D. "
                    f"Give {built.spatial_dims} numbers, or choose another backbone."
                )


def build_tasks(
    section: EvaluationSection, sampling: SamplingConfig, index: Index
) -> dict[str, DownstreamTask]:
    """Return the downstream tasks by label, with their labels read."""
    tasks = [DOWNSTREAM_TASKS.build(task, sampling.spatial_dims, index) for task in section.tasks]
    return {task.name: task for task in tasks}


def mask_folders(section: EvaluationSection) -> dict[str, Path]:
    """Return all folders of masks that the tasks need, by the mask's name."""
    folders: dict[str, Path] = {}
    for task in section.tasks:
        for name, folder in DOWNSTREAM_TASKS.load(task.name).masks(task).items():
            if folders.setdefault(name, folder) != folder:
                raise ConfigError(
                    f"two tasks keep different folders of masks under the name {name!r}. "
                    "Give one of them another mask name."
                )
    return folders


def labelled_patients(tasks: Mapping[str, DownstreamTask], index: Index) -> dict[str, Any]:
    """Return the patients that have labels of every task, with the class to stratify by.

    The class is that of the first task that has one.

    Raises:
        LabelError: no patient has labels of every task.
    """
    owner = dict(zip(index.accepted["scan_key"], index.accepted["patient_key"], strict=True))
    found: dict[str, Any] | None = None
    for task in tasks.values():
        strata: dict[str, Any] = {}
        for scan_key in sorted(task.targets):
            strata.setdefault(owner[scan_key], task.stratum(scan_key))
        if found is None:
            found = strata
        else:
            found = {
                patient: stratum if stratum is not None else strata[patient]
                for patient, stratum in found.items()
                if patient in strata
            }
    if not found:
        raise LabelError(
            "no patient has labels of every task. Evaluate the tasks in studies of their own, "
            "or check the labels."
        )
    return found


def pretexts_of(inits: Mapping[str, ComponentConfig]) -> dict[str, str]:
    """Return the pretext task of each init's checkpoint; empty for the others."""
    return {
        label: (load_contract(init.path).pretext or {}).get("name", "")
        if hasattr(init, "path") and init.name == "checkpoint"
        else ""
        for label, init in inits.items()
    }


def checkpoint_digests(inits: Mapping[str, ComponentConfig]) -> dict[str, str]:
    """Return the hash of the weights of each init that is a checkpoint."""
    return {
        f"checkpoint {label}": str(load_contract(init.path).weights_sha256)
        for label, init in inits.items()
        if init.name == "checkpoint" and hasattr(init, "path")
    }


def overlap_with_pretraining(
    inits: Mapping[str, ComponentConfig], splits: Splits, *, allowed: bool
) -> int:
    """Return how many test patients an init was pretrained on.

    Raises:
        LeakageError: there are some, and the config does not allow it.
    """
    test = set(splits.test)
    worst = 0
    for label, init in inits.items():
        if init.name != "checkpoint" or not hasattr(init, "path"):
            continue
        shared = test & set(load_contract(init.path).patients)
        worst = max(worst, len(shared))
        if shared and not allowed:
            raise LeakageError(
                f"init {label!r} was pretrained on scans of {len(shared)} of the {len(test)} test "
                "patients. Pretrain it with the same splits file (splits.file), or set "
                "allow_test_patients_in_pretraining: true, and the report will say so."
            )
    return worst


def evaluate(
    evaluation: Evaluation,
    out: Path,
    tracker: Tracker,
    parent: RunHandle,
    folder: RunFolder,
    progress: Progress,
) -> None:
    """Run all cells that are not finished and write ``predictions.parquet``."""
    overlap = overlap_with_pretraining(
        evaluation.inits,
        evaluation.splits,
        allowed=evaluation.section.allow_test_patients_in_pretraining,
    )
    facts = data_facts(
        evaluation.index,
        evaluation.store,
        evaluation.splits,
        pretraining_pool=evaluation.pretraining_pool,
        overlap=overlap,
    )
    folder.write_json("data.json", facts)
    protocols = {protocol.name: protocol for protocol in evaluation.section.protocols}
    cells = evaluation.cells()
    cells_folder = out / "cells"

    def run_cell(cell: Cell, setting: Setting) -> None:
        params = {
            "init": cell.init,
            "task": cell.task,
            "protocol": cell.protocol,
            "num_labelled_patients": cell.num_labelled_patients,
            "seed": cell.seed,
        }
        with tracker.run(f"cell/{cell.key}", parent=parent.name, params=params) as handle:
            protocol = PROTOCOLS.build(protocols[cell.protocol])
            predictions = protocol.run(cell, setting, handle.log)
            report = evaluation.reports[cell.init]
            handle.tag("init_report", str(report))
            # Before the cell counts as finished: a resumed run loads nothing for it any more.
            folder.note_inits({cell.init: report.to_dict()})
            write_cell(
                cells_folder, cell, predictions, setting,
                pretext=evaluation.pretexts[cell.init], backbone=evaluation.backbone.name,
            )  # fmt: skip

    run_cells(
        cells,
        cells_folder,
        evaluation.setting,
        run_cell,
        lambda done, total, note: progress("transfer", done, total, note),
    )
    predictions = collect(cells_folder, cells)
    atomic_write(out / "predictions.parquet", predictions.to_parquet)
