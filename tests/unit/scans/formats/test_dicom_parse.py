"""Parsing: deflated, damaged, large and changing files."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medssl.errors import RejectedScan
from medssl.scans.formats import _dicom_parse
from medssl.scans.formats.base import REASONS, GroupingConfig
from medssl.scans.formats.dicom import DicomFormat
from medssl.scans.identity import Salt
from samples import linear_volume, write_dicom_series

SALT = Salt(bytes(32))
DICOM = DicomFormat()


def write(folder):
    (path,) = write_dicom_series(linear_volume((40, 30, 1)), np.eye(4), folder, modality="DX")
    return path


def deflate(path, padding=0):
    """Write a file again in the deflated transfer syntax, with so many bytes of zeros added."""
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    if padding:
        dataset.DataSetTrailingPadding = bytes(padding)
    dataset.save_as(path)


def test_deflated_file_is_read(tmp_path):
    volume = linear_volume()
    for path in write_dicom_series(volume, np.eye(4), tmp_path):
        deflate(path)
    headers = [DICOM.read_header(path, path.name, SALT) for path in sorted(tmp_path.iterdir())]
    (group,) = DICOM.group(headers, GroupingConfig())
    read = DICOM.read_voxels([tmp_path / header.path for header in group.headers], {})
    np.testing.assert_array_equal(
        np.sort(read.voxels_CXYZ[0], axis=None), np.sort(volume, axis=None)
    )


def test_deflated_file_is_not_inflated_beyond_the_limit(tmp_path, monkeypatch):
    (path,) = write_dicom_series(linear_volume((4, 4, 1)), np.eye(4), tmp_path)
    deflate(path, padding=10**7)
    monkeypatch.setattr(_dicom_parse, "MAX_INFLATED_BYTES", 2**20)
    with pytest.raises(RejectedScan, match="grows beyond") as caught:
        DICOM.read_header(path, "x.dcm", SALT)
    assert caught.value.reason == "too_large"


def test_deflated_file_cut_short_is_named(tmp_path):
    (path,) = write_dicom_series(linear_volume((40, 40, 1)), np.eye(4), tmp_path)
    deflate(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RejectedScan) as caught:
        DICOM.read_header(path, "x.dcm", SALT)
    assert caught.value.reason == "truncated_pixels"


def test_file_that_changes_while_it_is_read_is_rejected(tmp_path, monkeypatch):
    path = write(tmp_path)
    parse = _dicom_parse._parse_content

    def grow(*arguments):
        with path.open("ab") as file:
            file.write(b"more")
        return parse(*arguments)

    monkeypatch.setattr(_dicom_parse, "_parse_content", grow)
    with pytest.raises(RejectedScan, match="changed while it was read") as caught:
        DICOM.read_header(path, path.name, SALT)
    assert caught.value.reason == "changed_while_read"


def test_large_file_is_read_piece_by_piece_with_the_same_digest(tmp_path, monkeypatch):
    path = write(tmp_path)
    at_once = DICOM.read_header(path, path.name, SALT)
    monkeypatch.setattr(_dicom_parse, "WHOLE_FILE_BYTES", 100)
    assert DICOM.read_header(path, path.name, SALT) == at_once
    assert DICOM.read_voxels([path], {}).voxels_CXYZ.shape == (1, 40, 30)


def outcome(path):
    """The reason for which a file is rejected at any stage, or ""."""
    try:
        header = DICOM.read_header(path, "x.dcm", SALT)
        if header.reason:
            return header.reason
        (group,) = DICOM.group([header], GroupingConfig())
        if not group.reason:
            DICOM.read_voxels([path], group.reading)
    except RejectedScan as error:
        return error.reason
    return group.reason


@pytest.mark.parametrize("seed", range(60))
def test_damaged_file_is_read_or_rejected_by_a_reason(tmp_path, seed):
    random = np.random.default_rng(seed)
    path = write(tmp_path)
    content = bytearray(path.read_bytes())
    for place in random.integers(128, 1100, 5):
        content[place] = random.integers(256)
    path.write_bytes(content)
    assert outcome(path) in {"", *REASONS}
