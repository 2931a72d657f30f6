"""Four processes and a real MLflow server that is killed in the middle: nothing lost or doubled.

pytest tests/integration/test_mlflow_postgres.py -s    # prints how long training waited
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from medssl.tracking.base import TrackingConfig, sync
from mlflow_servers import PASSWORD, Server, postgres
from studies import environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    # MLflow's own tables use a loader that SQLAlchemy 2.1 calls deprecated.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

NUM_PROCESSES, NUM_STEPS = 4, 1200
METRICS = ("train/loss", "train/accuracy", "val/loss")
LOGIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD}

# A study with two pretrainings; in the middle of each it waits for a file, "go" and "back".
WRITER = f"""
import json, sys, time
from pathlib import Path
from medssl.tracking.base import Tracker, TrackingConfig
folder, uri, place = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
waited = []

def timed(call, *arguments, **more):
    started = time.monotonic()
    result = call(*arguments, **more)
    waited.append(time.monotonic() - started)
    return result

tracker = Tracker(folder, TrackingConfig(uri=uri, flush_seconds=0.2, system_seconds=1.0))
(folder / "config.public.yaml").write_text("seed: 1\\n")
study = tracker.run("study", params={{"seed": 1}})
timed(study.__enter__)
timed(study.artifact, folder / "config.public.yaml")
for label, signal in (("rotation", place / "go"), ("jigsaw", place / "back")):
    run = tracker.run("pretrain/" + label, parent="study", params={{"pretext": label}})
    timed(run.__enter__)
    checkpoint = folder / "checkpoints" / label
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "backbone.safetensors").write_bytes(bytes(4_000_000))
    for step in range({NUM_STEPS}):
        timed(run.log, step, {{name: 1 / (step + 1) for name in {METRICS!r}}})
        if step % 50 == 0:
            time.sleep(0.05)
        while step == {NUM_STEPS} // 2 and not signal.exists():
            time.sleep(0.05)
    timed(run.artifact, checkpoint)
    timed(run.__exit__, None, None, None)
timed(study.__exit__, None, None, None)
training, started = sum(waited), time.monotonic()
report = tracker.close()
print(json.dumps({{"waited_s": training, "longest_s": max(waited), "calls": len(waited),
                  "close_s": time.monotonic() - started, "undelivered": report.undelivered,
                  "refused": report.refused}}))
"""


def start(folder: Path, uri: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), uri, str(folder.parent)],
        env=environment(**LOGIN), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def wait_until(claim: Any, seconds: float = 240) -> None:
    limit = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < limit
        time.sleep(0.1)


def check_all_arrived(uri: str, num_processes: int) -> None:
    """Each run once, ended well, under its parent, with every point once and its files."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("medssl")
    found = client.search_runs([experiment.experiment_id])
    names = sorted(run.info.run_name for run in found)
    assert names == sorted(["study", "pretrain/rotation", "pretrain/jigsaw"] * num_processes)
    assert {run.info.status for run in found} == {"FINISHED"}
    studies = {run.info.run_id for run in found if run.info.run_name == "study"}
    for run in found:
        listed = client.list_artifacts(run.info.run_id)
        if run.info.run_id in studies:
            assert [item.path for item in listed] == ["config.public.yaml"]
            continue
        label = run.data.params["pretext"]
        (file,) = client.list_artifacts(run.info.run_id, f"checkpoints/{label}")
        assert (file.path, file.file_size) == (
            f"checkpoints/{label}/backbone.safetensors",
            4_000_000,
        )
        assert run.data.tags["mlflow.parentRunId"] in studies
        for metric in METRICS:
            history = client.get_metric_history(run.info.run_id, metric)
            assert sorted(point.step for point in history) == list(range(NUM_STEPS))
    samples = {key for run in found for key in run.data.metrics if key.startswith("system/")}
    assert "system/cpu_utilization_percentage" in samples


@pytest.fixture(params=["postgresql", "sqlite"])
def database(request: pytest.FixtureRequest, tmp_path: Path):
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'server.db'}"
    else:
        with postgres() as address:
            yield address


def test_a_server_killed_in_the_middle_loses_nothing_and_holds_nobody_up(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, value in LOGIN.items():
        monkeypatch.setenv(name, value)
    server = Server(tmp_path / "server", database)
    folders = [tmp_path / f"study{number}" for number in range(NUM_PROCESSES)]
    try:
        server.start()
        writers = [start(folder, server.uri) for folder in folders]
        # Each has its runs on the server, and is in the middle of delivering.
        wait_until(lambda: all(_has(folder, "pretrain/rotation") for folder in folders))
        server.kill()
        (tmp_path / "go").touch()
        # All go on without it, into their second pretraining.
        wait_until(lambda: all("jigsaw" in _journal(folder) for folder in folders))
        server.start()
        (tmp_path / "back").touch()
        found = [ended(writer) for writer in writers]
        for folder in folders:
            report = sync(folder, TrackingConfig(uri=server.uri))
            assert (report.undelivered, report.refused, report.problem) == (0, 0, "")
        check_all_arrived(server.uri, NUM_PROCESSES)
    finally:
        server.kill()
    with capsys.disabled():
        print("", *found, sep=f"\n{database.partition(':')[0]}: ")
    assert max(one["waited_s"] for one in found) < 5


def _journal(folder: Path) -> str:
    return (folder / "journal.jsonl").read_text()


def _has(folder: Path, run: str) -> bool:
    cursor = folder / "tracking.json"
    return cursor.is_file() and run in cursor.read_text()


def test_four_processes_share_one_new_sqlite_and_one_of_them_is_killed(
    tmp_path: Path, capsys: Any
) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    folders = [tmp_path / f"study{number}" for number in range(NUM_PROCESSES)]
    writers = [start(folder, store) for folder in folders]
    wait_until(lambda: all(_has(folder, "pretrain/rotation") for folder in folders))
    writers[0].send_signal(signal.SIGKILL)
    writers[0].communicate()
    (tmp_path / "go").touch()
    (tmp_path / "back").touch()
    found = [ended(writer) for writer in writers[1:]]
    found.append(ended(start(folders[0], store)))  # the same command goes on
    check_all_arrived(store, NUM_PROCESSES)
    with capsys.disabled():
        print("", *found, sep="\nsqlite itself: ")
    assert max(one["waited_s"] for one in found) < 5
    assert {one["undelivered"] for one in found} == {0}
