from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from medssl.cli import cli
from medssl.errors import DataError
from medssl.pipelines import inspect
from medssl.pipelines.index import index_scans
from medssl.scans.formats.base import REASONS, Header
from medssl.scans.header_words import words_of
from samples import PLANTED, linear_volume, rotation_affine, write_dicom_series, write_nifti


def told(target: Path | str, index: Path | None = None) -> str:
    found = inspect.run(str(target), index)
    return "\n".join(inspect.describe(found, Path(target).name))


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A series of 7 slices, 1 x 1 x 2.5 mm; not to be changed."""
    folder = tmp_path_factory.mktemp("series")
    affine = rotation_affine(spacing_mm=(1.0, 1.0, 2.5))
    write_dicom_series(linear_volume((9, 8, 7)), affine, folder, modality="CT")
    return folder


@pytest.fixture
def gap(tmp_path: Path) -> Path:
    affine = rotation_affine(spacing_mm=(1.0, 1.0, 2.5))
    paths = write_dicom_series(linear_volume((9, 8, 7)), affine, tmp_path / "gap", seed=None)
    paths[3].unlink()
    return tmp_path / "gap"


def test_an_accepted_series_is_told_with_its_geometry(series: Path):
    text = told(series)
    assert "7 files, 1 scan accepted, 0 rejected" in text
    assert "accepted as a 3D scan" in text
    assert "grouping: 7 files to one volume" in text
    assert "shape: 9 × 8 × 7" in text
    assert "spacing: 1 × 1 × 2.5 mm" in text
    assert "modality: CT" in text
    assert "photometric interpretation: MONOCHROME2" in text


def test_a_missing_slice_is_told_with_the_gaps_that_were_found(gap: Path):
    text = told(gap)
    assert "rejected: missing_slice" in text
    assert f"why: {REASONS['missing_slice']}" in text
    assert "found: slice gaps run from 2.50 to 5.00 mm" in text
    assert "grouping: 6 files of one series" in text


def test_one_file_of_a_series_is_explained_alone(series: Path):
    file = min(series.iterdir())
    assert f"{file.name}: 1 file, 1 scan accepted" in told(file)


def test_a_sidecar_is_read_with_its_scan_and_not_counted(tmp_path: Path):
    scan = write_nifti(tmp_path / "head.nii.gz")
    (tmp_path / "head.json").write_text(json.dumps({"Modality": "MR"}))
    write_nifti(tmp_path / "other.nii.gz", seed=1)
    text = told(scan)
    assert "head.nii.gz: 1 file, 1 scan accepted, 0 rejected" in text
    assert "modality: MR" in text


def test_a_file_cut_short_is_told_as_such(tmp_path: Path):
    whole = write_nifti(tmp_path / "whole.nii")
    cut = tmp_path / "cut.nii"
    cut.write_bytes(whole.read_bytes()[:-100])
    assert "rejected: truncated_pixels" in told(cut)


def test_a_file_of_no_format_is_told_as_such(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("no scan")
    text = told(tmp_path / "notes.txt")
    assert "rejected: not_a_scan" in text
    assert "format: no format claims it" in text


def test_a_pipe_does_not_block(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    assert "rejected: not_a_scan" in told(tmp_path / "pipe")


def test_flags_come_with_their_meanings(tmp_path: Path):
    text = told(write_nifti(tmp_path / "scan.nii.gz"))
    assert "flag patient_unknown: It names no patient" in text


def test_of_many_rows_a_part_is_shown_and_the_rest_counted(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("medssl.scans.inspection.MAX_EXPLAINED", 2)
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("no scan")
    text = told(tmp_path)
    assert "5 files, 0 scans accepted, 5 rejected" in text
    assert text.count("rejected: not_a_scan") == 2
    assert "3 more: " in text


def test_nothing_that_is_told_names_a_patient(gap: Path, series: Path):
    for folder in (gap, series):
        answer = json.dumps(inspect.facts_of(inspect.run(str(folder))))
        assert not [word for word in PLANTED if word in answer]


def test_nothing_stays_behind(series: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    inspect.run(str(series))
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_beside_the_scans(series: Path):
    before = sorted(series.iterdir())
    inspect.run(str(series))
    assert sorted(series.iterdir()) == before


def test_facts_that_hold_something_else_are_not_told():
    facts = {
        "photometric": "DOE^JANE", "rows": "DOE^JANE", "bits": ["DOE", "JANE"], "signed": "DOE",
        "spacing_mm": [1.0, "DOE"], "acquisition": "JANE", "patient": "DOE", "columns": True,
        "thickness_mm": float("nan"),
    }  # fmt: skip
    assert words_of([Header("x", "dicom", facts=facts)]) == {}


def test_facts_that_differ_within_a_series_are_told_with_all_values():
    headers = [Header(str(n), "dicom", facts={"rows": 8 + n % 2}) for n in range(4)]
    assert words_of(headers) == {"rows": "8; 9"}
    many = [Header(str(n), "dicom", facts={"rows": n}) for n in range(10)]
    assert words_of(many) == {"rows": "0; 1; 2; 3; and 6 more"}


# --------------------------------------------------------------------------------- keys of an index


def test_a_key_of_an_index_is_explained(gap: Path, tmp_path: Path):
    write_nifti(gap / "scan.nii.gz")
    index = index_scans(gap, tmp_path / "index")
    rejected = index.table.loc[index.table["reason"] == "missing_slice", "scan_key"].item()
    text = told(rejected, index.folder)
    assert f"{rejected} rejected: missing_slice" in text
    assert "found: slice gaps run from 2.50 to 5.00 mm" in text
    accepted = index.accepted["scan_key"][0]
    assert f"{accepted} accepted as a 3D scan" in told(accepted, index.folder)


def test_a_key_that_is_not_in_the_index_is_refused(tmp_path: Path):
    write_nifti(tmp_path / "scans" / "scan.nii.gz")
    index = index_scans(tmp_path / "scans", tmp_path / "index")
    with pytest.raises(DataError, match="there is no row 0123 in this index"):
        inspect.run("0123", index.folder)


# ------------------------------------------------------------------------------------ command line


def test_the_answer_comes_as_json(series: Path):
    done = CliRunner().invoke(cli, ["inspect", str(series), "--json"], catch_exceptions=False)
    answer = json.loads(done.output)
    assert answer["counts"] == {"": 1}
    assert answer["explained"][0]["shape"] == [9, 8, 7]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no file or folder at the path given"),
        (lambda path: path.mkdir(), "the folder to index is empty"),
    ],
    ids=["absent", "empty"],
)
def test_what_cannot_be_inspected_ends_with_code_3(tmp_path: Path, make, message: str):
    path = tmp_path / "DOE_JANE"
    make(path)
    done = subprocess.run(
        [sys.executable, "-m", "medssl", "inspect", path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert message in done.stderr
    assert "DOE" not in done.stderr
