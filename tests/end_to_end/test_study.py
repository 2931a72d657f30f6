"""The whole road on a made-up archive, through the command line."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest

from medssl.scans.splits import Splits, make_splits
from samples import NAME, PATIENT_ID, PLANTED, UID_ROOT
from studies import environment, medssl, settings, write_config

from .conftest import Study

pytestmark = [
    pytest.mark.timeout(600),
    # MLflow asks SQLAlchemy for a strategy that SQLAlchemy means to remove.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]


def tables(run: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    return (
        pd.read_parquet(run / "predictions.parquet"),
        pd.read_csv(run / "results.csv"),
        pd.read_csv(run / "comparisons.csv"),
    )


def statuses(place: Path) -> dict[str, str]:
    client = mlflow.MlflowClient(f"sqlite:///{place / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("medssl")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    return {run.info.run_name: run.info.status for run in found}


def test_every_cell_predicts_every_labelled_test_scan(study: Study):
    predictions, _, _ = tables(study.run)
    splits = Splits.read(study.run / "splits.json")
    cells = predictions.groupby(
        ["init", "task", "protocol", "num_labelled_patients", "seed", "layer"]
    )
    assert len(predictions.groupby(["init", "task", "protocol", "num_labelled_patients"])) == 24
    for _, cell in cells:
        assert set(cell["patient_key"]) == set(splits.test)
        assert not cell["scan_key"].duplicated().any()
    probes = predictions[predictions["protocol"] == "linear_probe"]
    assert (probes.groupby(["init", "task", "num_labelled_patients"])["layer"].nunique() == 5).all()


def test_inits_were_given_the_same_cases_and_labels(study: Study):
    predictions, _, _ = tables(study.run)
    by_init = {
        init: part[["task", "protocol", "num_labelled_patients", "scan_key", "target"]]
        .drop_duplicates()
        .sort_values(["task", "protocol", "num_labelled_patients", "scan_key"])
        .reset_index(drop=True)
        for init, part in predictions.groupby("init")
    }
    first = by_init.pop("random")
    for table in by_init.values():
        pd.testing.assert_frame_equal(first, table)


def test_test_patients_are_in_no_pretraining_pool(study: Study):
    splits = Splits.read(study.run / "splits.json")
    for init in ("rotation", "inpainting"):
        contract = json.loads((study.run / "checkpoints" / init / "contract.json").read_text())
        assert set(contract["patients"]) == set(splits.train)
    facts = json.loads((study.run / "data.json").read_text())
    assert facts["test_patients_in_pool"] == 0


def test_the_report_and_the_terminal_give_a_verdict_for_each_comparison(study: Study):
    _, _, comparisons = tables(study.run)
    assert len(comparisons) == 2 * 2 * 2 * 2  # inits, tasks, protocols, label fractions
    assert set(comparisons["verdict"]) <= {"better", "not worse", "no difference shown", "worse"}
    report = (study.run / "report.html").read_text()
    assert "inpainting" in report
    assert "report.html" in study.printed


def test_planted_identities_are_found_nowhere(study: Study):
    files = {path for path in (study.place / "runs").rglob("*") if path.is_file()}
    assert study.run / "report.html" in files
    assert any(path.suffix == ".db" for path in files)
    for needle in PLANTED:
        assert needle not in study.printed
    for path in files:
        content = path.read_bytes()
        # Few letters or digits also turn up by chance in numbers and in compressed pictures.
        for needle in (NAME, PATIENT_ID, UID_ROOT, "DOE^", "PLANTED"):
            assert needle.encode() not in content, path.name
            assert needle not in path.name
        text = re.sub(rb"base64,[A-Za-z0-9+/=]+", b"", content)
        if path.suffix in {".html", ".csv", ".json", ".jsonl", ".yaml"}:
            assert not re.search(rb"\b(DOE|JANE)\b", text), path.name


@pytest.mark.slow
def test_a_second_start_changes_nothing_and_computes_nothing(study: Study):
    before = {path: path.stat().st_mtime_ns for path in (study.run / "cells").iterdir()}
    results = (study.run / "results.csv").read_bytes()
    again = medssl("study", study.config, cwd=study.place)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (study.run / "cells").iterdir()} == before
    assert (study.run / "results.csv").read_bytes() == results


def test_mlflow_has_a_parent_and_a_finished_child_for_everything(study: Study):
    found = statuses(study.place)
    assert found["study"] == "FINISHED"
    assert found["pretrain/rotation"] == "FINISHED"
    cells = [status for name, status in found.items() if name.startswith("cell/")]
    assert cells == ["FINISHED"] * 24


def test_the_last_validation_of_the_pretext_task_is_kept_and_shown(study: Study):
    found = json.loads(
        (study.run / "checkpoints" / "rotation" / "validation.json").read_text(encoding="utf-8")
    )
    (part,) = found["parts"]
    assert part["trivial"] == 1 / len(part["classes"])
    assert sum(map(sum, part["confusion"])) > 0
    report = (study.run / "report.html").read_text(encoding="utf-8")
    assert "How the pretext tasks did" in report
    assert "which puzzles rotation mixes up" in report


def test_a_folder_with_another_config_is_refused(study: Study):
    refused = medssl("study", study.config, "seed=4", cwd=study.place)
    assert refused.returncode == 2
    assert "holds a run of another configuration: seed was 3, is 4" in refused.stderr


def start(study: Study, place: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "medssl", "study", str(study.config), "--out", "runs/tiny"],
        cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(run: Path, pattern: str, process: subprocess.Popen[str], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not any(run.glob(pattern)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"{pattern} did not appear"
        time.sleep(0.02)


MOMENTS = {
    "in the first pretraining": "checkpoints/rotation/*",
    "in the second pretraining": "checkpoints/inpainting/*",
    "in the matrix": "cells/classification-rotation-linear_probe-n2-s0.parquet",
}
ESSENTIAL = "in the second pretraining"
"""The moment that `make test` takes; `make test-all` takes all."""


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(moment, id=name, marks=() if name == ESSENTIAL else pytest.mark.slow)
        for name, moment in MOMENTS.items()
    ],
)
def test_a_killed_study_goes_on_to_the_same_tables(study: Study, tmp_path: Path, moment: str):
    process = start(study, tmp_path)
    wait_for(tmp_path / "runs" / "tiny", moment, process)
    process.kill()
    process.communicate()
    resumed = medssl("study", study.config, "--resume", "--out", "runs/tiny", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    for ours, theirs in zip(tables(tmp_path / "runs" / "tiny"), tables(study.run), strict=True):
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert statuses(tmp_path)["study"] == "FINISHED"


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        (signal.SIGTERM, 143, "Terminated."),
        pytest.param(signal.SIGINT, 130, "Interrupted.", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_study_as_killed_and_says_how_to_go_on(
    study: Study, tmp_path: Path, sent: signal.Signals, code: int, said: str
):
    process = start(study, tmp_path)
    wait_for(tmp_path / "runs" / "tiny", MOMENTS["in the first pretraining"], process)
    process.send_signal(sent)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == code
    assert said in printed
    assert "Give the same command again" in printed
    assert "Traceback" not in printed
    assert statuses(tmp_path)["study"] == "KILLED"


@pytest.mark.slow
def test_a_second_process_on_the_same_run_folder_is_refused(study: Study, tmp_path: Path):
    process = start(study, tmp_path)
    try:
        wait_for(tmp_path / "runs" / "tiny", "config.yaml", process)
        process.send_signal(
            signal.SIGSTOP
        )  # so that it still holds the folder, however slow we are
        second = medssl("study", study.config, "--out", "runs/tiny", cwd=tmp_path)
    finally:
        process.kill()
        process.communicate()
    assert second.returncode == 4
    assert "another medssl process is using it" in second.stderr


@pytest.mark.slow
def test_the_plan_touches_nothing(study: Study, tmp_path: Path):
    planned = medssl("study", study.config, "--dry-run", "--json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["cells"] == 24
    assert plan["pretraining_steps"] == {"rotation": 6, "inpainting": 6}
    assert list(tmp_path.iterdir()) == []


def test_the_weights_load_in_one_line(study: Study):
    import torch

    import medssl as public

    backbone, contract = public.load_backbone(study.run / "checkpoints" / "rotation")
    features = backbone(torch.zeros(1, contract.in_channels, 24, 24))
    assert [feature.shape[1] for feature in features] == [s.channels for s in backbone.stages]
    assert contract.pretext is not None
    assert contract.pretext["name"] == "rotation"


def test_runs_are_compared_from_their_predictions_alone(study: Study, tmp_path: Path):
    compared = medssl(
        "compare", study.run, "--reference", "random", "--out", tmp_path / "both", cwd=tmp_path
    )
    assert compared.returncode == 0, compared.stderr
    ours = pd.read_csv(tmp_path / "both" / "comparisons.csv")
    theirs = pd.read_csv(study.run / "comparisons.csv")
    np.testing.assert_allclose(ours["effect"], theirs["effect"], atol=1e-12)


def test_a_checkpoint_pretrained_on_test_patients_is_refused(study: Study, tmp_path: Path):
    content = settings(study.archive)
    transfer = {
        key: content[key]
        for key in ("preprocessing", "sampling", "backbone", "protocols", "matrix", "statistics")
    }
    workplace = next((study.archive / "workspace").iterdir())
    first = Splits.read(study.run / "splits.json")
    patients = (*first.train, *first.val, *first.test)
    others = (
        make_splits(patients, **content["splits"], seed=number) for number in itertools.count()
    )
    seed = next(split.seed for split in others if set(split.test) & set(first.train))
    transfer |= {
        "seed": seed,
        "index": str(workplace / "index"),
        "tasks": content["tasks"][:1],
        "splits": content["splits"],
        "inits": {
            "random": "random",
            "rotation": {"name": "checkpoint", "path": str(study.run / "checkpoints/rotation")},
        },
    }
    config = write_config(tmp_path / "transfer.yaml", transfer)
    refused = medssl("transfer", config, cwd=tmp_path)
    assert refused.returncode == 3
    assert "'rotation' was pretrained on scans of" in refused.stderr
    assert "splits.file" in refused.stderr


@pytest.mark.slow
def test_a_backbone_pretrained_again_is_not_mixed_with_cells_of_the_earlier_one(
    study: Study, tmp_path: Path
):
    shutil.copytree(study.run, tmp_path / "runs" / "tiny")
    contract = tmp_path / "runs" / "tiny" / "checkpoints" / "rotation" / "contract.json"
    content = json.loads(contract.read_text())
    contract.write_text(json.dumps(content | {"weights_sha256": "0" * 64}))
    refused = medssl("study", study.config, cwd=tmp_path)
    assert refused.returncode == 3
    assert "have changed since this run was started (pretrained rotation)" in refused.stderr


@pytest.mark.slow
def test_labels_that_changed_since_the_start_are_refused(study: Study, tmp_path: Path):
    shutil.copytree(study.run, tmp_path / "runs" / "tiny")
    table = study.archive / "labels.csv"
    before = table.read_text()
    try:
        first, *rest = before.splitlines()
        turned = [line.replace("cyst", "*").replace("solid", "cyst") for line in rest]
        table.write_text("\n".join([first, *turned]).replace("*", "solid") + "\n")
        refused = medssl("study", study.config, cwd=tmp_path)
    finally:
        table.write_text(before)
    assert refused.returncode == 3
    assert "the data have changed since this run was started" in refused.stderr
    assert "labels of classification" in refused.stderr
    assert "Traceback" not in refused.stderr
