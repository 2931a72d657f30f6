"""The transfer matrix as a run: what is kept of it when it is killed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from evaluations import make_evaluation
from medssl.config import validate_config
from medssl.errors import ConfigError
from medssl.evaluation.matrix import unfinished
from medssl.evaluation.protocols import PROTOCOLS
from medssl.pipelines.run_folder import RunFolder
from medssl.pipelines.study import StudyConfig
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


@pytest.mark.parametrize(
    ("protocol", "why"),
    [
        ("knn", "it compares whole scans, and this task asks about voxels"),
        ("svm_map", "it separates whole scans, and this task asks about voxels"),
        ("low_shot", "it counts labelled scans a class, and this task gives a scan no class"),
    ],
)
def test_a_protocol_that_does_not_suit_a_task_is_refused_with_the_config(protocol: str, why: str):
    content = settings(Path("unused"), protocols=[protocol])
    with pytest.raises(ConfigError) as refused:
        validate_config(content, StudyConfig)
    assert (
        f"protocol {protocol} does not suit task segmentation: {why}. Leave one of them out, or "
        "give the task a study of its own"
    ) in str(refused.value)


def test_every_protocol_suits_a_classification_and_tells_its_budget():
    content = settings(Path("unused"), protocols=[*PROTOCOLS.names()])
    (content["tasks"],) = [[task] for task in content["tasks"] if task["name"] == "classification"]
    budgets = validate_config(content, StudyConfig).budgets()
    assert budgets.keys() == {"fine_tune", "knn", "linear_probe", "low_shot", "svm_map"}
    assert budgets["fine_tune"] == "1 training of 300 steps"
    assert budgets["low_shot"] == "once an init: 5 draws x 8 sizes"


def test_cells_of_a_protocol_without_label_fractions_are_one_an_init(evaluation: Evaluation):
    section = evaluation.section.model_copy(
        update={"protocols": (PROTOCOLS.config_class("low_shot")(),)}
    )
    cells = dataclasses.replace(evaluation, section=section).cells()
    assert [(cell.init, cell.label_fraction) for cell in cells] == [("other", 1), ("random", 1)]
