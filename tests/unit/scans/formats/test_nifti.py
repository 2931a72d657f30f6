from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from medssl.errors import RejectedScan
from medssl.scans.formats.base import GroupingConfig
from medssl.scans.formats.nifti import NiftiFormat, read_grid
from medssl.scans.geometry import shear_of
from medssl.scans.identity import Salt
from samples import OBLIQUE, linear_values, linear_volume, rotation_affine, write_nifti
from strategies import affines, shapes

SALT = Salt(bytes(32))
NIFTI = NiftiFormat()


def header_of(path):
    return NIFTI.read_header(path, path.name, SALT)


def reason_of(path):
    try:
        return header_of(path).reason
    except RejectedScan as error:
        return error.reason


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(affine=affines(), shape=shapes())
def test_values_lie_where_they_were(tmp_path, affine, shape):
    values = linear_values(affine, shape)
    path = write_nifti(tmp_path / "x.nii", values, affine)
    (group,) = NIFTI.group([header_of(path)], GroupingConfig())
    read = NIFTI.read_voxels([path], {})
    assert group.shape == read.voxels_CXYZ[0].shape == shape
    np.testing.assert_allclose(group.affine, read.affine)
    np.testing.assert_allclose(read.voxels_CXYZ[0], linear_values(read.affine, shape), atol=0.05)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("maker", [nib.Nifti1Image, nib.Nifti2Image])
def test_both_versions_are_read_plain_and_zipped(tmp_path, name, maker):
    volume = linear_volume(affine=OBLIQUE)
    maker(volume, OBLIQUE).to_filename(tmp_path / name)
    np.testing.assert_array_equal(NIFTI.read_voxels([tmp_path / name], {}).voxels_CXYZ[0], volume)
    assert reason_of(tmp_path / name) == ""


def test_stored_scaling_is_applied(tmp_path):
    image = nib.Nifti1Image(linear_volume(), np.eye(4))
    image.header.set_slope_inter(0.5, -1000)
    image.to_filename(tmp_path / "a.nii")
    expected = linear_volume() * 0.5 - 1000.0
    np.testing.assert_allclose(NIFTI.read_voxels([tmp_path / "a.nii"], {}).voxels_CXYZ[0], expected)


def test_last_axes_of_one_are_dropped(tmp_path):
    path = write_nifti(tmp_path / "a.nii", linear_volume()[..., None])
    assert header_of(path).facts["shape"] == [8, 7, 6]


def test_single_slice_is_a_2d_scan(tmp_path):
    path = write_nifti(tmp_path / "a.nii", linear_volume((8, 7, 1)))
    (group,) = NIFTI.group([header_of(path)], GroupingConfig())
    assert (group.dims, group.shape) == ("2D", (8, 7))


def test_metres_become_millimetres(tmp_path):
    image = nib.Nifti1Image(linear_volume(), np.diag([0.001, 0.001, 0.002, 1]))
    image.header.set_xyzt_units("meter")
    image.to_filename(tmp_path / "a.nii")
    np.testing.assert_allclose(
        np.diag(read_grid(tmp_path / "a.nii").affine), [1, 1, 2, 1], rtol=1e-6
    )


def with_nan():
    volume = linear_volume().astype(np.float32)
    volume[1, 2, 3] = np.nan
    return volume


@pytest.mark.parametrize(
    ("voxels", "reason"),
    [
        (with_nan(), "nan_voxels"),
        (np.full((4, 4, 4), np.nan, np.float32), "nan_voxels"),
        (np.full((4, 4, 4), np.inf, np.float32), "nan_voxels"),
        (np.zeros((4, 4, 4), np.float32), "constant"),
        (np.eye(5, dtype=np.uint8)[..., None].repeat(3, -1), "label_map"),
        (linear_volume().astype(np.complex64), "complex_unsupported"),
    ],
)
def test_unusable_voxels_get_their_reason(tmp_path, voxels, reason):
    assert reason_of(write_nifti(tmp_path / "a.nii.gz", voxels)) == reason


def test_file_that_says_it_holds_labels_is_no_scan(tmp_path):
    image = nib.Nifti1Image(linear_volume(), np.eye(4))
    image.header.set_intent("label")
    image.to_filename(tmp_path / "a.nii")
    assert reason_of(tmp_path / "a.nii") == "label_map"


def leaning(along, by_mm=1.0):
    affine = rotation_affine((12.0, -8.0, 25.0), (1.0, 0.8, 5.0))
    affine[:3, 2] += affine[:3, along] * by_mm
    return affine


@pytest.mark.parametrize("along", [0, 1])
def test_slices_that_lean_are_a_tilt(tmp_path, along):
    path = write_nifti(tmp_path / "a.nii", None, leaning(along))
    (group,) = NIFTI.group([header_of(path)], GroupingConfig())
    assert group.reason == "gantry_tilt"


@pytest.mark.parametrize("mirror", [1.0, -1.0])
@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("by_mm", [1.0, -0.7])
def test_slices_that_lean_are_straightened_on_request(tmp_path, along, by_mm, mirror):
    affine = leaning(along, by_mm) @ np.diag([1.0, 1.0, mirror, 1.0])
    values = linear_values(affine, (8, 7, 6)).astype(np.float32)
    path = write_nifti(tmp_path / "a.nii", np.stack([values, values + 9], -1), affine)
    (group,) = NIFTI.group([header_of(path)], GroupingConfig(gantry_tilt="resample"))
    assert (group.reason, group.num_channels) == ("", 2)
    assert "gantry_tilt_resampled" in group.flags
    volume = NIFTI.read_voxels([path], group.reading)
    assert volume.voxels_CXYZ.shape == (2, *group.shape)
    np.testing.assert_allclose(volume.affine, group.affine)
    assert shear_of(volume.affine) < 1e-6
    first, second = volume.voxels_CXYZ
    inside = second > values.min() + 9  # what lies outside of the data has the lowest value
    assert inside.mean() > 0.5
    expected = linear_values(volume.affine, group.shape)
    interior = inside & (first > values.min())
    np.testing.assert_allclose(first[interior], expected[interior], atol=0.1)


def test_too_many_leaning_slices_are_not_straightened(tmp_path):
    values = np.arange(2 * 2 * 20_000, dtype=np.int32).reshape(2, 2, -1)
    path = write_nifti(tmp_path / "a.nii", values, leaning(0))
    (group,) = NIFTI.group([header_of(path)], GroupingConfig(gantry_tilt="resample"))
    assert group.reason == "gantry_tilt"


def test_axes_of_a_slice_that_lean_are_a_tilt(tmp_path):
    affine = rotation_affine()
    affine[:3, 1] += 0.2 * affine[:3, 0]
    assert reason_of(write_nifti(tmp_path / "a.nii", None, affine)) == "gantry_tilt"


def test_no_affine_is_no_orientation(tmp_path):
    nib.Nifti1Image(linear_volume(), None).to_filename(tmp_path / "a.nii")
    assert reason_of(tmp_path / "a.nii") == "no_orientation"


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_affine_without_a_size_is_rejected(tmp_path, value):
    path = write_nifti(tmp_path / "a.nii", linear_volume(), np.eye(4))
    content = bytearray(path.read_bytes())
    content[280:284] = np.float32(value).tobytes()  # srow_x[0]
    path.write_bytes(content)
    assert reason_of(path) == "nonfinite_geometry"


@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        ([3, 30000, 30000, 30000, 1, 1, 1, 1], "too_large"),
        ([3, 8, -7, 6, 1, 1, 1, 1], "unreadable"),
        ([9, 8, 7, 6, 1, 1, 1, 1], "unreadable"),
        ([1, 8, 7, 6, 1, 1, 1, 1], "nonfinite_geometry"),
    ],
)
def test_dimensions_are_checked_before_anything_is_allocated(tmp_path, dims, reason):
    path = write_nifti(tmp_path / "a.nii", linear_volume())
    content = bytearray(path.read_bytes())
    content[40:56] = np.array(dims, "<i2").tobytes()
    path.write_bytes(content)
    assert reason_of(path) == reason


def test_huge_extension_is_not_read(tmp_path):
    path = write_nifti(tmp_path / "a.nii", linear_volume())
    content = bytearray(path.read_bytes())
    content[108:112] = np.float32(2**30).tobytes()  # vox_offset
    path.write_bytes(content)
    assert reason_of(path) == "too_large"


@pytest.mark.parametrize("kept", [100, 400, 700])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file_is_rejected(tmp_path, kept, zipped):
    plain = write_nifti(tmp_path / "a.nii", linear_volume()).read_bytes()[:kept]
    path = tmp_path / ("b.nii.gz" if zipped else "b.nii")
    path.write_bytes(gzip.compress(plain) if zipped else plain)
    assert reason_of(path) == ("unreadable" if kept < 348 else "truncated_pixels")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("content", [b"", b"hello, DOE^JANE", bytes(2000)])
def test_other_content_is_unreadable(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert reason_of(tmp_path / name) == "unreadable"


def test_two_affines_that_disagree_are_flagged(tmp_path):
    image = nib.Nifti1Image(linear_volume(), np.eye(4))
    image.set_sform(np.eye(4), 1)
    image.set_qform(OBLIQUE, 1)
    image.to_filename(tmp_path / "a.nii")
    assert header_of(tmp_path / "a.nii").facts["flags"] == ["sform_qform_differ"]


def test_same_voxels_in_another_gzip_have_the_same_digest(tmp_path):
    first = write_nifti(tmp_path / "a.nii.gz", linear_volume())
    again = write_nifti(tmp_path / "b.nii", linear_volume())
    assert header_of(first).digest == header_of(again).digest
