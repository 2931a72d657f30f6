"""A planted name, number and UID get nowhere: private paths apart, not even into private/."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pydicom
import pytest

from medssl.errors import MedsslError
from medssl.pipelines import audit, inspect
from medssl.pipelines.index import describe, index_scans
from medssl.scans.index import Index
from medssl.scans.scan import load_scan, read_scan
from samples import NAME, PATIENT_ID, PLANTED, linear_volume, write_dicom_series, write_nifti


@pytest.fixture
def folder(tmp_path):
    """Every kind of file, usable and not, all of the same planted patient."""
    root = tmp_path / "in" / NAME
    write_dicom_series(linear_volume(), np.eye(4), root / "good", number=1)
    for number, harm in enumerate(
        (
            lambda path: path.unlink(),
            lambda path: path.write_bytes(path.read_bytes()[:-90]),
            lambda path: path.write_bytes(path.read_bytes()[:500]),
            lambda path: _edit(path, Modality="DOE"),
            lambda path: _edit(path, PixelSpacing=None),
            lambda path: _edit(path, ImageType=["DERIVED", "SECONDARY", "DOE"]),
            lambda path: path.write_text(NAME),
        ),
        start=2,
    ):
        harm(write_dicom_series(linear_volume(), np.eye(4), root / str(number), number=number)[3])
    write_nifti(root / f"{PATIENT_ID}.nii.gz")
    (root / f"{NAME}.nii.gz").write_text(NAME)
    (root / f"{NAME}.txt").write_text(NAME)
    return root


def _edit(path, **values):
    dataset = pydicom.dcmread(path)
    for keyword, value in values.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(path)


def planted_in(content):
    data = content if isinstance(content, bytes) else content.encode()
    return [word for word in PLANTED if word.encode() in data]


def test_planted_identity_is_in_no_shareable_file(folder, tmp_path):
    index = index_scans(folder, tmp_path / "index")
    audit.run(index)
    checked = 0
    for path in index.folder.rglob("*"):
        if path.is_file() and "private" not in path.parts:
            assert not planted_in(path.read_bytes())
            checked += 1
    assert checked == 5  # table, summary, and the audit as a page, CSV and JSON
    assert not planted_in(index.table.to_csv())


def test_private_part_holds_paths_but_no_value_of_a_header(folder, tmp_path):
    plain = tmp_path / "renamed"
    folder.rename(plain)
    for path in list(plain.glob("*.*")):
        path.rename(plain / f"x{len(path.name)}{''.join(path.suffixes[-2:])}")
    index = index_scans(plain, tmp_path / "index")
    audit.run(index)
    for path in (index.folder / "private").iterdir():
        assert not planted_in(path.read_bytes()), path.name


@pytest.mark.parametrize("num_workers", [0, 1])
def test_planted_identity_is_neither_printed_logged_nor_warned(
    folder, tmp_path, capfd, caplog, recwarn, num_workers
):
    caplog.set_level(logging.DEBUG)
    index = index_scans(folder, tmp_path / "index", num_workers=num_workers)
    audit.run(index)
    for key in index.accepted["scan_key"]:
        load_scan(index, key)
    sys.stdout.write("\n".join(describe(index)))
    for part in (folder / "good", folder / "2", folder / f"{PATIENT_ID}.nii.gz"):
        sys.stdout.write("\n".join(inspect.describe(inspect.run(str(part)), "asked")))
    printed = capfd.readouterr()
    warned = "".join(str(warning.message) for warning in recwarn.list)
    assert not planted_in(printed.out + printed.err + caplog.text + warned)


def test_errors_name_keys_only(folder, tmp_path):
    index = index_scans(folder, tmp_path / "index")
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_text(NAME)
    messages = []
    for key in index.accepted["scan_key"]:
        with pytest.raises(MedsslError) as caught:
            read_scan(Index.open(index.folder), key)
        assert caught.value.__cause__ is None
        assert key in str(caught.value)
        messages.append(str(caught.value))
    assert messages
    assert not planted_in("".join(messages))


def test_refusals_name_nobody(folder, tmp_path):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_text(NAME)
    with pytest.raises(MedsslError) as caught:
        index_scans(folder, tmp_path / "index")
    assert not planted_in(str(caught.value))
