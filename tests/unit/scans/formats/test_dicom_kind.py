"""What becomes of files by what they say they are, and of files that break off."""

from __future__ import annotations

import struct

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian

from medssl.errors import RejectedScan
from medssl.scans.formats.base import GroupingConfig, Header
from medssl.scans.formats.dicom import DicomFormat
from medssl.scans.header_words import words_of
from medssl.scans.identity import Salt
from samples import linear_volume, write_dicom_series

SALT = Salt(bytes(32))
DICOM = DicomFormat()
FRAME_TIME, FRAME_TIMES, ANGLES = 0x00181063, 0x00181065, 0x00181510
CINES = {"XA": "12.1", "RF": "12.2", "US": "3.1"}


@pytest.mark.parametrize("modality", CINES)
@pytest.mark.parametrize(
    ("pointer", "reason"),
    [
        (None, ""),
        (FRAME_TIME, ""),
        (FRAME_TIMES, ""),
        ([FRAME_TIME, ANGLES], ""),
        (ANGLES, "multi_frame_unsupported"),
        ([ANGLES, 0x00181511], "multi_frame_unsupported"),
    ],
)
def test_frames_by_anything_but_time_are_no_cine(tmp_path, modality, pointer, reason):
    (path,) = write_dicom_series(linear_volume((8, 7, 1)), np.eye(4), tmp_path)
    dataset = pydicom.dcmread(path)
    dataset.SOPClassUID = f"1.2.840.10008.5.1.4.1.1.{CINES[modality]}"
    dataset.Modality, dataset.NumberOfFrames = modality, 3
    dataset.PixelData = 3 * dataset.PixelData
    if pointer is not None:
        dataset.FrameIncrementPointer = pointer
    dataset.save_as(path)
    assert DICOM.read_header(path, "x.dcm", SALT).reason == reason


def test_file_that_starts_with_its_meta_information_is_read(tmp_path):
    (path,) = write_dicom_series(linear_volume((8, 7, 1)), np.eye(4), tmp_path)
    wanted = DICOM.read_voxels([path], {}).voxels_CXYZ
    bare = tmp_path / "IM1"
    bare.write_bytes(path.read_bytes()[132:])
    assert DICOM.claims(bare, bare.read_bytes()[:512])
    np.testing.assert_array_equal(DICOM.read_voxels([bare], {}).voxels_CXYZ, wanted)


def test_big_endian_file_without_meta_information_is_read(tmp_path):
    (path,) = write_dicom_series(linear_volume((8, 7, 1)), np.eye(4), tmp_path)
    wanted = DICOM.read_voxels([path], {}).voxels_CXYZ
    dataset = pydicom.dcmread(path)
    dataset.PixelData = dataset.pixel_array.astype(">i2").tobytes()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    # pydicom turns values round only for a data set that names no encoding of its own.
    fresh = Dataset(dataset)
    fresh.file_meta = dataset.file_meta
    fresh.save_as(path, implicit_vr=False, little_endian=False)
    content = path.read_bytes()
    bare = tmp_path / "IM1"
    bare.write_bytes(content[content.index(b"\x00\x08\x00") :])
    assert DICOM.claims(bare, bare.read_bytes()[:512])
    np.testing.assert_array_equal(DICOM.read_voxels([bare], {}).voxels_CXYZ, wanted)


@pytest.mark.parametrize("head", [b"\x00\x08\x00\x08\x00\x00", b"\x02\x00\x01\x00\x00\x00", b""])
def test_other_starts_are_not_claimed(tmp_path, head):
    assert not DICOM.claims(tmp_path / "x", head + bytes(200))


@pytest.mark.parametrize("modality", ["MR", "CT", "PT", "DX"])
def test_file_cut_anywhere_behind_its_series_keeps_its_key_and_is_named_damaged(tmp_path, modality):
    (path,) = write_dicom_series(linear_volume((4, 4, 1)), np.eye(4), tmp_path, modality=modality)
    content = path.read_bytes()
    key = DICOM.read_header(path, "x.dcm", SALT).series_key
    start = content.index(struct.pack("<HH", 0x0020, 0x000E) + b"UI")
    length = struct.unpack_from("<H", content, start + 6)[0]
    for end in range(start + 8 + length, len(content)):
        path.write_bytes(content[:end])
        header = DICOM.read_header(path, "x.dcm", SALT)
        assert header.series_key == key
        assert header.reason in ("truncated_pixels", "unreadable")


@pytest.mark.parametrize("modality", ["MR", "DX"])
def test_file_cut_before_its_series_is_never_taken_for_no_image(tmp_path, modality):
    (path,) = write_dicom_series(linear_volume((4, 4, 1)), np.eye(4), tmp_path, modality=modality)
    content = path.read_bytes()
    for end in range(132, content.index(struct.pack("<HH", 0x0020, 0x000E) + b"UI")):
        path.write_bytes(content[:end])
        try:
            reason = DICOM.read_header(path, "x.dcm", SALT).reason
        except RejectedScan as error:
            reason = error.reason
        assert reason in ("truncated_pixels", "unreadable")


NUMBER = "123456789"
ELEMENTS = {
    "rows": (0x0028, 0x0010), "columns": (0x0028, 0x0011), "bits": (0x0028, 0x0101),
    "acquisition": (0x0020, 0x0012), "frames": (0x0028, 0x0008),
}  # fmt: skip


@pytest.mark.parametrize("name", ELEMENTS)
def test_number_where_none_of_its_kind_belongs_is_not_told(tmp_path, name):
    (path,) = write_dicom_series(linear_volume((4, 4, 1)), np.eye(4), tmp_path)
    dataset = pydicom.dcmread(path)
    dataset.AcquisitionNumber, dataset.NumberOfFrames = 1, 1
    dataset.save_as(path)
    content, tag = path.read_bytes(), struct.pack("<HH", *ELEMENTS[name])
    at = content.index(tag)
    behind = at + 8 + struct.unpack_from("<H", content, at + 6)[0]
    value = NUMBER.encode() + b" "
    path.write_bytes(content[:at] + tag + b"IS\x0a\x00" + value + content[behind:])
    header = DICOM.read_header(path, "x.dcm", SALT)
    told = repr(words_of([header]))
    try:
        DICOM.read_voxels([path], {})
    except RejectedScan as error:
        told += str(error)
    groups = [] if header.reason else DICOM.group([header], GroupingConfig())
    assert NUMBER[:4] not in told
    assert NUMBER[:4] not in repr([group.identity for group in groups])


def test_facts_beyond_what_is_plausible_are_told_as_such():
    header = Header(
        "x", "dicom", facts={"acquisition": 1.2e8, "bits": [12345678, 12], "rows": 12345678}
    )
    told = words_of([header])
    assert told["acquisition"] == told["rows"] == "implausible"
    assert told["bits stored"] == "12 of implausible"
