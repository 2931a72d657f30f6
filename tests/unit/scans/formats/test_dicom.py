from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import RLELossless

from medssl.errors import GeometryError, RejectedScan
from medssl.scans.formats import _dicom_parse
from medssl.scans.formats._dicom_writer import write_series
from medssl.scans.formats.base import REASONS, GroupingConfig
from medssl.scans.formats.dicom import DicomFormat
from medssl.scans.identity import Salt
from samples import (
    OBLIQUE,
    PLANTED,
    hippocampus,
    linear_values,
    linear_volume,
    write_dicom_series,
)
from strategies import affines, shapes

SALT = Salt(bytes(32))
DICOM = DicomFormat()


def group_of(folder):
    """The groups of all files below a folder, unusable ones included as their own."""
    headers = [
        DICOM.read_header(path, str(path.relative_to(folder)), SALT)
        for path in sorted(folder.rglob("*.dcm"))
    ]
    rejected = [header.reason for header in headers if header.reason]
    return DICOM.group(
        [header for header in headers if not header.reason], GroupingConfig()
    ), rejected


def read_back(folder):
    groups, rejected = group_of(folder)
    assert not rejected
    (group,) = groups
    assert group.reason == ""
    return group, DICOM.read_voxels([folder / header.path for header in group.headers], {})


def edit(path, **values):
    dataset = pydicom.dcmread(path)
    for keyword, value in values.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(path)


def corrupt(path, tag, old, new):
    """Replace the value of one element in place, past what pydicom would agree to write."""
    content = path.read_bytes()
    at = content.index(struct.pack("<HH", *tag))
    start = content.index(old, at)
    assert len(old) == len(new)
    path.write_bytes(content[:start] + new + content[start + len(old) :])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("rescale", [(1.0, 0.0), (0.5, -1024.0)])
@pytest.mark.parametrize("oblique", [True, False])
def test_real_volume_as_series_reads_back_as_it_was(tmp_path, signed, rescale, oblique):
    volume, affine = hippocampus(1)
    affine = OBLIQUE if oblique else affine
    write_dicom_series(volume, affine, tmp_path, signed=signed, rescale=rescale)
    _, read = read_back(tmp_path)
    np.testing.assert_array_equal(read.voxels_CXYZ[0], volume.astype(np.float32))
    np.testing.assert_allclose(read.affine, affine, atol=1e-6)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(affine=affines(), shape=shapes(), seed=st.integers(0, 99))
def test_whatever_is_grouped_is_assembled_where_it_lies(tmp_path, affine, shape, seed):
    folder = tmp_path / "series"
    shutil.rmtree(folder, ignore_errors=True)
    values = linear_values(affine, shape)
    slope = float(f"{np.ptp(values) / 60000 + 1e-3:.6g}")
    intercept = float(np.floor(values.min()))
    write_dicom_series(values, affine, folder, signed=False, rescale=(slope, intercept), seed=seed)
    group, read = read_back(folder)
    assert group.shape == read.voxels_CXYZ[0].shape
    np.testing.assert_allclose(group.affine, read.affine)
    expected = linear_values(read.affine, read.voxels_CXYZ[0].shape)
    np.testing.assert_allclose(read.voxels_CXYZ[0], expected, atol=slope + 1e-3)


def test_rescaling_is_applied_slice_by_slice(tmp_path):
    volume = np.full((3, 3, 4), 100, np.int16) + np.arange(4, dtype=np.int16)
    paths = write_dicom_series(volume, np.eye(4), tmp_path, modality="PT")
    for number, path in enumerate(paths):
        edit(path, RescaleSlope=number + 1, RescaleIntercept=0)
    _, read = read_back(tmp_path)
    assert read.voxels_CXYZ[0][0, 0].tolist() == [100, 202, 306, 412]


def test_windows_for_display_do_not_touch_the_values(tmp_path):
    volume = linear_volume()
    extra = {"WindowCenter": 40, "WindowWidth": 10}
    write_dicom_series(volume, np.eye(4), tmp_path, modality="CT", extra=extra)
    group, read = read_back(tmp_path)
    np.testing.assert_array_equal(
        np.sort(read.voxels_CXYZ[0], axis=None), np.sort(volume, axis=None)
    )
    assert group.intensity == "HU"


def test_single_slice_is_a_2d_scan(tmp_path):
    write_dicom_series(linear_volume((6, 5, 1), OBLIQUE), OBLIQUE, tmp_path)
    group, read = read_back(tmp_path)
    assert (group.dims, group.shape) == ("2D", (6, 5))
    expected = linear_values(read.affine, (6, 5, 1))[..., 0]
    np.testing.assert_allclose(read.voxels_CXYZ[0], expected, atol=0.6)


def test_radiograph_needs_no_place_in_the_patient(tmp_path):
    (path,) = write_dicom_series(linear_volume((6, 5, 1)), np.eye(4), tmp_path, modality="DX")
    edit(path, ImagePositionPatient=None, ImageOrientationPatient=None, PixelSpacing=None,
         ImagerPixelSpacing=[0.2, 0.1])  # fmt: skip
    group, read = read_back(tmp_path)
    assert group.flags == ("no_patient_geometry",)
    np.testing.assert_allclose(np.diag(read.affine)[:2], [-0.1, -0.2])


def test_inverted_radiograph_is_turned_to_white_on_black(tmp_path):
    volume = np.array([[[0], [1000], [4095]]], np.uint16)
    (path,) = write_dicom_series(volume, np.eye(4), tmp_path, modality="DX", signed=False)
    edit(path, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11)
    group, read = read_back(tmp_path)
    assert "monochrome1" in group.flags
    assert read.voxels_CXYZ[0].tolist() == [[4095, 3095, 0]]


def test_run_length_encoding_is_read(tmp_path):
    volume = linear_volume()
    for path in write_dicom_series(volume, np.eye(4), tmp_path):
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless)
        dataset.save_as(path)
    _, read = read_back(tmp_path)
    np.testing.assert_array_equal(
        np.sort(read.voxels_CXYZ[0], axis=None), np.sort(volume, axis=None)
    )


def test_two_series_in_one_folder_stay_apart(tmp_path):
    write_dicom_series(linear_volume(), np.eye(4), tmp_path / "a", number=1)
    write_dicom_series(linear_volume((8, 7, 5)), np.eye(4), tmp_path / "b", number=2)
    for path in sorted((tmp_path / "b").iterdir()):
        path.rename(tmp_path / "a" / f"second-{path.name}")
    groups, _ = group_of(tmp_path)
    assert sorted(group.shape for group in groups) == [(8, 7, 5), (8, 7, 6)]


def test_echoes_of_one_series_become_scans_of_their_own(tmp_path):
    for echo in (1, 2):
        volume = linear_volume() + np.int16(echo)
        extra = {"EchoNumbers": echo, "EchoTime": 10 * echo}
        write_dicom_series(volume, np.eye(4), tmp_path / str(echo), extra=extra)
    groups, _ = group_of(tmp_path)
    assert [group.shape for group in groups] == [(8, 7, 6), (8, 7, 6)]
    assert len({group.identity for group in groups}) == 2


def test_acquisitions_that_share_places_become_scans_of_their_own(tmp_path):
    for phase in (1, 2):
        volume = linear_volume() + np.int16(phase)
        write_dicom_series(volume, np.eye(4), tmp_path / str(phase),
                           extra={"AcquisitionNumber": phase})  # fmt: skip
    groups, _ = group_of(tmp_path)
    assert [group.reason for group in groups] == ["", ""]


def test_one_acquisition_number_a_slice_is_still_one_scan(tmp_path):
    for number, path in enumerate(write_dicom_series(linear_volume(), np.eye(4), tmp_path)):
        edit(path, AcquisitionNumber=number)
    group, _ = read_back(tmp_path)
    assert group.shape == (8, 7, 6)


def test_copied_slice_is_set_aside_and_the_series_kept(tmp_path):
    paths = write_dicom_series(linear_volume(), np.eye(4), tmp_path)
    shutil.copy(paths[2], tmp_path / "zz-copy.dcm")
    groups, _ = group_of(tmp_path)
    assert [(group.reason, len(group.headers)) for group in groups] == [
        ("duplicate_file", 1),
        ("", 6),
    ]


def break_missing(paths):
    paths[3].unlink()


def break_duplicate(paths):
    edit(paths[3], ImagePositionPatient=list(pydicom.dcmread(paths[2]).ImagePositionPatient))


def break_orientation(paths):
    edit(paths[3], ImageOrientationPatient=[1, 0, 0, 0, 0, 1])


def break_size(paths):
    dataset = pydicom.dcmread(paths[3])
    edit(paths[3], Rows=dataset.Columns, Columns=dataset.Rows)


def break_tilt(paths):
    for number, path in enumerate(paths):
        x, y, z = pydicom.dcmread(path).ImagePositionPatient
        edit(path, ImagePositionPatient=[x, y + 0.2 * number, z])


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (break_missing, "missing_slice"),
        (break_duplicate, "duplicate_position"),
        (break_orientation, "mixed_orientation"),
        (break_size, "mixed_size"),
        (break_tilt, "gantry_tilt"),
    ],
)
def test_series_that_is_no_volume_is_rejected_whole(tmp_path, harm, reason):
    harm(write_dicom_series(linear_volume(), np.eye(4), tmp_path))
    groups, rejected = group_of(tmp_path)
    assert not rejected
    assert [group.reason for group in groups] == [reason]
    assert sum(len(group.headers) for group in groups) == len(list(tmp_path.iterdir()))


SOP = "1.2.840.10008.5.1.4.1.1."


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"ImageOrientationPatient": None}, "no_orientation"),
        ({"ImagePositionPatient": None}, "no_orientation"),
        ({"PixelSpacing": None}, "nonfinite_geometry"),
        ({"PixelSpacing": [0, 1]}, "nonfinite_geometry"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "nonfinite_geometry"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"ImageType": ["DERIVED", "SECONDARY"]}, "derived"),
        ({"ImageType": ["DERIVED", "PRIMARY", "MPR"]}, "derived"),
        ({"SOPClassUID": SOP + "7"}, "secondary_capture"),
        ({"SOPClassUID": SOP + "88.11"}, "not_an_image"),
        ({"SOPClassUID": SOP + "66.4"}, "not_an_image"),
        ({"SOPClassUID": "1.3.12.2.1107.5.9.1"}, "not_an_image"),
        ({"SOPClassUID": SOP + "4.1"}, "multi_frame_unsupported"),
        ({"NumberOfFrames": 3}, "multi_frame_unsupported"),
        ({"SamplesPerPixel": 3}, "colour_unsupported"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour_unsupported"),
        ({"Rows": 60000, "Columns": 60000}, "too_large"),
        ({"Rows": 0}, "nonfinite_geometry"),
        ({"PixelData": None}, "truncated_pixels"),
    ],
)
def test_unusable_file_gets_its_reason(tmp_path, values, reason):
    edit(write_dicom_series(linear_volume(), np.eye(4), tmp_path)[0], **values)
    _, rejected = group_of(tmp_path)
    assert rejected == [reason]


@pytest.mark.parametrize("text", [b"nan", b"inf", b"1e999"])
def test_rescaling_that_is_not_finite_is_rejected(tmp_path, text):
    (path,) = write_dicom_series(linear_volume((4, 4, 1)), np.eye(4), tmp_path, modality="PT",
                                 rescale=(12345.0, 0.0))  # fmt: skip
    corrupt(path, (0x0028, 0x1053), b"12345.0 ", text.ljust(8))
    _, rejected = group_of(tmp_path)
    assert rejected == ["nonfinite_geometry"]


@pytest.mark.parametrize("kept", [0.05, 0.3, 0.6, 0.9, 0.999])
def test_truncated_file_is_rejected_at_every_length(tmp_path, kept):
    (path,) = write_dicom_series(linear_volume((40, 40, 1)), np.eye(4), tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    try:
        reason = DICOM.read_header(path, "x.dcm", SALT).reason
    except RejectedScan as error:
        reason = error.reason
    assert reason in ("truncated_pixels", "unreadable")


def test_pixels_cut_short_are_named(tmp_path):
    (path,) = write_dicom_series(linear_volume((40, 40, 1)), np.eye(4), tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    _, rejected = group_of(tmp_path)
    assert rejected == ["truncated_pixels"]


def test_compressed_pixels_cut_short_are_named(tmp_path):
    (path,) = write_dicom_series(linear_volume((40, 40, 1)), np.eye(4), tmp_path)
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless)
    dataset.save_as(path)
    path.write_bytes(path.read_bytes()[:-40])
    _, rejected = group_of(tmp_path)
    assert rejected == ["truncated_pixels"]


def test_syntax_without_a_decoder_is_rejected(tmp_path):
    (path,) = write_dicom_series(linear_volume((4, 4, 1)), np.eye(4), tmp_path)
    corrupt(path, (0x0002, 0x0010), b"1.2.840.10008.1.2.1\x00", b"1.2.840.99999.9.9.9\x00")
    _, rejected = group_of(tmp_path)
    assert rejected == ["unsupported_transfer_syntax"]


def test_file_without_the_dicom_mark_is_read(tmp_path):
    folder = tmp_path / "in"
    for path in write_dicom_series(linear_volume(), np.eye(4), folder):
        content = path.read_bytes()
        start = content.index(struct.pack("<HH2s", 0x0008, 0x0008, b"CS"))
        path.write_bytes(content[start:])
        assert DICOM.claims(path.with_suffix(""), path.read_bytes()[:512])
    _, read = read_back(folder)
    assert read.voxels_CXYZ[0].shape == (8, 7, 6)


def test_header_holds_no_identifier(tmp_path):
    path = write_dicom_series(linear_volume(), np.eye(4), tmp_path)[0]
    text = repr(DICOM.read_header(path, "0001.dcm", SALT))
    assert not [word for word in PLANTED if word in text]


def test_planted_modality_does_not_get_out(tmp_path):
    path = write_dicom_series(linear_volume(), np.eye(4), tmp_path)[0]
    edit(path, Modality="DOE")
    assert DICOM.read_header(path, "0001.dcm", SALT).facts["modality"] == "OT"


def test_warnings_of_the_parser_become_flags(tmp_path, recwarn, caplog, capfd):
    (path,) = write_dicom_series(linear_volume((4, 4, 1)), np.eye(4), tmp_path, modality="PT",
                                 rescale=(12345.0, 0.0))  # fmt: skip
    corrupt(path, (0x0028, 0x1053), b"12345.0", b"DOE^JAN")
    header = DICOM.read_header(path, "x.dcm", SALT)
    assert header.reason == "unreadable"
    assert not recwarn.list
    assert not caplog.records
    assert "DOE" not in repr(header) + "".join(capfd.readouterr())


def test_reasons_used_by_the_formats_are_documented():
    folder = Path(_dicom_parse.__file__).parent
    sources = [*folder.glob("*.py"), folder.parent / "files.py", folder.parent / "rows.py"]
    for source in sources:
        for word in source.read_text().split('RejectedScan("')[1:]:
            assert word.split('"')[0] in REASONS


@pytest.mark.parametrize(
    ("volume", "text"),
    [
        (np.zeros((2, 2, 2)), "integer volume of 3 axes, found 3 axes of float64"),
        (np.zeros((2, 2), np.int16), "found 2 axes"),
        (np.full((2, 2, 2), 70000), "run from 70000 to 70000"),
    ],
)
def test_series_is_written_from_16_bit_integers_only(tmp_path, volume, text):
    with pytest.raises(GeometryError, match=text):
        write_series(tmp_path, volume, np.eye(4), patient_id="p")


def test_sheared_slices_are_not_written(tmp_path):
    sheared = np.eye(4)
    sheared[0, 1] = 0.3
    with pytest.raises(GeometryError, match="X and Y are not perpendicular"):
        write_series(tmp_path, np.zeros((2, 2, 2), np.int16), sheared, patient_id="p")
