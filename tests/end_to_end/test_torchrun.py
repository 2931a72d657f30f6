"""Pretraining in several processes of torchrun, through the command line, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import torch
from safetensors.torch import load_file

from medssl.tracking.journal import read_journal
from medssl.training.state import saved_states
from studies import environment, medssl, pretrain_settings, write_archive, write_config

pytestmark = [
    pytest.mark.timeout(600),
    # MLflow asks SQLAlchemy for a strategy that SQLAlchemy means to remove.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

SECONDS = 300
STEPS = 30


@dataclass
class Place:
    """An index, a config for two processes, and what one process makes of it."""

    folder: Path
    config: Path
    alone: Path

    def start(
        self, *arguments: str, command: str = "pretrain", processes: int = 2, restarts: int = 0
    ) -> subprocess.Popen[str]:
        """Start a command under torchrun; it reaches no network."""
        options = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options,
             "-m", "medssl", command, self.config, *arguments],
            cwd=self.folder, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: str, **options: Any) -> tuple[int, str, str]:
        """Run a command under torchrun to its end; return exit code and what was printed."""
        return end(self.start(*arguments, **options))

    def status(self, name: str) -> str:
        """Return what MLflow says of the run of a folder in ``runs``."""
        client = mlflow.MlflowClient(f"sqlite:///{self.folder / name / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("medssl")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        return str(run.info.status)


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "backbone" / "backbone.safetensors")


def assert_same_weights(run: Path, wanted: Path) -> None:
    found = weights(run)
    for key, value in weights(wanted).items():
        assert torch.allclose(found[key], value, atol=1e-5), key


def curve(run: Path) -> dict[int, float]:
    """Return the training losses by step, and make sure that none was logged twice."""
    found: dict[int, float] = {}
    for record, _ in read_journal(run / "journal.jsonl"):
        if record["kind"] == "metrics" and "train/loss" in record["values"]:
            assert record["step"] not in found
            found[record["step"]] = record["values"]["train/loss"]
    return found


def last_step(run: Path) -> int:
    return max(curve(run), default=0) if (run / "journal.jsonl").is_file() else 0


def wait_for(met: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + SECONDS
    while not met():
        assert process.poll() is None, end(process)
        assert time.monotonic() < until
        time.sleep(0.02)


def process_of(rank: int, torchrun: subprocess.Popen[str]) -> psutil.Process:
    (found,) = [
        child
        for child in psutil.Process(torchrun.pid).children()
        if child.environ().get("RANK") == str(rank)
    ]
    return found


def told(printed: str) -> list[str]:
    """Return the lines by medssl, without those of torchrun."""
    return [
        line for line in printed.splitlines() if "Error: " in line and "ChildFailed" not in line
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("torchrun")
    archive = write_archive(folder / "archive", 8)
    content = pretrain_settings(archive, steps=STEPS, checkpoint_every=4, validate_every=10)
    config = write_config(folder / "rotation.yaml", content)
    indexed = medssl("index", archive / "images", "--out", "index", "--no-audit", cwd=folder)
    assert indexed.returncode == 0, indexed.stderr
    done = medssl("pretrain", config, "training.micro_batch_size=2", "--out", "alone", cwd=folder)
    assert done.returncode == 0, done.stderr
    return Place(folder, config, folder / "alone")


@pytest.mark.slow
def test_two_processes_make_what_one_makes_and_one_of_them_speaks(place: Place):
    code, out, err = place.run("--out", "two")
    assert code == 0, err
    assert out.splitlines() == ["run folder: two", f"report: {Path('two/report.html')}"]
    assert all(line.startswith(("prepare: ", "pretrain backbone: ")) for line in err.splitlines())
    assert err.count(f"{STEPS}/{STEPS}") == 1

    two = place.folder / "two"
    assert_same_weights(two, place.alone)
    assert curve(two) == pytest.approx(curve(place.alone), abs=1e-5)
    assert (two / "splits.json").read_text() == (place.alone / "splits.json").read_text()
    contracts = [
        json.loads((run / "checkpoints" / "backbone" / "contract.json").read_text())
        for run in (two, place.alone)
    ]
    for contract in contracts:
        del contract["git_commit"], contract["package_versions"], contract["weights_sha256"]
    assert contracts[0] == contracts[1]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_started_again_and_the_curve_goes_on(place: Place, rank: int):
    run = place.folder / f"killed-{rank}" / "run"
    process = place.start(
        "tracking.mlflow=true", "--out", str(run.relative_to(place.folder)), restarts=2
    )
    wait_for(lambda: last_step(run) >= 6, process)
    process_of(rank, process).kill()
    code, _, err = end(process)
    assert code == 0, err
    assert json.loads((run / "provenance.json").read_text())["restarts"] == 1
    assert curve(run) == pytest.approx(curve(place.alone), abs=1e-5)
    assert_same_weights(run, place.alone)
    assert place.status(f"killed-{rank}") == "FINISHED"


@pytest.mark.slow
def test_without_a_restart_the_others_say_that_one_ended(place: Place):
    run = place.folder / "lost" / "run"
    process = place.start("tracking.mlflow=true", "--out", "lost/run")
    wait_for(lambda: last_step(run) >= 6, process)
    process_of(1, process).kill()
    code, _, err = end(process)
    assert code == 1
    (line,) = told(err)
    assert line.startswith("AbandonedError: another process of this training ended")
    assert "Start the same command again" in line
    assert "Unforeseen" not in err
    assert "medssl/training" not in err  # no traceback of ours
    assert place.status("lost") == "KILLED"


@pytest.mark.slow
def test_a_signal_stops_all_after_one_step_and_another_number_goes_on(place: Place):
    alone = medssl(
        "pretrain", place.config, "training.micro_batch_size=1", "--out", "parts-alone",
        cwd=place.folder,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    run = place.folder / "parts" / "run"
    options = ["training.micro_batch_size=1", "training.num_workers=1", "tracking.mlflow=true"]
    options += ["--out", "parts/run"]
    stopped: list[int] = []
    for processes in (2, 4):
        before = last_step(run)
        process = place.start(*options, processes=processes)
        wait_for(lambda before=before: last_step(run) >= before + 5, process)  # type: ignore[misc]
        for child in psutil.Process(process.pid).children():
            child.terminate()  # as Slurm does: to every process, and torchrun sends it once more
        process.terminate()
        code, _, err = end(process)
        assert code == 1
        assert err.count("stopping after this step") == 1
        assert err.count("Terminated. Give the same command again to go on.") == 1
        assert place.status("parts") == "KILLED"
        (newest, *_) = saved_states(run / "checkpoints" / "backbone")
        stopped.append(int(newest.name.split("-")[1]))
        assert stopped[-1] == last_step(run)
    assert stopped[0] < stopped[1] < STEPS
    done = medssl("pretrain", place.config, *options, cwd=place.folder)
    assert done.returncode == 0, done.stderr
    assert curve(run) == pytest.approx(curve(place.folder / "parts-alone"), abs=1e-5)
    assert_same_weights(run, place.folder / "parts-alone")
    assert place.status("parts") == "FINISHED"


@pytest.mark.slow
def test_a_time_limit_ends_all_for_good_and_the_same_command_goes_on(place: Place):
    run = place.folder / "late"
    options = ["training.max_minutes=1.0e-4", "--out", "late"]
    code, _, err = place.run(*options, restarts=2)
    assert code == 0, err  # any other code, and torchrun would start them again
    assert err.count("the 0.0001 minutes are over. Give the same command again to go on.") == 1
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["finished"] is None
    assert provenance["restarts"] == 0
    reached = last_step(run)
    assert 0 < reached < STEPS
    assert place.run(*options)[0] == 0
    assert last_step(run) > reached


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "arguments", "text"),
    [
        ("pretrain", ["training.setps=3"], "training.setps: unknown key"),
        ("pretrain", ["index=no/such"], "no index"),
        ("pretrain", ["training.global_batch_size=5"], "cannot be dealt out evenly to 2 processes"),
        ("study", [], "ConfigError: torchrun started several processes of medssl study"),
        ("pretrain", ["--nonsense"], "No such option"),
    ],
)
def test_bad_input_is_told_once(place: Place, command: str, arguments: list[str], text: str):
    code, out, err = place.run(*arguments, "--out", "bad", command=command)
    assert code == 1
    assert out == ""
    assert err.count(text) == 1, err
    assert "Terminated" not in err
    assert "medssl/cli/" not in err  # no traceback of ours
    assert not (place.folder / "bad").exists()


@pytest.mark.slow
def test_a_run_folder_that_the_others_do_not_see_is_told(place: Place, tmp_path: Path):
    # Each process has a working folder of its own, as machines without a shared disk have.
    starter = (
        "import os, sys; place = sys.argv[1] + os.environ['RANK']; os.makedirs(place); "
        "os.chdir(place); os.execv(sys.executable, [sys.executable, '-m', *sys.argv[2:]])"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "--no-python", sys.executable, "-c", starter, str(tmp_path / "machine"), "medssl",
         "pretrain", str(place.config), f"index={place.folder / 'index'}", "--out", "run"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=SECONDS,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = told(done.stderr)
    assert line.startswith("MachineError: process 1 does not see the run folder")
