"""The transfer matrix as a run: what is kept of it when it is killed."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from evaluations import make_evaluation
from medssl.evaluation.matrix import unfinished
from medssl.pipelines.run_folder import RunFolder
from medssl.pipelines.transfer import Evaluation, evaluate
from medssl.reports.contents import read_contents
from medssl.reports.facts import init_rows
from medssl.tracking.base import Tracker, TrackingConfig
from studies import settings


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Return an evaluation of four cells, two of each init."""
    whole = settings(Path("unused"))
    (table,) = [task for task in whole["tasks"] if task["name"] == "classification"]
    place = tmp_path_factory.mktemp("transfer")
    table["table"] = str(place / "archive" / "labels.csv")
    (probe,) = [item for item in whole["protocols"] if item["name"] == "linear_probe"]
    return make_evaluation(place, tasks=[table], protocols=[probe])


def start(evaluation: Evaluation, out: Path, kill_before: int | None = None) -> None:
    """Run the matrix as a new process would; dies before the cell of that number."""
    fresh = dataclasses.replace(evaluation, reports={})

    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        if done == kill_before and note:
            raise Killed

    with Tracker(out, TrackingConfig(mlflow=False)) as tracker, tracker.run("transfer") as handle:
        folder = RunFolder(out, fresh.section, "medssl transfer")
        evaluate(fresh, out, tracker, handle, folder, progress)


def noted(out: Path) -> dict[str, Any]:
    return json.loads((out / "provenance.json").read_text())["inits"]


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_a_killed_run_keeps_what_was_loaded_for_the_cells_it_finished(
    evaluation, tmp_path, finished
):
    cells = evaluation.cells()
    with pytest.raises(Killed):
        start(evaluation, tmp_path, kill_before=finished)
    assert len(unfinished(tmp_path / "cells", cells)) == len(cells) - finished
    assert set(noted(tmp_path)) == {cell.init for cell in cells[:finished]}
    start(evaluation, tmp_path)
    assert set(noted(tmp_path)) == {cell.init for cell in cells} == {"random", "other"}
    shown = {row["init"]: row["source"] for row in init_rows(read_contents(tmp_path))}
    assert shown == {"random": "random", "other": "random"}


def test_the_facts_of_a_run_say_what_did_not_fit_between_labels_and_scans(evaluation, tmp_path):
    (task,) = evaluation.tasks.values()
    given = dataclasses.replace(task.labels, counts={}, keys={})
    given.note("rows_without_scan", 2)
    relabelled = copy.copy(task)
    relabelled.labels = given
    start(dataclasses.replace(evaluation, tasks={task.name: relabelled}), tmp_path)
    facts = json.loads((tmp_path / "data.json").read_text())
    found = facts["labels"]["classification"]
    assert (found["given"], found["labelled"]) == (10, 10)
    assert found["mismatches"]["rows_without_scan"]["count"] == 2
