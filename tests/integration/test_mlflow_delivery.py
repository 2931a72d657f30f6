"""The journal's way into a real MLflow store: sqlite, a dead server, a killed process."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from medssl.errors import MachineError, Terminated
from medssl.tracking import mlflow as delivery_module
from medssl.tracking.base import Tracker, TrackingConfig, sync

QUICK = TrackingConfig(flush_seconds=0.1)

# MLflow's own tables use a loader that SQLAlchemy 2.1 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_server_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with tables and no runs; making one takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("store") / "study"
    Tracker(folder, TrackingConfig(experiment="other")).close()
    return folder.parent / "mlflow.db"


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path) -> Path:
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs" / "mlflow.db")
    return tmp_path / "runs" / "study"


def client(folder: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'mlflow.db'}")


def runs(folder: Path) -> dict[str, Any]:
    store = client(folder)
    experiment = store.get_experiment_by_name("medssl")
    found = store.search_runs([experiment.experiment_id])
    names = Counter(run.info.run_name for run in found)
    assert max(names.values()) == 1, f"a run exists twice: {names}"
    return {run.info.run_name: run for run in found}


def steps(folder: Path, run: Any, metric: str) -> list[int]:
    history = client(folder).get_metric_history(run.info.run_id, metric)
    return sorted(point.step for point in history)


def write_study(folder: Path, config: TrackingConfig) -> float:
    """Log a small study; return the longest time one call took, in s."""
    longest = 0.0
    with Tracker(folder, config) as tracker, tracker.run("study", params={"seed": 1}) as study:
        (folder / "config.public.yaml").write_text("seed: 1\n")
        study.artifact(folder / "config.public.yaml")
        with tracker.run("pretrain/rotation", parent="study", tags={"pretext": "rotation"}) as run:
            for step in range(100):
                started = time.monotonic()
                run.log(step, {"train/loss": 1 / (step + 1)})
                longest = max(longest, time.monotonic() - started)
            checkpoint = folder / "checkpoints" / "rotation"
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / "contract.json").write_text("{}")
            (checkpoint / "state.pt").write_text("for going on, and for nobody else")
            run.artifact(checkpoint)
    return longest


def test_a_study_arrives_whole(folder: Path) -> None:
    write_study(folder, QUICK)
    found = runs(folder)
    study, pretrain = found["study"], found["pretrain/rotation"]
    assert study.data.params == {"seed": "1"}
    assert pretrain.data.tags["mlflow.parentRunId"] == study.info.run_id
    assert pretrain.data.tags["pretext"] == "rotation"
    assert steps(folder, pretrain, "train/loss") == list(range(100))
    store = client(folder)
    assert [item.path for item in store.list_artifacts(study.info.run_id)] == ["config.public.yaml"]
    inside = store.list_artifacts(pretrain.info.run_id, "checkpoints/rotation")
    assert [item.path for item in inside] == ["checkpoints/rotation/contract.json"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (ValueError("boom"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (Terminated(), "KILLED"),
    ],
)
def test_the_status_is_right_after(folder: Path, error, status: str) -> None:
    def body() -> None:
        with (
            Tracker(folder, QUICK) as tracker,
            tracker.run("study"),
            tracker.run("cell", parent="study") as cell,
        ):
            cell.log(0, {"loss": 1.0})
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(type(error)):
            body()
    assert {name: run.info.status for name, run in runs(folder).items()} == {
        "study": status,
        "cell": status,
    }


def test_tables_half_made_by_a_killed_process_are_made_anew(folder: Path) -> None:
    database = folder.parent / "mlflow.db"
    database.unlink(missing_ok=True)
    with closing(sqlite3.connect(database.with_name(".mlflow.db.part"))) as half:
        half.execute("CREATE TABLE mcp_servers (name TEXT)")
        half.commit()
    with Tracker(folder, QUICK) as tracker, tracker.run("study") as run:
        run.log(1, {"loss": 0.5})
    assert runs(folder)["study"].data.metrics == {"loss": 0.5}
    assert sorted(path.name for path in folder.parent.glob("*mlflow.db*")) == [
        "mlflow.db",
        "mlflow.db.lock",
    ]


def test_no_account_path_or_source_reaches_tags_and_params(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "jdoe")
    monkeypatch.setattr(sys, "argv", ["/srv/programs/train-everything.py"])
    params = {"index": str(folder), "by": "jdoe", "init": {"path": "secret.pth"}}
    tags = {"mlflow.user": "jdoe", "note": sys.argv[0]}
    with Tracker(folder, QUICK) as tracker, tracker.run("study", params=params, tags=tags):
        pass
    run = runs(folder)["study"]
    said = f"{run.data.tags} {run.data.params} {run.info.user_id}"
    for secret in ("jdoe", str(folder), "secret.pth", sys.argv[0], "mlflow.source", "mlflow.user"):
        assert secret not in said


def test_values_that_are_not_finite_become_tags_not_points(folder: Path) -> None:
    with Tracker(folder, QUICK) as tracker, tracker.run("study") as run:
        for step, value in enumerate([1.0, float("inf"), float("nan")]):
            run.log(step, {"loss": value})
    study = runs(folder)["study"]
    assert steps(folder, study, "loss") == [0]
    assert study.data.tags["nonfinite.loss"] == "inf at step 1"


def test_a_dead_server_neither_slows_training_nor_holds_up_the_end(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    dead = TrackingConfig(uri=f"http://127.0.0.1:{port}", flush_seconds=0.05)
    tracker = Tracker(folder, dead)
    longest = 0.0
    with tracker.run("study") as run:
        for step in range(200):
            started = time.monotonic()
            run.log(step, {"loss": 1.0})
            longest = max(longest, time.monotonic() - started)
            time.sleep(0.002)
    started = time.monotonic()
    report = tracker.close()
    assert time.monotonic() - started <= 5
    assert longest < 0.25
    assert report.undelivered == 202
    assert report.delivered == 0
    assert "202 records are not in MLflow yet" in caplog.text
    assert "medssl sync" in caplog.text

    late = sync(folder, TrackingConfig())
    assert (late.delivered, late.undelivered, late.problem) == (202, 0, "")
    assert sync(folder, TrackingConfig()).delivered == 0
    study = runs(folder)["study"]
    assert steps(folder, study, "loss") == list(range(200))
    assert study.info.status == "FINISHED"


def test_a_server_that_hangs_does_not_hold_up_the_end(folder: Path) -> None:
    with socket.socket() as mute:  # accepts a connection and never answers
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        port = mute.getsockname()[1]
        tracker = Tracker(
            folder, TrackingConfig(uri=f"http://127.0.0.1:{port}", flush_seconds=0.05)
        )
        with tracker.run("study") as run:
            run.log(0, {"loss": 1.0})
            time.sleep(0.3)
        started = time.monotonic()
        assert tracker.close().undelivered == 3
        assert time.monotonic() - started <= 5


KILLED_STUDY = """
import sys, time
from pathlib import Path
from medssl.tracking.base import Tracker, TrackingConfig
folder = Path(sys.argv[1])
tracker = Tracker(folder, TrackingConfig(flush_seconds=0.05))
with tracker.run("study"), tracker.run("pretrain/rotation", parent="study") as run:
    for step in range(1_000_000):
        run.log(step, {"loss": 1.0 / (step + 1)})
        time.sleep(0.001)
"""


def test_a_killed_process_loses_nothing_and_its_resumption_doubles_nothing(folder: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED_STUDY, str(folder)])
    try:
        cursor = folder / "tracking.json"
        deadline = time.monotonic() + 60
        while not cursor.is_file() or "pretrain" not in cursor.read_text():
            assert time.monotonic() < deadline, "nothing was delivered within a minute"
            time.sleep(0.05)
        with pytest.raises(MachineError, match="another medssl process is using it"):
            sync(folder)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with (folder / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"seq": 99999, "time": 1, "ru')  # as if killed in the middle of a line

    report = sync(folder)
    assert report.undelivered == 0
    found = runs(folder)
    assert {run.info.status for run in found.values()} == {"KILLED"}
    logged = steps(folder, found["pretrain/rotation"], "loss")
    assert logged == list(range(len(logged)))

    with (
        Tracker(folder, QUICK) as tracker,
        tracker.run("study"),
        tracker.run("pretrain/rotation", parent="study") as run,
    ):
        for step in range(max(0, len(logged) - 10), len(logged) + 10):
            run.log(step, {"loss": 1.0 / (step + 1)})
    found = runs(folder)
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    again = steps(folder, found["pretrain/rotation"], "loss")
    assert again == list(range(len(logged) + 10))


def test_losing_the_cursor_doubles_nothing(folder: Path) -> None:
    write_study(folder, QUICK)
    (folder / "tracking.json").unlink()
    assert sync(folder).problem == ""
    found = runs(folder)
    assert steps(folder, found["pretrain/rotation"], "train/loss") == list(range(100))
    assert found["study"].info.status == "FINISHED"


def test_a_copied_run_folder_is_delivered_whole_elsewhere(
    folder: Path, tmp_path: Path, empty_store: Path
) -> None:
    write_study(folder, QUICK)
    other = tmp_path / "other" / "study"
    other.parent.mkdir()
    shutil.copy(empty_store, other.parent / "mlflow.db")
    subprocess.run(["cp", "-r", str(folder), str(other)], check=True)
    sync(other)
    assert steps(other, runs(other)["pretrain/rotation"], "train/loss") == list(range(100))


def test_a_deleted_store_is_filled_again(folder: Path) -> None:
    write_study(folder, QUICK)
    (folder.parent / "mlflow.db").unlink()
    assert sync(folder).undelivered == 0
    assert steps(folder, runs(folder)["pretrain/rotation"], "train/loss") == list(range(100))


def test_a_record_that_mlflow_refuses_does_not_hold_up_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
    from mlflow.tracking import MlflowClient

    real = MlflowClient.log_batch

    def picky(self, run_id, metrics=(), **rest):
        if any(metric.key == "cursed" for metric in metrics):
            raise MlflowException("no", INVALID_PARAMETER_VALUE)
        return real(self, run_id, metrics=metrics, **rest)

    monkeypatch.setattr(MlflowClient, "log_batch", picky)
    tracker = Tracker(folder, QUICK)
    with tracker.run("study") as run:
        run.log(0, {"good": 1.0, "cursed": 1.0, "fine": 2.0})
    report = tracker.close()
    assert (report.refused, report.undelivered) == (1, 0)
    assert runs(folder)["study"].data.metrics == {"good": 1.0, "fine": 2.0}


def test_an_address_from_the_environment_is_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'team' / 'mlflow.db'}")
    (folder.parent / "mlflow.db").unlink()
    write_study(folder, QUICK)
    assert (tmp_path / "team" / "mlflow.db").is_file()
    assert not (folder.parent / "mlflow.db").exists()


def test_the_client_is_told_not_to_phone_home(folder: Path) -> None:
    delivery_module.Delivery(folder, None, "medssl")
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_record_of_a_later_version_costs_its_run_no_point(folder: Path) -> None:
    with (
        Tracker(folder, TrackingConfig(flush_seconds=60)) as tracker,
        tracker.run("study", params={"seed": 3}) as run,
    ):
        run.log(1, {"loss": 0.5})
        tracker._journal.append("something new", "study", values={"what": 1})
        run.log(2, {"loss": 0.25})
    found = runs(folder)["study"]
    history = client(folder).get_metric_history(found.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.25)]
    assert found.data.params == {"seed": "3"}


def test_mlflow_receives_nothing_that_a_power_cut_could_take_from_the_journal(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError("the disk does not take it")

    with monkeypatch.context() as context:
        context.setattr(delivery_module, "settle", refuse)
        with Tracker(folder, QUICK) as tracker, tracker.run("study") as run:
            run.log(1, {"loss": 0.5})
        assert tracker.close().undelivered == 3
        store = client(folder)
        assert store.search_runs([e.experiment_id for e in store.search_experiments()]) == []
    assert sync(folder).undelivered == 0
    assert runs(folder)["study"].info.status == "FINISHED"
