"""Evaluate how well inits transfer to downstream tasks: the matrix of cells."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field, model_validator

from medssl.atomic import atomic_write
from medssl.config import ComponentConfig, Label, component
from medssl.downstream import DOWNSTREAM_TASKS
from medssl.downstream.base import DownstreamTask
from medssl.errors import ConfigError, LabelError, MachineError
from medssl.evaluation.matrix import (
    Outcome,
    collect,
    comparable,
    in_turn,
    read_notes,
    run_cells,
    unfinished,
)
from medssl.executors import EXECUTORS
from medssl.models.backbones import BACKBONES
from medssl.models.build import build_backbone
from medssl.models.checkpoints import load_contract
from medssl.models.inits import INITS
from medssl.pipelines import baselines, compare, prepare
from medssl.pipelines.cells import CellWork, Evaluation, run_name, track
from medssl.pipelines.facts import data_digests, data_facts
from medssl.pipelines.labels import evaluation_params
from medssl.pipelines.leakage import check_leakage
from medssl.pipelines.prepare import MaskSource
from medssl.pipelines.pretraining import draw_splits
from medssl.pipelines.progress import Progress, silent
from medssl.pipelines.run_folder import RunFolder, check_same_config, command_line
from medssl.pipelines.sections import EvaluationSection, SamplingConfig
from medssl.pipelines.starts import start_in_words
from medssl.scans.index import Index
from medssl.scans.selection import SelectionConfig
from medssl.tracking.base import RunHandle, Tracker, TrackingConfig
from medssl.training.devices import select_device
from medssl.transforms.preprocessing import PreprocessingConfig

FAILURES_FILE = "failures.csv"


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
        with tracker.run("transfer", params=_parameters(config)) as handle:
            folder.send_config(handle)
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
            handle.inputs(digests, "evaluation")
            splits.write(out / "splits.json")
            evaluation = Evaluation(
                config, config.backbone, config.sampling, config.seed,
                select_device(config.device), config.inits, pretexts_of(config.inits),
                index, store, splits, tasks,
            )  # fmt: skip
            failed = evaluate(evaluation, out, tracker, handle, folder, progress)
            compare.conclude(out, config.statistics, evaluation.metrics(), handle, folder)
            raise_failures(failed, len(evaluation.cells()))
    return out


def _parameters(config: TransferConfig) -> dict[str, Any]:
    return evaluation_params(config, config, config.backbone, config.inits, config.seed)


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
        "left_out": {f"{p} for {t}": why for (t, p), why in config.unfit().items()},
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


def mask_folders(section: EvaluationSection) -> dict[str, MaskSource]:
    """Return all folders of masks that the tasks need, by the mask's name."""
    folders: dict[str, MaskSource] = {}
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
    """Return the hash of the weights of each init that names a checkpoint, or a file of weights."""
    found = {}
    for label, init in inits.items():
        path = getattr(init, "path", None)
        if path is None:
            continue
        if init.name == "checkpoint":
            found[f"checkpoint {label}"] = str(load_contract(path).weights_sha256)
        elif Path(path).is_file():
            with Path(path).open("rb") as file:
                found[f"weights {label}"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def evaluate(
    evaluation: Evaluation,
    out: Path,
    tracker: Tracker,
    parent: RunHandle,
    folder: RunFolder,
    progress: Progress,
) -> list[Outcome]:
    """Run all cells that are not finished and write ``predictions.parquet``.

    Returns:
        The cells that failed; ``failures.csv`` lists them, and predictions then hold what can be
        compared without them.

    Raises:
        LeakageError: test patients, or their images, are where they must not be.
        MachineError: so many cells failed that nothing is left to compare.
    """
    section = evaluation.section
    leakage = check_leakage(
        evaluation.inits, evaluation.store, evaluation.splits,
        pool=evaluation.pretraining_pool,
        allow_patients=section.allow_test_patients_in_pretraining,
        allow_images=section.allow_duplicated_images,
        progress=progress,
    )  # fmt: skip
    leakage.warn()
    facts = data_facts(
        evaluation.index,
        evaluation.store,
        evaluation.splits,
        pretraining_pool=evaluation.pretraining_pool,
        leakage=leakage,
        tasks=evaluation.tasks.values(),
    )
    folder.write_json("data.json", facts)
    cells = evaluation.cells()
    matrix = section.matrix
    work = CellWork(evaluation, out / "cells", out / "features")

    def ended(outcome: Outcome) -> None:
        track(outcome, work.folder, tracker, parent)
        if not outcome.problem:
            # A resumed run loads nothing for a finished cell any more.
            notes = read_notes(work.folder, outcome.cell)
            folder.note_inits({outcome.cell.init: notes.init_report})

    left = set(unfinished(work.folder, cells))
    for cell in cells:  # a run that was killed may have left some out of the journal
        if cell not in left and not tracker.finished(run_name(cell)):
            ended(Outcome(cell))
    try:
        failed = run_cells(
            in_turn(cells, evaluation.shared),
            work.folder,
            work,
            EXECUTORS.build(matrix.executor_for(evaluation.device.type, len(left))),
            ended,
            lambda done, total, note: progress("transfer", done, total, note),
        )
    finally:
        if not unfinished(work.folder, cells):
            shutil.rmtree(work.feature_folder, ignore_errors=True)
    write_failures(out / FAILURES_FILE, failed)
    baselines.run(evaluation, out)
    kept = comparable(cells, work.folder) if failed else cells
    if len({cell.init for cell in kept}) < 2:
        raise too_many_failed(failed, len(cells))
    predictions = collect(work.folder, kept)
    atomic_write(out / "predictions.parquet", predictions.to_parquet)
    return failed


def write_failures(path: Path, failed: Sequence[Outcome]) -> None:
    """List the cells that failed, and why; no file where none has."""
    if not failed:
        path.unlink(missing_ok=True)
        return
    rows = [{**asdict(outcome.cell), "problem": outcome.problem} for outcome in failed]
    atomic_write(path, pd.DataFrame(rows).to_csv(index=False))


def raise_failures(failed: Sequence[Outcome], num_cells: int) -> None:
    """Tell of cells that failed, after everything that can be done without them.

    Raises:
        MachineError: some have.
    """
    if failed:
        raise MachineError(
            f"{len(failed)} of {num_cells} cells failed and are not in the report; {FAILURES_FILE} "
            f"lists them. The first, {failed[0].cell.key}: {failed[0].problem} Start the same "
            "command again: the others are kept, and these run again."
        )


def too_many_failed(failed: Sequence[Outcome], num_cells: int) -> MachineError:
    """Return the error of a matrix of which nothing is left to compare."""
    return MachineError(
        f"{len(failed)} of {num_cells} cells failed, and nothing is left to compare; "
        f"{FAILURES_FILE} lists them. The first, {failed[0].cell.key}: {failed[0].problem}"
    )
