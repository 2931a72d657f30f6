"""What the features of a finished study know: tables, pictures, and nothing of test patients."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from finished_studies import finished_study
from medssl.cli import cli
from medssl.errors import ConfigError
from medssl.pipelines import features


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_study(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def found(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> features.FeatureMaps:
    return features.run(finished, tmp_path_factory.mktemp("out"))


def test_test_patients_are_not_looked_at(finished: Path, found: features.FeatureMaps):
    splits = json.loads((finished / "splits.json").read_text())
    maps = pd.read_parquet(found.folder / "maps.parquet")
    assert set(maps["patient"]) == {*splits["train"], *splits["val"]}
    assert found.num_patients == len(splits["train"]) + len(splits["val"])


def test_every_layer_of_every_init_is_compared_with_every_other(found: features.FeatureMaps):
    layers = found.likeness[["init", "layer"]].drop_duplicates()
    assert len(found.likeness) == len(layers) * (len(layers) + 1) // 2
    same = found.likeness[
        (found.likeness["init"] == found.likeness["other_init"])
        & (found.likeness["layer"] == found.likeness["other_layer"])
    ]
    assert (same["cka"] - 1).abs().max() < 1e-9
    assert set(layers["init"]) == {"random", "rotation", "inpainting"}


def test_pictures_and_tables_are_written(found: features.FeatureMaps):
    written = {path.name for path in found.folder.iterdir()}
    assert {"likeness.csv", "told_apart.csv", "maps.parquet", "likeness.png"} <= written
    assert {"maps_by_label.png", "maps_by_patient.png"} <= written
    assert all(path.stat().st_size > 0 for path in found.folder.iterdir())


def test_a_second_run_finds_the_same(finished: Path, found: features.FeatureMaps, tmp_path: Path):
    again = features.run(finished, tmp_path)
    pd.testing.assert_frame_equal(again.likeness, found.likeness)
    maps = [pd.read_parquet(folder / "maps.parquet") for folder in (tmp_path, found.folder)]
    pd.testing.assert_frame_equal(*maps)


def test_the_command_says_what_is_told_apart(finished: Path, tmp_path: Path):
    told = CliRunner().invoke(cli, ["features", str(finished), "--out", str(tmp_path)])
    assert told.exit_code == 0, told.output
    assert "training and validation patients" in told.output


def test_a_folder_without_a_study_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="is not the run folder of a study"):
        features.run(tmp_path)
