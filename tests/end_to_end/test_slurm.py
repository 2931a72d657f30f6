"""The batch file of `medssl slurm` is run, with stand-ins for Slurm's commands on one machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from studies import environment, medssl, pretrain_settings, write_archive, write_config

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

SECONDS = 300
STEPS = 300
STAND_INS = {
    # Takes its own options away and becomes the command, whose process scancel must find.
    "srun": """while [[ $1 == --* ]]; do shift; done
echo $$ > "$PLACE/step"
exec "$@"
""",
    "scancel": """[[ $* == "--signal=TERM $SLURM_JOB_ID" ]] || exit 9
pkill -TERM -P "$(cat "$PLACE/step")"  # as Slurm does: to every process of the step
kill -TERM "$(cat "$PLACE/step")"
""",
    "scontrol": """case "$1 $2" in
  "show hostnames") echo localhost ;;
  "requeue $SLURM_JOB_ID") echo again >> "$PLACE/requeued" ;;
  *) exit 9 ;;
esac
""",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an index, a config, its batch file, and Slurm's stand-ins."""
    folder = tmp_path_factory.mktemp("slurm")
    archive = write_archive(folder / "archive", 8)
    content = pretrain_settings(archive, steps=STEPS, micro_batch_size=2)
    write_config(folder / "rotation.yaml", content)
    for arguments in (
        ["index", archive / "images", "--out", "index", "--no-audit"],
        ["pretrain", "rotation.yaml", "--out", "alone"],
    ):
        done = medssl(*arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
    (folder / "bin").mkdir()
    for name, text in STAND_INS.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (folder / "bin" / name).chmod(0o755)
    return folder


def submit(place: Path, out: str, *arguments: str, number: int) -> subprocess.Popen[str]:
    """Write a batch file and start it as Slurm would."""
    options = ["--gpus-per-node", "0", "--processes-per-node", "2", "--cpus-per-task", "2"]
    file = f"{out}.sbatch"
    written = medssl(
        "slurm", "rotation.yaml", *arguments, "--out", out, *options, "--file", file, cwd=place
    )
    assert written.returncode == 0, written.stderr
    assert f"sbatch {file}" in written.stdout
    changes = {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PLACE": str(place),
        "SLURM_JOB_ID": str(os.getpid() * 10 + number), "SLURM_JOB_NODELIST": "localhost",
        "MEDSSL_PYTHON": sys.executable,
    }  # fmt: skip
    return subprocess.Popen(
        [str(place / file)], cwd=place, env=environment(**changes), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=SECONDS)
    return process.returncode, err


def requeued(place: Path) -> int:
    """Return how often Slurm was asked to queue a job again, and forget it."""
    file = place / "requeued"
    times = len(file.read_text().splitlines()) if file.exists() else 0
    file.unlink(missing_ok=True)
    return times


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    until, journal = time.monotonic() + SECONDS, run / "journal.jsonl"
    while not (journal.is_file() and f'"step": {step},' in journal.read_text()):
        assert process.poll() is None, end(process)
        assert time.monotonic() < until
        time.sleep(0.02)


def finished(run: Path) -> bool:
    return json.loads((run / "provenance.json").read_text())["finished"] is not None


def test_before_the_time_is_over_it_saves_and_queues_itself_again(place: Path):
    run = place / "warned"
    process = submit(place, "warned", number=0)
    wait_for_step(run, 5, process)
    process.send_signal(signal.SIGUSR1)  # #SBATCH --signal=B:USR1@120
    code, err = end(process)
    assert code == 0, err
    assert "Not finished yet: queued again." in err
    assert requeued(place) == 1
    assert not finished(run)

    code, err = end(submit(place, "warned", number=1))  # the next turn
    assert code == 0, err
    assert requeued(place) == 0
    assert finished(run)
    found, wanted = (
        load_file(folder / "checkpoints" / "backbone" / "backbone.safetensors")
        for folder in (run, place / "alone")
    )
    for key, value in wanted.items():
        assert torch.allclose(found[key], value, atol=1e-5), key


def test_when_its_minutes_are_over_it_queues_itself_again(place: Path):
    code, err = end(submit(place, "late", "training.max_minutes=1.0e-4", number=2))
    assert code == 0, err
    assert "the 0.0001 minutes are over" in err
    assert requeued(place) == 1
    assert not finished(place / "late")


def test_a_cancelled_job_saves_and_stays_away(place: Path):
    run = place / "cancelled"
    process = submit(place, "cancelled", number=3)
    wait_for_step(run, 5, process)
    process.terminate()
    code, err = end(process)
    assert code == 1, err
    assert "Terminated. Give the same command again to go on." in err
    assert requeued(place) == 0
    assert list((run / "checkpoints" / "backbone").glob("training_state-*.pt"))


def test_a_failed_job_is_not_queued_again(place: Path):
    written = "failed"
    process = submit(place, written, "index=elsewhere", number=4)
    code, err = end(process)
    assert code == 1
    assert err.count("Error: ") >= 1
    assert requeued(place) == 0
