"""The tracker with MLflow switched off: what the journal holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medssl.config import validate_config
from medssl.errors import AbandonedError, ConfigError, DataError, MachineError, Terminated
from medssl.tracking.base import Tracker, TrackingConfig, flatten, sync
from medssl.tracking.journal import JOURNAL_NAME, read_journal

OFF = TrackingConfig(mlflow=False)


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record, _ in read_journal(folder / JOURNAL_NAME) if record["kind"] == kind]


def test_a_resumed_run_never_doubles_a_point(tmp_path: Path) -> None:
    with Tracker(tmp_path, OFF) as tracker, tracker.run("pretrain/rotation") as run:
        for step in range(5):
            run.log(step, {"loss": 1.0})
    with Tracker(tmp_path, OFF) as tracker, tracker.run("pretrain/rotation") as run:
        assert run.last_step("loss") == 4
        for step in range(3, 8):
            run.log(step, {"loss": 1.0, "new": 2.0})
    points = [
        (record["step"], key) for record in records(tmp_path, "metrics") for key in record["values"]
    ]
    assert sorted(step for step, key in points if key == "loss") == list(range(8))
    assert sorted(step for step, key in points if key == "new") == list(range(3, 8))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (ValueError("DOE^JOHN"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (Terminated(), "KILLED"),
        (AbandonedError("another process ended"), "KILLED"),
    ],
)
def test_the_journal_says_how_a_run_ended(tmp_path: Path, error, status: str) -> None:
    def body() -> None:
        with Tracker(tmp_path, OFF) as tracker, tracker.run("study"):
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(type(error)):
            body()
    assert [record["status"] for record in records(tmp_path, "end")] == [status]
    assert "DOE" not in (tmp_path / JOURNAL_NAME).read_text()


def test_a_run_left_outside_with_is_not_called_finished(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, OFF)
    tracker.run("study").__enter__()
    tracker.close()
    assert records(tmp_path, "end")[0]["status"] == "KILLED"


def test_a_parameter_that_a_resumed_run_changes_becomes_a_tag(tmp_path: Path) -> None:
    for steps in (10, 20):
        params = {"training": {"steps": steps, "rate": 0.1}}
        with Tracker(tmp_path, OFF) as tracker, tracker.run("study", params=params):
            pass
    assert [record["values"] for record in records(tmp_path, "params")] == [
        {"training.steps": 10, "training.rate": 0.1}
    ]
    assert records(tmp_path, "tags")[0]["values"] == {"changed.training.steps": 20}


def test_artifacts_are_named_relative_to_the_run_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Tracker(folder, OFF) as tracker, tracker.run("study") as run:
        (folder / "checkpoints").mkdir()
        run.artifact(folder / "checkpoints")
        with pytest.raises(ValueError, match="not a file or folder inside the run folder"):
            run.artifact(tmp_path / "elsewhere.txt")
    assert records(folder, "artifact")[0]["path"] == "checkpoints"


def test_a_child_needs_a_parent_that_was_started(tmp_path: Path) -> None:
    refused = pytest.raises(ValueError, match="its parent 'study' has not been started")
    with Tracker(tmp_path, OFF) as tracker, refused:
        tracker.run("cell", parent="study")


def test_nested_settings_become_dotted_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None}) == {
        "a.b.c": 1,
        "a.d": [1, 2],
        "e": None,
    }


def test_a_failure_to_open_the_journal_leaves_the_folder_unlocked(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).mkdir()
    for _ in range(2):
        with pytest.raises((OSError, MachineError)):
            Tracker(tmp_path, OFF)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("https://me:secret@mlflow.example", "a password does not belong into a config file"),
        ("file:///srv/mlruns", "keeps no runs in plain folders"),
        ("mlruns", "keeps no runs in plain folders"),
    ],
)
def test_addresses_that_cannot_serve_are_refused(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_config({"uri": uri}, TrackingConfig)


def test_sync_of_a_folder_without_a_journal_says_which_folder_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no journal.jsonl in it. Give the folder that a study"):
        sync(tmp_path)
