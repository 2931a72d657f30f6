"""One evaluation and its cells: what they share, how one is run in any process, and tracked."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medssl.config import ComponentConfig
from medssl.downstream.base import DownstreamTask
from medssl.evaluation.matrix import (
    CellNotes,
    Outcome,
    attempt,
    read_notes,
    write_cell,
)
from medssl.evaluation.protocols import PROTOCOLS
from medssl.evaluation.protocols.base import Cell, Setting
from medssl.models.backbones.base import Backbone
from medssl.models.build import build_backbone
from medssl.models.inits import INITS
from medssl.models.inits.base import LoadReport
from medssl.pipelines.contract import image_contract
from medssl.pipelines.labels import init_tags
from medssl.pipelines.sections import EvaluationSection, SamplingConfig
from medssl.randomness import derive_seed
from medssl.scans.index import Index
from medssl.scans.splits import Splits
from medssl.scans.store import Store
from medssl.tracking.base import RunHandle, Tracker

log = logging.getLogger(__name__)


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

    def cells(self) -> list[Cell]:
        """Return the cells of the matrix, in the order in which they run."""
        return self.section.cells(self.tasks, self.inits, len(self.splits.train))

    def metrics(self) -> dict[str, str]:
        """Return the primary metric of each task."""
        return {label: task.metric for label, task in self.tasks.items()}

    def new_backbone(self, init: str, seed: int) -> tuple[Backbone, LoadReport]:
        """Return a fresh backbone with an init's weights, under the study's contract."""
        request = self.sampling.request()
        return build_backbone(
            self.backbone,
            self.inits[init],
            in_channels=request.in_channels,
            seed=derive_seed(self.seed, "init", seed),
            expected=image_contract(self.store, request),
        )

    def setting(self, task: str, init: str, feature_folder: Path | None = None) -> Setting:
        """Return what the cells of one task and init share."""
        return Setting(
            task=self.tasks[task],
            store=self.store,
            request=self.sampling.request(),
            splits=self.splits,
            init=init,
            make_backbone=functools.partial(self.new_backbone, init),
            seed=self.seed,
            device=self.device,
            seeded_init=self._is_seeded(init),
            feature_scans=self.feature_scans(task),
            feature_folder=feature_folder,
            apply_decoder=INITS.build(self.inits[init], {}).apply_decoder,
        )

    def feature_scans(self, task: str) -> list[str]:
        """Return the scans whose features a task shares: its own, or those of all pooled tasks."""
        sharing = [self.tasks[task]]
        if not self.tasks[task].dense:
            sharing = [other for other in self.tasks.values() if not other.dense]
        wanted = {key for other in sharing for key in other.targets}
        patients = {*self.splits.train, *self.splits.val, *self.splits.test}
        return [
            key
            for key in self.store.scan_keys
            if key in wanted and self.store.listed(key).patient_key in patients
        ]

    def shared(self, cell: Cell) -> tuple[str, str, int]:
        """Return what cells have in common that use the same features."""
        task = cell.task if self.tasks[cell.task].dense else ""
        return task, cell.init, cell.seed if self._is_seeded(cell.init) else 0

    def _is_seeded(self, init: str) -> bool:
        return self.inits[init].name == "random"


class CellWork:
    """Runs one cell, in this process or in a worker, and writes its file.

    Args:
        evaluation: what all cells share; goes to each worker once.
        folder: of finished cells.
        feature_folder: of features that processes share.
    """

    def __init__(self, evaluation: Evaluation, folder: Path, feature_folder: Path) -> None:
        self.evaluation = evaluation
        self.folder, self.feature_folder = folder.absolute(), feature_folder.absolute()
        self._setting: tuple[tuple[Any, ...], Setting] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_setting": None}

    def __call__(self, cell: Cell) -> Outcome:
        """Run a cell; what goes wrong is told in the outcome."""
        return attempt(self._run, cell)

    def _run(self, cell: Cell) -> None:
        begun = time.perf_counter()
        notes = CellNotes()
        evaluation = self.evaluation
        configs = {protocol.name: protocol for protocol in evaluation.section.protocols}
        with _threads(evaluation), _listening() as warnings:
            setting = self.setting(cell)
            predictions = PROTOCOLS.build(configs[cell.protocol]).run(
                cell, setting, lambda step, values: notes.metrics.append((step, dict(values)))
            )
        notes.init_report, notes.init_text = setting.report, setting.report_text
        notes.warnings = list(dict.fromkeys(warnings))
        notes.seconds = time.perf_counter() - begun
        write_cell(
            self.folder, cell, predictions, setting,
            pretext=evaluation.pretexts[cell.init], backbone=evaluation.backbone.name, notes=notes,
        )  # fmt: skip

    def setting(self, cell: Cell) -> Setting:
        """Return the setting of a cell; the last one's is kept, with one backbone's features."""
        wanted = (cell.task, *self.evaluation.shared(cell))
        if self._setting is None or self._setting[0] != wanted:
            self._setting = None  # its features are let go first
            setting = self.evaluation.setting(cell.task, cell.init, self.feature_folder)
            self._setting = wanted, setting
        return self._setting[1]


@contextmanager
def _threads(evaluation: Evaluation) -> Iterator[None]:
    """Compute with the configured number of threads, whatever the process had before."""
    before = torch.get_num_threads()
    if evaluation.device.type == "cpu":
        torch.set_num_threads(evaluation.section.matrix.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Listener(logging.Handler):
    """Keeps the text of this thread's warnings; those of others (tracking) go on as ever."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._texts, self._thread = texts, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self._texts.append(record.getMessage())
        else:
            logging.getLogger().handle(record)


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Collect warnings instead of printing them: a worker's would be lost. `track` tells them."""
    texts: list[str] = []
    ours, listener = logging.getLogger("medssl"), _Listener(texts)
    before = ours.propagate
    ours.addHandler(listener)
    ours.propagate = False
    try:
        yield texts
    finally:
        ours.propagate = before
        ours.removeHandler(listener)


def run_name(cell: Cell) -> str:
    """Return the name of a cell's run in the journal."""
    return f"cell/{cell.key}"


def track(outcome: Outcome, folder: Path, tracker: Tracker, parent: RunHandle) -> None:
    """Write into the journal what a cell logged and warned of, or that it failed.

    Texts that may name a file or a column (``problem, warnings, init_report``) stay there.
    """
    cell = outcome.cell
    params = {
        "init": cell.init,
        "task": cell.task,
        "protocol": cell.protocol,
        "num_labelled_patients": cell.num_labelled_patients,
        "seed": cell.seed,
    }
    with (
        contextlib.suppress(CellFailed),
        tracker.run(run_name(cell), parent=parent.name, params=params) as handle,
    ):
        if outcome.problem:
            handle.tag("problem", outcome.problem)
            handle.tag("problem_kind", outcome.kind)
            raise CellFailed
        notes = read_notes(folder, cell)
        for step, values in notes.metrics:
            handle.log(step, values)
        handle.log(0, {"seconds": notes.seconds})
        handle.tag("init_report", notes.init_text)
        for key, value in init_tags(notes.init_report).items():
            handle.tag(key, value)
        if notes.warnings:
            handle.tag("num_warnings", len(notes.warnings))
            handle.tag("warnings", "\n".join(notes.warnings))
            log.warning("%s: %s", cell.key, " ".join(notes.warnings))


class CellFailed(Exception):  # noqa: N818  (ends a run of the journal as FAILED, no more)
    """A cell failed."""
