"""The batch file for Slurm: what it asks for, what it refuses, and that it is a shell script."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from medssl.errors import ConfigError, MachineError
from medssl.pipelines.slurm import Job, build, write

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "configs" / "pretrain" / "rotation_2d.yaml"
OUT = Path("runs/rotation")


def script(*overrides: str, **job: Any) -> str:
    return build(CONFIG, overrides, OUT, Job(**job))


def syntax(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "job",
    [
        {},
        {"nodes": 2, "gpus_per_node": 4, "partition": "gpu", "account": "radiology"},
        {"gpus_per_node": 0, "processes_per_node": 2},
        {"container": "/images/it's medssl.sif"},
    ],
)
def test_it_is_a_shell_script(job: dict[str, Any]):
    checked = syntax(script("pretext.views=2", **job))
    assert (checked.returncode, checked.stderr) == (0, "")


def test_it_asks_slurm_for_what_was_asked():
    text = script(
        nodes=2, gpus_per_node=4, cpus_per_task=32, time="2-00", partition="gpu", account="lung"
    )
    options = [line.removeprefix("#SBATCH --") for line in text.splitlines() if "#SBATCH" in line]
    assert options == [
        "job-name=medssl-rotation", "nodes=2", "ntasks-per-node=1", "cpus-per-task=32",
        "gpus-per-node=4", "time=2-00", "partition=gpu", "account=lung", "signal=B:USR1@120",
        "requeue", "open-mode=append", "output=%x-%j.out",
    ]  # fmt: skip
    assert "--nnodes=2 --nproc-per-node=4" in text
    assert "OMP_NUM_THREADS=8" in text
    assert "--rdzv-backend=c10d" in text


def test_without_gpus_none_are_asked_for():
    text = script(gpus_per_node=0, processes_per_node=2, container="medssl.sif")
    assert "gpus-per-node" not in text
    assert "apptainer exec --bind" in text
    assert "--nproc-per-node=2" in text
    assert "apptainer exec --nv" in script(container="medssl.sif")


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("60", "50"), ("90:30", "80.5"), ("24:00:00", "1430"), ("1-12", "2150"),
        ("1-12:30", "2180"), ("1-00:00:30", "1430.5"), ("8", "6"), ("0:30", "0.38"),
    ],
)  # fmt: skip
def test_training_ends_before_slurm_ends_it(time: str, minutes: str):
    assert f"training.max_minutes={minutes} --out" in script(time=time)


def test_a_shorter_limit_of_the_config_is_kept():
    text = script("training.max_minutes=7", time="60")
    assert text.count("training.max_minutes=") == 1
    assert "training.max_minutes=7 --out" in text
    assert "training.max_minutes=50 --out" in script("training.max_minutes=700", time="60")


@pytest.mark.parametrize(
    ("overrides", "job", "text"),
    [
        ([], {"time": "soon"}, "--time 'soon' is no time of Slurm's"),
        ([], {"time": "1-2-3"}, "is no time of Slurm's"),
        ([], {"time": "0"}, "leaves no time to train"),
        ([], {"partition": "gpu\n#SBATCH --wrap=x"}, "is nothing that Slurm can take"),
        (["training.setps=1"], {}, "Did you mean 'steps'"),
        ([], {"nodes": 3}, "16 images cannot be dealt out evenly to 3 processes"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], job: dict[str, Any], text: str):
    with pytest.raises(ConfigError, match=text):
        script(*overrides, **job)


def test_it_names_no_folder_that_was_not_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    text = build(CONFIG.relative_to(ROOT), [], OUT, Job())
    assert str(ROOT) not in text
    assert str(Path.home()) not in text
    assert "python=${MEDSSL_PYTHON:-python}" in text


def test_it_lets_nothing_ask_the_network():
    text = script()
    for line in ("MLFLOW_DISABLE_TELEMETRY=true", "HF_HUB_OFFLINE=1"):
        assert line in text


def test_an_earlier_batch_file_is_replaced_and_nothing_else(tmp_path: Path):
    file = tmp_path / "job.sbatch"
    write(script(), file)
    write(script(nodes=2), file)
    assert "--nodes=2" in file.read_text()
    (tmp_path / "mine.sh").write_text("#!/bin/bash\necho mine\n")
    with pytest.raises(MachineError, match=r"mine\.sh is there already"):
        write(script(), tmp_path / "mine.sh")
