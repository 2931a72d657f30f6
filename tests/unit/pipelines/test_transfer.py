"""The transfer matrix as a run: what is kept of it when it is killed."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from evaluations import make_evaluation
from medssl.config import validate_config
from medssl.errors import ConfigError, MachineError
from medssl.evaluation.matrix import Outcome, in_turn, unfinished
from medssl.evaluation.protocols import PROTOCOLS
from medssl.evaluation.statistics.families import NO_DIFFERENCE, NOT_WORSE
from medssl.executors.local import Config as LocalConfig
from medssl.pipelines.cells import CellWork, Evaluation, run_name
from medssl.pipelines.compare import tabulate
from medssl.pipelines.run_folder import RunFolder
from medssl.pipelines.sections import StatisticsConfig
from medssl.pipelines.study import StudyConfig
from medssl.pipelines.transfer import FAILURES_FILE, evaluate, raise_failures
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
    matrix = whole["matrix"] | {"executor": {"name": "local", "num_workers": 0}}
    return make_evaluation(place, tasks=[table], protocols=[probe], matrix=matrix)


def start(evaluation: Evaluation, out: Path, kill_after: int | None = None) -> list[Outcome]:
    """Run the matrix as a new process would; dies after so many cells."""

    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        if done == kill_after and note:
            raise Killed

    with Tracker(out, TrackingConfig(mlflow=False)) as tracker, tracker.run("transfer") as handle:
        folder = RunFolder(out, evaluation.section, "medssl transfer")
        return evaluate(evaluation, out, tracker, handle, folder, progress)


def noted(out: Path) -> dict[str, Any]:
    return json.loads((out / "provenance.json").read_text())["inits"]


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_a_killed_run_keeps_what_was_loaded_for_the_cells_it_finished(
    evaluation, tmp_path, finished
):
    cells = in_turn(evaluation.cells(), evaluation.shared)
    with pytest.raises(Killed):
        start(evaluation, tmp_path, kill_after=finished)
    assert len(unfinished(tmp_path / "cells", cells)) == len(cells) - finished
    assert set(noted(tmp_path)) == {cell.init for cell in cells[:finished]}
    start(evaluation, tmp_path)
    assert set(noted(tmp_path)) == {cell.init for cell in cells} == {"random", "other"}
    assert not (tmp_path / "features").exists()
    shown = {row["init"]: row["source"] for row in init_rows(read_contents(tmp_path))}
    assert shown == {"random": "random", "other": "random"}


def test_features_are_computed_once_however_often_a_run_is_killed(evaluation, tmp_path):
    with pytest.raises(Killed):
        start(evaluation, tmp_path, kill_after=1)
    before = {path.name: path.stat().st_mtime_ns for path in kept_features(tmp_path)}
    assert before
    with pytest.raises(Killed):
        start(evaluation, tmp_path, kill_after=3)
    after = {path.name: path.stat().st_mtime_ns for path in kept_features(tmp_path)}
    assert after.items() >= before.items()


def kept_features(out: Path) -> list[Path]:
    return sorted((out / "features").glob("*.safetensors"))


def test_a_damaged_file_of_features_is_computed_anew(evaluation, tmp_path):
    with pytest.raises(Killed):
        start(evaluation, tmp_path / "damaged", kill_after=1)
    for path in kept_features(tmp_path / "damaged"):
        path.write_bytes(path.read_bytes()[:-40])
    for name in ("damaged", "whole"):
        start(evaluation, tmp_path / name)
    assert_same_predictions(tmp_path / "damaged", tmp_path / "whole")


def assert_same_predictions(first: Path, second: Path) -> None:
    tables = [pd.read_parquet(out / "predictions.parquet") for out in (first, second)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_worker_processes_give_the_same_predictions(evaluation, tmp_path):
    start(evaluation, tmp_path / "here")
    matrix = evaluation.section.matrix.model_copy(update={"executor": LocalConfig(num_workers=2)})
    section = evaluation.section.model_copy(update={"matrix": matrix})
    start(dataclasses.replace(evaluation, section=section), tmp_path / "workers")
    assert_same_predictions(tmp_path / "here", tmp_path / "workers")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_a_cell_warns_of_is_told_whichever_process_ran_it(
    evaluation, tmp_path, caplog, num_workers
):
    section = evaluation.section
    (probe,) = section.protocols
    changed = section.model_copy(
        update={
            "protocols": (probe.model_copy(update={"max_steps": 1}),),
            "matrix": section.matrix.model_copy(
                update={"executor": LocalConfig(num_workers=num_workers)}
            ),
        }
    )
    hasty = dataclasses.replace(evaluation, section=changed)
    start(hasty, tmp_path)
    told = [text for text in caplog.messages if "had not converged after 1 steps" in text]
    assert {text.partition(": ")[0] for text in told} == {cell.key for cell in hasty.cells()}
    assert "had not converged" in (tmp_path / "journal.jsonl").read_text()


def test_a_cell_that_failed_is_listed_and_runs_again_at_the_next_start(
    evaluation, tmp_path, monkeypatch
):
    bad = next(cell for cell in evaluation.cells() if cell.init == "other")
    run_one = CellWork._run

    def fail(self: CellWork, cell: Any) -> None:
        if cell == bad:
            raise ZeroDivisionError
        run_one(self, cell)

    monkeypatch.setattr(CellWork, "_run", fail)
    (failed,) = start(evaluation, tmp_path)
    assert failed.cell == bad
    listed = pd.read_csv(tmp_path / FAILURES_FILE)
    assert list(listed["init"]) == ["other"]
    assert (
        len(pd.read_parquet(tmp_path / "predictions.parquet")["num_labelled_patients"].unique())
        == 1
    )
    told = rf"1 of 4 cells failed .* {bad.key}: ZeroDivisionError"
    with pytest.raises(MachineError, match=told):
        raise_failures([failed], 4)
    monkeypatch.undo()
    assert start(evaluation, tmp_path) == []
    assert not (tmp_path / FAILURES_FILE).exists()
    assert (
        len(pd.read_parquet(tmp_path / "predictions.parquet")["num_labelled_patients"].unique())
        == 2
    )


def test_a_finished_cell_that_the_journal_lacks_is_told_to_it_later(evaluation, tmp_path):
    start(evaluation, tmp_path)
    journal = tmp_path / "journal.jsonl"
    last = evaluation.cells()[-1]
    lines = [line for line in journal.read_text().splitlines(True) if run_name(last) not in line]
    journal.write_text("".join(lines))
    start(evaluation, tmp_path)
    told = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    (end,) = [
        record for record in told if (record["run"], record["kind"]) == (run_name(last), "end")
    ]
    assert end["status"] == "FINISHED"


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
        f"task segmentation can be paired with nothing here ({protocol} for segmentation: {why}). "
        "Leave it out, or add what suits it"
    ) in str(refused.value)


def test_a_pair_of_task_and_protocol_that_makes_no_sense_is_left_out_of_the_matrix():
    config = validate_config(settings(Path("unused"), protocols=["knn", "fine_tune"]), StudyConfig)
    cells = config.cells(["segmentation", "classification"], ["random"], 10)
    assert {(cell.task, cell.protocol) for cell in cells} == {
        ("segmentation", "fine_tune"), ("classification", "fine_tune"), ("classification", "knn"),
    }  # fmt: skip
    assert config.unfit().keys() == {("segmentation", "knn")}


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


def test_the_same_weights_under_two_names_show_no_difference(evaluation: Evaluation, tmp_path):
    start(evaluation, tmp_path)  # both inits are random weights of the same seeds
    statistics = StatisticsConfig(reference="random", num_resamples=500)
    predictions = pd.read_parquet(tmp_path / "predictions.parquet")
    table = tabulate(tmp_path, predictions, statistics, evaluation.metrics())
    assert len(table) == 2
    assert set(table["effect"]) == {0.0}
    assert set(table["verdict"]) <= {NO_DIFFERENCE, NOT_WORSE}
