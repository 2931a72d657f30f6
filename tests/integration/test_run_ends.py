"""Ten ways for a run to end, in processes of their own, and what MLflow then says.

Each child logs as a study does: a study, its pretraining, and a cell that ended well.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medssl.tracking.base import Tracker, TrackingConfig, sync

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    # MLflow's own tables use a loader that SQLAlchemy 2.1 calls deprecated.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

CHILD = """
import signal, sys, time
from pathlib import Path
from medssl import errors
from medssl.tracking.base import Tracker, TrackingConfig
from medssl.training.interruption import TimeUp

def terminate(*_):
    raise errors.Terminated

signal.signal(signal.SIGTERM, terminate)
signal.signal(signal.SIGINT, signal.default_int_handler)
folder, how, uri = Path(sys.argv[1]), sys.argv[2], sys.argv[3] or None

def fill_the_disk():
    with (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))

def end_inside(run):
    if how == "exception":
        raise RuntimeError("of DOE^JOHN")
    if how == "diverged":
        raise errors.DivergedError("the loss is not finite")
    if how == "time limit":
        raise TimeUp
    if how == "out of memory":
        raise MemoryError
    if how == "disk full":
        try:
            fill_the_disk()
        except OSError:
            pass
        for step in range(3, 100000):
            run.log(step, {"loss": 1.0})
    if how in ("Ctrl-C", "SIGTERM", "kill -9"):
        (folder / "ready").touch()
        for step in range(3, 100000):
            run.log(step, {"loss": 1.0})
            time.sleep(0.01)

with Tracker(folder, TrackingConfig(uri=uri, flush_seconds=0.1)) as tracker:
    with tracker.run("study") as study:
        with tracker.run("cell/done", parent="study") as cell:
            cell.log(0, {"seconds": 1.0})
        if how == "exception in a cell":
            try:
                with tracker.run("cell/failed", parent="study"):
                    raise errors.DataError("of DOE^JOHN")
            except errors.DataError:
                pass
        with tracker.run("pretrain/rotation", parent="study") as run:
            for step in range(3):
                run.log(step, {"loss": 1.0})
            end_inside(run)
"""

OK, BAD, STOPPED = "FINISHED", "FAILED", "KILLED"
ENDS = {
    "success": (OK, "completion"),
    "exception": (BAD, "RuntimeError"),
    "exception in a cell": (OK, "completion"),
    "Ctrl-C": (STOPPED, "KeyboardInterrupt"),
    "SIGTERM": (STOPPED, "Terminated"),
    "time limit": (STOPPED, "TimeUp"),
    "diverged": (BAD, "DivergedError"),
    "out of memory": (BAD, "MemoryError"),
    "kill -9": (STOPPED, "no word"),
    "power cut": (STOPPED, "no word"),
    "server dead": (OK, "completion"),
    "disk full": (BAD, "MachineError"),
}
SIGNALS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM, "kill -9": signal.SIGKILL}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with tables and no runs."""
    folder = tmp_path_factory.mktemp("store") / "study"
    Tracker(folder, TrackingConfig(experiment="other")).close()
    return folder.parent / "mlflow.db"


@pytest.fixture
def place(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def small_disk(place: Path):
    """A disk of 1 MiB, for the run folder alone."""
    disk = place / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def start(folder: Path, how: str, uri: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD, str(folder), how, uri]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def said(database: Path) -> dict[str, tuple[str, str]]:
    """Return (status, ended_by) of each run by its name."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("medssl")
    found = client.search_runs([experiment.experiment_id]) if experiment else []
    assert len({run.info.run_name for run in found}) == len(found)
    ends = {run.info.run_name: run for run in found}
    return {
        name: (run.info.status, run.data.tags.get("ended_by", "")) for name, run in ends.items()
    }


def end_by(how: str, folder: Path, uri: str) -> None:
    """Let a child log into the folder and end in the given way."""
    process = start(folder, "kill -9" if how == "power cut" else how, uri)
    if how in SIGNALS or how == "power cut":
        limit = time.monotonic() + 120
        while not (folder / "ready").exists():
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.02)
        time.sleep(1.0)  # some of it is delivered, some is not
        process.send_signal(SIGNALS.get(how, signal.SIGKILL))
    process.wait(timeout=240)
    if how == "power cut":
        with (folder / "journal.jsonl").open("ab") as journal:
            journal.write(b'{"seq": 999999, "time": 1, "ru')  # the disk took half a line


@pytest.mark.parametrize("how", ENDS)
def test_mlflow_says_how_a_run_ended(
    how: str, place: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / "study"
    store = f"sqlite:///{place / 'mlflow.db'}"
    uri = store
    if how == "disk full":
        folder = request.getfixturevalue("small_disk") / "study"
    if how == "server dead":
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
    end_by(how, folder, uri)
    if how == "disk full":
        (folder / "filler").unlink()
    if how in ("kill -9", "power cut", "server dead"):  # found by whoever comes next
        report = sync(folder, TrackingConfig(uri=store))
        assert (report.undelivered, report.refused, report.problem) == (0, 0, "")
    found = said(place / "mlflow.db")
    assert found["study"] == found["pretrain/rotation"] == ENDS[how]
    assert found["cell/done"] == (OK, "completion")
    if how == "exception in a cell":
        assert found["cell/failed"] == (BAD, "DataError")
    with capsys.disabled():
        print(f"\n{how}: {found}")


def test_the_next_start_tells_of_runs_that_it_does_not_go_on_with(place: Path) -> None:
    folder = place / "study"
    end_by("power cut", folder, "")
    with (
        Tracker(folder, TrackingConfig(flush_seconds=0.1)) as tracker,
        tracker.run("study"),
        tracker.run("pretrain/jigsaw", parent="study"),
    ):
        limit = time.monotonic() + 120
        while said(place / "mlflow.db").get("pretrain/jigsaw", ("",))[0] != "RUNNING":
            assert time.monotonic() < limit
            time.sleep(0.2)
        now = said(place / "mlflow.db")
        assert now["study"] == ("RUNNING", "not yet, after a restart")
        assert now["pretrain/rotation"] == (STOPPED, "no word")
    assert said(place / "mlflow.db") == {
        "study": (OK, "completion"),
        "pretrain/jigsaw": (OK, "completion"),
        "pretrain/rotation": (STOPPED, "no word"),
        "cell/done": (OK, "completion"),
    }
