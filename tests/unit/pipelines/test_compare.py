"""Comparing finished runs from their predictions alone."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medssl.errors import ConfigError, DataError
from medssl.pipelines.compare import TABLES, run
from medssl.pipelines.sections import StatisticsConfig
from tests.simulated_studies import Truth, as_predictions, draw_study

QUICK = StatisticsConfig(num_resamples=200)


def write_predictions(folder: Path, init: str, gain: float) -> Path:
    truth = Truth("segmentation", {"imagenet": 0.0, init: gain}, 0.002)
    tables = [
        as_predictions(draw_study(truth, 25, 3, np.random.default_rng(0)), num_labelled=count)
        for count in (5, 10, 20, 40)
    ]
    folder.mkdir(parents=True)
    pd.concat(tables).to_parquet(folder / "predictions.parquet")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [
        write_predictions(root / "first", "rotation", 0.05),
        write_predictions(root / "second", "jigsaw", 0.0),
    ]


def test_the_inits_of_all_runs_are_compared_with_one_reference(runs: list[Path], tmp_path: Path):
    table = run(runs, tmp_path / "both", statistics=QUICK).set_index("init")
    assert set(table.index) == {"rotation", "jigsaw", "imagenet (second)"}
    assert set(table.loc["rotation", "verdict"]) == {"better"}
    assert set(table["family_size"]) == {12}
    for name in TABLES:
        assert len(pd.read_csv(tmp_path / "both" / f"{name}.csv")) > 0
    text = (tmp_path / "both" / "report.html").read_text()
    assert "Labels saved at equal Dice" in text
    assert "Test patients needed" in text


def test_run_folders_of_one_name_are_told_apart(runs: list[Path], tmp_path: Path):
    same = [tmp_path / place / "run" for place in "abc"]
    for folder in same:
        shutil.copytree(runs[0], folder)
    table = run(same, tmp_path / "out", statistics=QUICK).set_index("init")
    others = [name for name in table.index if "(run" in name]
    assert {name.split("(")[1] for name in others} == {"run)", "run 2)"}


def test_a_comparison_says_which_runs_it_compares_and_how_to_do_it_again(
    runs: list[Path], tmp_path: Path
):
    noted = [tmp_path / "runs" / folder.name for folder in runs]
    for number, (folder, copy) in enumerate(zip(runs, noted, strict=True)):
        shutil.copytree(folder, copy)
        provenance = {"git_commit": "ab" * 20, "data": {"splits": str(number)}}
        (copy / "provenance.json").write_text(json.dumps(provenance))
        facts = {"test_patients_in_pool": number, "synthetic": number == 1}
        (copy / "data.json").write_text(json.dumps({"splits": {"train": 40, "test": 25}, **facts}))
    run(noted, tmp_path / "both", statistics=QUICK)
    page = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    digest = hashlib.sha256((noted[0] / "predictions.parquet").read_bytes()).hexdigest()
    assert f"first own scans 40 25 0 not noted {'ab' * 6} ? {digest[:12]}" in text
    assert "medssl compare runs/first runs/second --reference imagenet --out runs/both" in text
    assert "second: 1 test patient was in the pretraining pool" in text
    assert "The runs drew their patients differently" in text
    assert "Synthetic data prove nothing" in text
    assert str(tmp_path) not in page


def test_a_reference_that_no_run_has_is_refused(runs: list[Path], tmp_path: Path):
    with pytest.raises(ConfigError) as refused:
        run(runs, tmp_path / "out", statistics=StatisticsConfig(reference="absent"))
    assert str(refused.value) == (
        "reference 'absent' is not one of the inits. "
        "There are: imagenet, imagenet (second), jigsaw, rotation"
    )
    assert not (tmp_path / "out").exists()


def test_without_imagenet_the_reference_is_that_of_the_first_run(tmp_path: Path):
    first, second = (
        write_predictions(tmp_path / name, init, 0.0)
        for name, init in (("first", "rotation"), ("second", "jigsaw"))
    )
    for folder in (first, second):
        table = pd.read_parquet(folder / "predictions.parquet")
        table["init"] = table["init"].replace("imagenet", "random")
        table.to_parquet(folder / "predictions.parquet")
    pd.DataFrame({"reference": ["random"]}).to_csv(first / "comparisons.csv")
    compared = run([first, second], tmp_path / "both")
    assert set(compared["reference"]) == {"random"}


def test_neither_torch_nor_monai_is_imported_to_compare(runs: list[Path], tmp_path: Path) -> None:
    code = (
        "import sys; from medssl.cli import cli\n"
        f"cli(['compare', {str(runs[0])!r}, {str(runs[1])!r}, '--out', {str(tmp_path / 'c')!r}],"
        " standalone_mode=False)\n"
        "found = {'torch', 'monai', 'mlflow', 'pydicom', 'timm'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c" / "power.csv").is_file()


def test_runs_that_fixed_different_metrics_are_refused(runs: list[Path], tmp_path: Path):
    for folder, metric in zip(runs, ("dice", "auc"), strict=True):
        copy = tmp_path / folder.name
        copy.mkdir()
        shutil.copy(folder / "predictions.parquet", copy)
        (copy / "results.csv").write_text(f"task,metric\nsegmentation,{metric}\n")
    with pytest.raises(
        DataError, match=r"task 'segmentation' by different .* \(dice, and auc in 'second'\)"
    ):
        run([tmp_path / folder.name for folder in runs], tmp_path / "both", statistics=QUICK)


def test_a_run_without_predictions_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'nothing' has no readable predictions"):
        run([tmp_path / "nothing"], tmp_path / "out", statistics=QUICK)
