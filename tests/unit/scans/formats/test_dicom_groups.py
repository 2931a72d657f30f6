"""Which slices of a series belong together, beyond what the series itself says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medssl.scans.formats.base import GroupingConfig
from medssl.scans.formats.dicom import DicomFormat
from medssl.scans.identity import Salt
from samples import OBLIQUE, linear_volume, write_dicom_series

SALT = Salt(bytes(32))
DICOM = DicomFormat()
SHAPE = (8, 7, 6)
MAGNITUDE, PHASE = ["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]


class MoreConfig(GroupingConfig):
    folder: Path = Path("/data/DOE^JANE")


def groups_of(folder, config=None):
    paths = sorted(folder.rglob("*.dcm"))
    headers = [DICOM.read_header(path, str(path.relative_to(folder)), SALT) for path in paths]
    assert [header.reason for header in headers] == [""] * len(headers)
    return DICOM.group(headers, config or GroupingConfig())


def outcome(folder):
    groups = groups_of(folder)
    assert len({group.identity for group in groups}) == len(groups)
    return sorted((group.reason, len(group.headers)) for group in groups)


def write_volume(folder, *, shift=0.0, add=0, thickness=None, shape=SHAPE, **values):
    """Write one volume, moved by so many slices."""
    affine = OBLIQUE.copy()
    affine[:3, 3] += shift * affine[:3, 2]
    paths = write_dicom_series(linear_volume(shape, affine) + np.int16(add), affine, folder,
                               extra=values, seed=None)  # fmt: skip
    for path in paths if thickness is not None else ():
        dataset = pydicom.dcmread(path)
        dataset.SliceThickness = thickness
        dataset.save_as(path)
    return paths


GAP_MM = float(np.linalg.norm(OBLIQUE[:3, 2]))


def test_what_is_read_holds_nothing_of_a_wider_config(tmp_path):
    write_volume(tmp_path)[2].unlink()
    (group,) = groups_of(tmp_path, MoreConfig(irregular_spacing="resample"))
    assert group.reading == {"irregular_spacing": "resample", "gantry_tilt": "skip"}
    assert json.loads(json.dumps(group.reading)) == group.reading


@pytest.mark.parametrize("field", ["TemporalPositionIdentifier", "AcquisitionNumber"])
def test_blank_slices_of_two_time_points_are_no_copies(tmp_path, field):
    for time in (1, 2):
        path = write_volume(tmp_path / str(time), add=time, **{field: time})[-1]
        dataset = pydicom.dcmread(path)
        dataset.PixelData = bytes(len(dataset.PixelData))
        dataset.save_as(path)
    assert outcome(tmp_path) == [("", 6), ("", 6)]


def test_magnitude_and_phase_between_each_other_become_two_scans(tmp_path):
    write_volume(tmp_path / "m", ImageType=MAGNITUDE)
    write_volume(tmp_path / "p", shift=0.5, ImageType=PHASE)
    assert outcome(tmp_path) == [("", 6), ("", 6)]


def test_acquisitions_half_a_gap_apart_become_two_scans(tmp_path):
    write_volume(tmp_path / "1", AcquisitionNumber=1)
    write_volume(tmp_path / "2", shift=0.5, AcquisitionNumber=2)
    assert outcome(tmp_path) == [("", 6), ("", 6)]


def test_odd_and_even_slices_measured_in_turns_stay_one_scan(tmp_path):
    write_volume(tmp_path / "1", thickness=GAP_MM / 2, AcquisitionNumber=1)
    write_volume(tmp_path / "2", shift=0.5, thickness=GAP_MM / 2, AcquisitionNumber=2)
    assert outcome(tmp_path) == [("", 12)]


@pytest.mark.parametrize("field", ["AcquisitionNumber", "ImageType"])
def test_blocks_behind_each_other_stay_one_scan(tmp_path, field):
    values = (1, 2) if field == "AcquisitionNumber" else (MAGNITUDE, PHASE)
    write_volume(tmp_path / "1", **{field: values[0]})
    write_volume(tmp_path / "2", shift=6, **{field: values[1]})
    assert outcome(tmp_path) == [("", 12)]


def test_image_types_in_no_order_do_not_tear_a_volume_apart(tmp_path):
    for number, path in enumerate(write_volume(tmp_path)):
        dataset = pydicom.dcmread(path)
        dataset.ImageType = PHASE if number in (0, 1, 3) else MAGNITUDE
        dataset.save_as(path)
    assert outcome(tmp_path) == [("", 6)]


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_magnitude_and_phase_of_two_acquisitions_become_four_scans(tmp_path, shift):
    for number, image_type in enumerate((MAGNITUDE, PHASE)):
        for acquisition in (1, 2):
            write_volume(tmp_path / f"{number}{acquisition}", add=10 * number + acquisition,
                         shift=shift * number, ImageType=image_type,
                         AcquisitionNumber=acquisition)  # fmt: skip
    assert outcome(tmp_path) == [("", 6)] * 4


def test_radiographs_that_share_an_instance_are_told_apart_by_their_pixels(tmp_path):
    (path,) = write_dicom_series(linear_volume((8, 7, 1)), np.eye(4), tmp_path, modality="CR")
    dataset = pydicom.dcmread(path)
    dataset.PixelData = bytes(reversed(dataset.PixelData))
    dataset.save_as(tmp_path / "other.dcm")
    shutil.copy(path, tmp_path / "zz-copy.dcm")
    assert outcome(tmp_path) == [("", 1), ("", 1), ("duplicate_file", 1)]
