"""Where NIfTI files say that they lie, and what is done when they contradict themselves."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from medssl.errors import RejectedScan
from medssl.scans.formats.nifti import NiftiFormat, read_grid
from medssl.scans.identity import Salt
from samples import OBLIQUE, linear_values, linear_volume, rotation_affine
from strategies import affines

SALT = Salt(bytes(32))
NIFTI = NiftiFormat()
MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])


def outcome_of(path):
    """Return the reason, or the flags of a file that is accepted."""
    try:
        header = NIFTI.read_header(path, path.name, SALT)
    except RejectedScan as error:
        return error.reason
    return header.reason or header.facts["flags"]


def write(path, sform=None, qform=None, shape=(8, 7, 6), affine=None, maker=nib.Nifti1Image):
    affine = affine if affine is not None else sform if sform is not None else qform
    image = maker(linear_values(affine, shape).astype(np.float32), None)
    image.header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0)[: len(shape)])
    image.set_sform(sform, 0 if sform is None else 1, update_affine=False)
    image.set_qform(qform, 0 if qform is None else 1, update_affine=False)
    image.to_filename(path)
    return path


def patch(path, at, values):
    content = bytearray(path.read_bytes())
    values = np.atleast_1d(values)
    content[at : at + values.nbytes] = values.tobytes()
    path.write_bytes(content)
    return path


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(affine=affines())
def test_qform_alone_places_the_voxels(tmp_path, affine):
    path = write(tmp_path / "a.nii", qform=affine)
    volume = read_grid(path)
    np.testing.assert_allclose(volume.affine, nib.load(path).affine, atol=1e-4)
    expected = linear_values(volume.affine, (8, 7, 6))
    np.testing.assert_allclose(volume.voxels_CXYZ[0], expected, atol=0.1)


@pytest.mark.parametrize("maker", [nib.Nifti1Image, nib.Nifti2Image])
def test_half_turns_of_the_qform_are_read_like_nibabel(tmp_path, maker):
    for angles in [(180, 0, 0), (0, 180, 0), (0, 0, 180), (90, 0, 180), (180, 90, 0)]:
        path = write(tmp_path / "a.nii", qform=rotation_affine(angles), maker=maker)
        np.testing.assert_allclose(read_grid(path).affine, nib.load(path).affine, atol=1e-5)


def test_sform_is_kept_where_both_are_set(tmp_path):
    path = write(tmp_path / "a.nii", sform=OBLIQUE, qform=rotation_affine((12.0, -8.0, 20.0)))
    np.testing.assert_allclose(read_grid(path).affine, OBLIQUE, atol=1e-5)
    assert outcome_of(path) == ["sform_qform_differ"]


@pytest.mark.parametrize(
    "other", [OBLIQUE @ MIRROR, rotation_affine((0, 0, 180)), rotation_affine((0, 180, 0))]
)
def test_two_transforms_that_swap_left_and_right_are_no_orientation(tmp_path, other):
    path = write(tmp_path / "a.nii", sform=OBLIQUE, qform=other)
    assert outcome_of(path) == "no_orientation"
    with pytest.raises(RejectedScan, match="sform and qform disagree about left and right"):
        read_grid(path)


def test_mirrored_scan_whose_transforms_agree_is_accepted(tmp_path):
    path = write(tmp_path / "a.nii", sform=OBLIQUE @ MIRROR, qform=OBLIQUE @ MIRROR)
    assert outcome_of(path) == []


def test_neither_transform_is_no_orientation(tmp_path):
    assert outcome_of(write(tmp_path / "a.nii", affine=np.eye(4))) == "no_orientation"


@pytest.mark.parametrize("code", [-1, 6, 256])
def test_transform_of_an_unknown_kind_is_not_used(tmp_path, code):
    path = write(tmp_path / "a.nii", sform=OBLIQUE)
    assert outcome_of(patch(path, 254, np.int16(code))) == "no_orientation"


@pytest.mark.parametrize("spacing", [0.0, -1.0, np.nan, np.inf, 3e38])
@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("which", ["sform", "qform"])
def test_spacing_that_is_no_length_is_rejected(tmp_path, which, axis, spacing):
    path = write(tmp_path / "a.nii", **{which: OBLIQUE})
    assert outcome_of(patch(path, 76 + 4 * axis, np.float32(spacing))) == "nonfinite_geometry"


@pytest.mark.parametrize("which", ["sform", "qform"])
def test_single_slice_needs_no_thickness(tmp_path, which):
    path = write(tmp_path / "a.nii", **{which: OBLIQUE}, shape=(8, 7))
    patch(path, 76 + 12, np.float32(0))
    volume = read_grid(path)
    np.testing.assert_allclose(
        volume.voxels_CXYZ[0], linear_values(volume.affine, (8, 7)), atol=0.1
    )


def test_sform_of_another_spacing_than_pixdim_is_flagged(tmp_path):
    path = patch(write(tmp_path / "a.nii", sform=OBLIQUE), 80, np.float32(0.5))
    assert outcome_of(path) == ["pixdim_differs"]


def flat():
    affine = rotation_affine()
    affine[:3, 2] = affine[:3, 0] + affine[:3, 1]
    return affine


def test_axes_within_one_plane_are_rejected(tmp_path):
    assert outcome_of(write(tmp_path / "a.nii", sform=flat())) == "nonfinite_geometry"


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("at", [280 + 12, 256, 268])
def test_place_that_is_not_finite_is_rejected(tmp_path, at, value):
    path = write(tmp_path / "a.nii", **{"sform" if at >= 280 else "qform": OBLIQUE})
    assert outcome_of(patch(path, at, np.float32(value))) == "nonfinite_geometry"


def test_damaged_quaternion_beside_a_sform_is_flagged(tmp_path):
    path = patch(write(tmp_path / "a.nii", sform=OBLIQUE, qform=OBLIQUE), 256, np.float32(2))
    assert outcome_of(path) == ["sform_qform_differ"]


@pytest.mark.parametrize("qfac", [2.0, np.nan, -0.5])
def test_handedness_that_is_neither_of_two_is_no_orientation(tmp_path, qfac):
    path = patch(write(tmp_path / "a.nii", qform=OBLIQUE), 76, np.float32(qfac))
    assert outcome_of(path) == "no_orientation"


@pytest.mark.parametrize(("unit", "factor"), [(0, 1.0), (1, 1e3), (2, 1.0), (3, 1e-3)])
def test_units_of_length_become_millimetres(tmp_path, unit, factor):
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[:3, :] /= factor
    path = patch(write(tmp_path / "a.nii", sform=affine), 123, np.uint8(unit))
    np.testing.assert_allclose(np.diag(read_grid(path).affine), [1, 1, 2, 1], rtol=1e-6)


@pytest.mark.parametrize("unit", [1, 5, 7])
def test_lengths_that_cannot_be_are_rejected(tmp_path, unit):
    path = patch(write(tmp_path / "a.nii", sform=np.eye(4)), 123, np.uint8(unit))
    assert outcome_of(path) == "nonfinite_geometry"


def test_linear_volume_of_the_samples_is_not_symmetric():
    volume = linear_volume(affine=OBLIQUE)
    assert all((np.flip(volume, axis) != volume).any() for axis in range(3))
