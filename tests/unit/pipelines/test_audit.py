from __future__ import annotations

import csv
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from medssl.cli import cli
from medssl.errors import DataError
from medssl.pipelines import audit
from medssl.pipelines.index import describe, index_scans
from medssl.scans.index import Index
from samples import PLANTED, linear_volume, rotation_affine, write_dicom_series, write_nifti
from tests.unit.reports.test_html import Page


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """An index of planted scans, accepted and rejected; not to be changed."""
    root = tmp_path_factory.mktemp("DOE_JANE_PLANTED")
    write_dicom_series(linear_volume(), rotation_affine(), root / "good")
    gap = write_dicom_series(
        linear_volume((9, 8, 7)), rotation_affine(), root / "gap", number=2, seed=None
    )
    gap[3].unlink()
    face = {"BodyPartExamined": "HEAD"}
    write_dicom_series(
        linear_volume((7, 7, 7)), rotation_affine(), root / "head", number=3, extra=face
    )
    write_nifti(root / "sub-DOE_PLANTED.nii.gz")
    (root / "DOE^JANE 7341.txt").write_text("DOE^JANE")
    return index_scans(root, tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="module")
def audited(made: Index) -> Index:
    audit.run(made)
    return made


def page_of(folder: Path) -> Page:
    return Page((folder / "audit.html").read_text(encoding="utf-8"))


def images(page: Page) -> list[dict[str, str]]:
    return [attributes for tag, attributes in page.tags if tag == "img"]


def test_accepted_scans_are_pictured_and_faces_are_not(audited: Index):
    page = page_of(audited.folder)
    assert len(audited.accepted) == 3
    assert len(images(page)) == 2
    assert "Not pictured: may_show_face" in page.text


def test_nothing_that_is_shown_names_a_patient_or_a_path(audited: Index):
    for name in ("audit.html", "audit.csv", "audit.json"):
        content = (audited.folder / name).read_text(encoding="utf-8")
        words = Page(content).text if name.endswith("html") else content
        assert not [word for word in (*PLANTED, "good", str(Path.home())) if word in words]


def test_rejected_files_are_listed_by_path_for_their_owner_alone(audited: Index):
    path = audited.folder / "private" / "rejected.csv"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["reason"] for row in rows] == ["missing_slice"] * 6 + ["not_a_scan"]
    assert rows[-1]["path"] == "./DOE^JANE 7341.txt"
    assert set(rows[0]) == {"reason", "remedy", "scan_key", "path"}


def test_names_that_are_not_utf_8_are_listed_with_their_own_bytes(tmp_path: Path):
    root = tmp_path / "scans"
    write_nifti(root / "a.nii.gz")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.txt")).write_text("no scan")
    index = index_scans(root, tmp_path / "index")
    audit.run(index)
    assert b"./caf\xe9.txt" in (index.folder / "private" / "rejected.csv").read_bytes()


def test_the_page_is_the_same_every_time(audited: Index, tmp_path: Path):
    first = audit.run(audited, tmp_path / "a", max_scans=2).read_bytes()
    assert audit.run(audited, tmp_path / "b", max_scans=2).read_bytes() == first


def test_progress_is_told(made: Index, tmp_path: Path):
    told = []
    audit.run(made, tmp_path, progress=lambda *step, **_: told.append(step))
    assert told[-1] == ("drawing the audit", 3, 3)


def test_no_pictures_are_drawn_when_none_are_wanted(made: Index, tmp_path: Path):
    audit.run(made, tmp_path, max_scans=0)
    page = page_of(tmp_path)
    assert not images(page)
    assert "3 scans" in page.text


def test_scans_that_are_gone_get_a_tile_that_says_so(tmp_path: Path):
    root = tmp_path / "scans"
    for number in range(2):
        write_nifti(root / f"{number}.nii.gz", seed=number)
    index = index_scans(root, tmp_path / "index")
    (root / "1.nii.gz").unlink()
    audit.run(index)
    page = page_of(index.folder)
    assert len(images(page)) == 1
    assert "Its files are not where they were indexed." in page.text


def test_a_scan_that_ends_its_worker_gets_a_tile_that_says_so(made: Index):
    row = next(
        row for key in made.accepted["scan_key"] if len((row := made.row(key))["flags"]) == 0
    )
    assert "took more memory" in audit._lost(row, "out_of_memory").problem
    assert "took longer" in audit._lost(row, "too_slow").problem
    assert "ended the worker" in audit._lost(row, "died").problem


def test_an_index_without_its_private_part_is_refused(made: Index, tmp_path: Path):
    for name in ("index.parquet", "summary.json"):
        (tmp_path / name).write_bytes((made.folder / name).read_bytes())
    with pytest.raises(DataError, match="this index has no private part"):
        audit.run(tmp_path)


def test_a_folder_without_an_index_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"there is no index in the folder given"):
        audit.run(tmp_path)


# ----------------------------------------------------------------------------------- command line


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for number in range(3):
        write_nifti(tmp_path / "scans" / f"{number}.nii.gz", seed=number)
    write_nifti(tmp_path / "scans" / "flat.nii.gz", np.zeros((5, 5, 5), np.float32))
    return tmp_path / "scans"


def test_indexing_writes_the_audit(scans: Path, tmp_path: Path):
    output = invoke("index", scans, "--out", tmp_path / "index")
    assert (tmp_path / "index" / "audit.html").is_file()
    assert f"Audit: {tmp_path / 'index' / 'audit.html'} (shows pixels of patients" in output


def test_indexing_without_an_audit_writes_none(scans: Path, tmp_path: Path):
    output = invoke("index", scans, "--out", tmp_path / "index", "--no-audit")
    assert "Audit" not in output
    assert not (tmp_path / "index" / "audit.html").exists()


def test_the_audit_is_written_anew_with_fewer_scans(scans: Path, tmp_path: Path):
    invoke("index", scans, "--out", tmp_path / "index", "--no-audit")
    answer = json.loads(
        invoke("audit", tmp_path / "index", "--max-scans", 2, "--out", tmp_path / "on", "--json")
    )
    assert answer["audit"] == str(tmp_path / "on" / "audit.html")
    assert len(images(page_of(tmp_path / "on"))) == 2


def test_an_index_run_is_summed_up_by_modality_reason_and_flag(made: Index):
    lines = describe(made)
    assert "by modality: MR 2, unknown 1" in lines
    assert any(line.startswith("rejected 6 files: missing_slice. A gap") for line in lines)
    assert any(line.startswith("flagged 1 scans: may_show_face. A scan of") for line in lines)
