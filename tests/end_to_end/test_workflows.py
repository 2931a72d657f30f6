"""The scripts in `workflows/`, run as they stand on small data, and the MLproject beside them."""

from __future__ import annotations

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from medssl.scans.splits import Splits
from studies import ROOT, environment, pretrain_settings, settings, write_archive, write_config

WORKFLOWS = ROOT / "workflows"
PROJECT: dict[str, Any] = yaml.safe_load((WORKFLOWS / "MLproject").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workflows")
    write_archive(folder / "archive")
    return folder


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs a script in this process, and returns what it printed."""

    def run_script(name: str, *arguments: str | Path) -> str:
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(WORKFLOWS / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run_script


def test_index(run: Any):
    told = run("index", "archive/images", "index")
    assert "CT        3D      10" in told
    assert "the first scan: (1, 40, 36, 10)" in told


def test_pretrain_and_go_on(run: Any, place: Path):
    if not (place / "index").exists():
        run("index", "archive/images", "index")
    content = pretrain_settings(place / "archive", steps=2, validate_every=2, checkpoint_every=2)
    write_config(place / "rotation.yaml", content)
    assert "layer4 (1, 64, 4, 4)" in run("pretrain", "rotation.yaml", "runs/first")
    content["pretext"] = {"name": "inpainting", "block": 4}
    write_config(place / "inpainting.yaml", content)
    told = run("continual_pretraining", "inpainting.yaml", "runs/first", "runs/second")
    assert "lineage: random → rotation → inpainting" in told
    assert "patients seen on the way: 5" in told


def test_transfer_and_report(run: Any, place: Path):
    if not (place / "index").exists():
        run("index", "archive/images", "index")
    study = settings(place / "archive")
    kept = ("preprocessing", "sampling", "backbone", "matrix", "splits", "statistics")
    content = {
        **{key: study[key] for key in kept},
        "index": "index",
        "inits": {"random": "random", "other": "random"},
        "tasks": study["tasks"][1:],
        "protocols": ["knn"],
        "tracking": {"mlflow": False},
    }
    write_config(place / "transfer.yaml", content)
    told = run("transfer", "transfer.yaml", "runs/transfer", "seed=1")
    assert "classification knn" in told
    told = run("report", "runs/transfer", "runs/transfer", "--out", "runs/compared")
    assert "not worse" in told or "no difference shown" in told
    assert (place / "runs" / "compared" / "report.html").is_file()


def test_search_looks_at_no_test_patient(run: Any, place: Path):
    study = settings(place / "archive")
    study |= {
        "inits": {"random": {"init": "random"}, "other": {"init": "random"}},
        "tasks": study["tasks"][1:],
        "protocols": ["knn"],
        "statistics": {"reference": "random"},
    }
    write_config(place / "study.yaml", study)
    trials = {"few": {"protocols": [{"name": "knn", "max_slices": 1}]}, "as it is": {}}
    content = {"study": "study.yaml", "out": "runs/search", "always": {"seed": 2}, "trials": trials}
    write_config(place / "search.yaml", content)
    assert "as it is" in run("search", "search.yaml")
    table = pd.read_csv(place / "runs" / "search" / "search.csv")
    assert set(table["trial"]) == set(trials)
    few, as_it_is = (Splits.read(place / "runs" / "search" / n / "splits.json") for n in trials)
    assert few == as_it_is
    predictions = pd.read_parquet(place / "runs" / "search" / "few" / "predictions.parquet")
    assert set(predictions["patient_key"]) == set(few.test)
    assert not {*few.train, *few.val, *few.test} & {*few.unused}
    assert few.seed == 2
    assert few.unused


def test_the_notebook(place: Path):
    notebook = place / "notebook"
    done = subprocess.run(
        [sys.executable, "workflows/notebook.py"],
        cwd=ROOT, env=environment(PLACE=str(notebook), STEPS="2", MPLBACKEND="agg"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "accepted  CT        3D      24" in done.stdout
    assert (notebook / "scan.png").is_file()
    assert (notebook / "study" / "report.html").is_file()


@pytest.mark.parametrize("name", sorted(PROJECT["entry_points"]))
def test_every_entry_point_of_the_project_is_a_script(name: str):
    entry = PROJECT["entry_points"][name]
    command = shlex.split(entry["command"].format_map({k: k for k in entry["parameters"]}))
    assert command[:4] == ["cd", "..", "&&", "python"]
    assert command[4] == f"workflows/{name}.py"
    for parameter in entry["parameters"].values():
        default = parameter["default"] if isinstance(parameter, dict) else ""
        if default.startswith("configs/"):
            assert (ROOT / default).is_file()


def test_every_script_is_an_entry_point_of_the_project():
    scripts = {path.stem for path in WORKFLOWS.glob("*.py")} - {"notebook"}
    assert scripts == set(PROJECT["entry_points"])


@pytest.mark.slow
def test_mlflow_runs_an_entry_point(place: Path, tmp_path: Path):
    arguments = ["-P", f"folder={place / 'archive' / 'images'}", "-P", f"out={tmp_path / 'index'}"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    done = subprocess.run(
        [sys.executable, "-m", "mlflow", "run", str(WORKFLOWS), "-e", "index",
         "--env-manager", "local", *arguments],
        cwd=tmp_path, env=environment(PATH=path, MLFLOW_TRACKING_URI=uri),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the first scan: (1, 40, 36, 10)" in done.stdout
    assert (tmp_path / "index" / "index.parquet").is_file()
