"""`medssl init`: what it writes is right as it stands, and nothing is replaced unasked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from medssl.cli import cli, new_study
from medssl.errors import ConfigError, DataError
from medssl.pipelines.kinds import load_any
from medssl.pipelines.study import StudyConfig, plan
from medssl.randomness import numpy_generator
from studies import write_archive


def init(*arguments: str | Path, text: str | None = None) -> str:
    words = ["init", *map(str, arguments)]
    return CliRunner().invoke(cli, words, input=text, catch_exceptions=False).output


def answered(*arguments: str | Path) -> dict[str, Any]:
    words = ["init", *map(str, arguments), "--json"]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module")
def nifti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty volumes of ten patients, thick from top to bottom, with masks and a table."""
    folder = tmp_path_factory.mktemp("init") / "brains"
    generator = numpy_generator(0, "init")
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    rows = ["file,patient"]
    for number in range(20):
        voxels = generator.uniform(50, 100, (40, 44, 12)).astype(np.float32)
        mask = np.zeros(voxels.shape, np.uint8)
        mask[10:20, 10:20], mask[20:24] = 1, 2
        for name, values in (("images", voxels), ("labels", mask)):
            path = folder / name / f"scan_{number:02d}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.Nifti1Image(values, affine).to_filename(path)
        rows.append(f"scan_{number:02d}.nii.gz,P{number // 2}")
    (folder / "owners.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("init-dicom") / "archive", 10)


def test_masks_patients_plane_and_sizes_are_found(
    nifti: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    answer = answered(nifti, "--classes", "one,two")
    kind, config = load_any(Path("study.yaml"))
    assert (kind, answer["kind"]) == ("study", "study")
    assert answer["next"] == ["medssl study study.yaml --dry-run", "medssl study study.yaml"]
    assert isinstance(config, StudyConfig)
    assert config.name == "brains"
    assert config.index.folder == nifti / "images"
    assert config.index.patients is not None
    assert config.index.patients.table == nifti / "owners.csv"
    assert config.tasks[0].model_dump()["classes"] == ("one", "two")
    assert config.sampling.plane == "axial"  # the slices are thick from top to bottom
    assert config.preprocessing.spacing_mm == (1.0, 1.0, 3.0)
    assert config.pretrain is not None
    assert config.pretrain.sampling is not None
    assert (
        config.pretrain.sampling.crop_size == (36, 36)
        or max(config.pretrain.sampling.crop_size) <= 40
    )
    planned = plan(config)  # the dry run
    assert planned["patients"] == {"train": 5, "val": 2, "test": 3}
    assert not (tmp_path / "runs").exists()


def test_the_same_folder_gives_the_same_config(nifti: Path, tmp_path: Path):
    files = [tmp_path / "one" / "s.yaml", tmp_path / "two" / "s.yaml"]
    texts = []
    for file in files:
        file.parent.mkdir()
        init(nifti, "--yes", "--out", file)
        texts.append(file.read_text().split("\n", 1)[1])
    assert texts[0] == texts[1]


def test_every_choice_has_a_comment(nifti: Path, tmp_path: Path):
    init(nifti, "--yes", "--out", tmp_path / "s.yaml")
    lines = (tmp_path / "s.yaml").read_text().splitlines()
    assert lines[0].startswith("# medssl study ")
    assert "20 scans were looked at (all 3D), of 10 patients" in lines[1]
    assert sum("  # " in line for line in lines) >= 8
    assert "TODO" not in "".join(lines)


def test_a_table_of_patients_becomes_a_classification(archive: Path, tmp_path: Path):
    out = tmp_path / "s.yaml"
    labels = archive / "labels.csv"
    answered(archive / "images", "--labels", labels, "--out", out)
    task = yaml.safe_load(out.read_text())["tasks"][0]
    assert task == {
        "name": "classification", "table": str(labels), "by": "patient", "id_column": "patient",
        "label_column": "label",
    }  # fmt: skip
    assert load_any(out)[0] == "study"


def test_without_labels_a_pretraining_is_written(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    answer = answered(archive / "images", "--task", "none")
    assert answer["config"] == "pretrain.yaml"
    assert load_any(Path("pretrain.yaml"))[0] == "pretrain"
    assert answer["next"][0].startswith("medssl index ")
    assert "Without labels nothing can be compared" in Path("pretrain.yaml").read_text()


def test_nothing_is_replaced_unasked(nifti: Path, tmp_path: Path):
    out = tmp_path / "s.yaml"
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"a file 's.yaml' already.*--force"):
        init(nifti, "--yes", "--out", out)
    assert out.read_text() == "mine"
    init(nifti, "--yes", "--out", out, "--force")
    assert load_any(out)[0] == "study"


def test_questions_have_defaults_that_may_be_changed(
    nifti: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(new_study, "may_ask", lambda: True)
    out = tmp_path / "s.yaml"
    said = init(nifti, "--out", out, text="\nleft,right\n2D\nfull\n")
    for question in ("20 scans: modality unknown, 3D", "Labels:", "Names of", "Slices", "full"):
        assert question in said
    config = yaml.safe_load(out.read_text())
    assert config["tasks"][0]["classes"] == ["left", "right"]
    assert len(config["matrix"]["seeds"]) > 1


MISFITS = [
    (["--classes", "one"], ConfigError, "names 1 class, and the masks hold values up to 2"),
    (["--labels", "nowhere.csv"], ConfigError, "no labels at the path given"),
    (["--task", "regression"], ConfigError, "regression takes a table"),
    (["--patients", "nowhere.csv"], ConfigError, "no table 'nowhere.csv', and a pattern needs"),
]


@pytest.mark.parametrize(("words", "error", "text"), MISFITS, ids=[" ".join(m[0]) for m in MISFITS])
def test_answers_that_do_not_fit_are_explained(
    words: list[str], error: type[Exception], text: str, nifti: Path, tmp_path: Path
):
    with pytest.raises(error, match=text):
        init(nifti, "--yes", "--out", tmp_path / "s.yaml", *words)
    assert not (tmp_path / "s.yaml").exists()


def test_too_few_patients_are_refused(tmp_path: Path):
    folder = write_archive(tmp_path / "few", 2) / "images"
    with pytest.raises(DataError, match=r"2 usable scans of 2 patients.*at least 3 are needed"):
        init(folder, "--task", "none", "--yes", "--out", tmp_path / "p.yaml")
