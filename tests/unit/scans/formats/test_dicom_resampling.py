"""Stacks that lean or are uneven, brought onto an even, straight grid when the config asks."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.errors import RejectedScan
from medssl.scans.formats import _dicom_groups
from medssl.scans.formats._resampling import resample_stack
from medssl.scans.formats._stacking import stack_slices
from medssl.scans.formats.base import GroupingConfig
from medssl.scans.formats.dicom import DicomFormat
from medssl.scans.geometry import RAS_FROM_LPS, orientation_of, shear_of
from medssl.scans.identity import Salt
from samples import OBLIQUE, linear_values, linear_volume, rotation_affine, write_dicom_series
from strategies import affines

SALT = Salt(bytes(32))
DICOM = DicomFormat()
RESAMPLE = GroupingConfig(irregular_spacing="resample", gantry_tilt="resample")
SIZE = (7, 6)


def planes(affine, depths, lean=(0.0, 0.0)):
    """Positions, directions and spacing of slices at these depths; leaning by pixels a slice."""
    lps = RAS_FROM_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    orientation = (lps[:3, :2] / spacing[:2]).T.ravel()
    depths = np.asarray(depths, float)
    steps = np.column_stack([depths * lean[0], depths * lean[1], depths])
    return lps[:3, 3] + steps @ lps[:3, :3].T, orientation, spacing[[1, 0]]


def values_at(position, affine):
    """The linear function on one slice whose first pixel lies at an LPS position."""
    there = affine.copy()
    there[:3, 3] = (RAS_FROM_LPS[:3, :3] @ position).tolist()
    return linear_values(there, (*SIZE, 1))[..., 0]


def resampled(affine, depths, lean=(0.0, 0.0), config=RESAMPLE):
    positions, orientation, spacing = planes(affine, depths, lean)
    stack = stack_slices(positions, orientation, spacing, 1.0, config, SIZE)
    voxels = np.stack([values_at(positions[at], affine) for at in stack.order], axis=-1)
    even = resample_stack(voxels[None].astype(np.float32), stack.resampling)
    return stack, even[0], voxels


def off_linear(stack, even, lowest):
    """How far the voxels inside the data are off the linear function, and how many those are."""
    wanted = linear_values(stack.affine, even.shape)
    inside = even > lowest + 1e-3
    return np.abs(even - wanted)[inside].max(), inside.mean()


@settings(max_examples=30)
@given(
    affine=affines(),
    lean=st.tuples(st.floats(-0.9, 0.9), st.floats(-0.9, 0.9)).filter(
        lambda lean: max(map(abs, lean)) > 0.3
    ),
)
def test_straightened_stack_is_linear_inside_the_data(affine, lean):
    stack, even, voxels = resampled(affine, range(6), lean)
    worst, share = off_linear(stack, even, voxels.min())
    assert worst < 1e-3 * np.abs(voxels).max()
    assert share > 0.1
    assert stack.flags == ("gantry_tilt_resampled",)
    assert shear_of(stack.affine) < 1e-6


def test_nothing_of_a_leaning_stack_is_cut_off():
    _, even, voxels = resampled(np.eye(4), range(5), (0.0, 1.0))
    assert even.shape == (7, 10, 5)
    for index in range(5):
        np.testing.assert_array_equal(
            even[:, index : index + 6, index], voxels[..., index].astype(np.float32)
        )


def test_outside_of_the_data_lies_the_lowest_value():
    _, even, voxels = resampled(np.eye(4), range(5), (0.0, 1.0))
    assert (even[:, -1, 0] == np.float32(voxels.min())).all()


@pytest.mark.parametrize("lean", [(0.0, 0.0), (0.45, -0.3)])
@settings(max_examples=30)
@given(affine=affines(), gaps=st.lists(st.floats(0.8, 1.4), min_size=4, max_size=8))
def test_uneven_stack_becomes_even_and_stays_linear(lean, affine, gaps):
    gaps = [0.8, *gaps, 1.4]
    stack, even, voxels = resampled(affine, np.cumsum([0, *gaps]), lean)
    worst, _ = off_linear(stack, even, voxels.min())
    assert worst < 1e-3 * np.abs(voxels).max()
    assert "irregular_spacing_resampled" in stack.flags
    assert even.shape[2] == stack.resampling.shape[2]
    assert np.abs(stack.gap_mm / np.linalg.norm(affine[:3, 2]) - np.median(gaps)) < 0.3


def test_resampled_stack_keeps_its_first_and_last_slice():
    _, even, voxels = resampled(OBLIQUE, [0, 1, 2.3, 3, 4.4])
    np.testing.assert_allclose(even[..., 0], voxels[..., 0], rtol=1e-5)
    np.testing.assert_allclose(even[..., -1], voxels[..., -1], rtol=1e-5)


def test_missing_slices_are_interpolated_at_the_gap_of_the_stack():
    stack, even, voxels = resampled(OBLIQUE, [0, 1, 2, 4, 5, 8])
    assert stack.flags == ("missing_slice_resampled",)
    assert stack.gap_mm == pytest.approx(2.5)
    assert even.shape == (*SIZE, 9)
    assert off_linear(stack, even, voxels.min() - 1)[0] < 1e-2


@pytest.mark.parametrize(
    ("depths", "reason"),
    [
        ([0, 1, 2, 8, 9], "missing_slice"),
        ([0, 1, 2.2, 9.7, 10.9], "irregular_spacing"),
        ([0, 1, 1, 2], "duplicate_position"),
    ],
)
def test_what_lies_across_a_wide_gap_is_not_made_up(depths, reason):
    with pytest.raises(RejectedScan) as caught:
        stack_slices(*planes(OBLIQUE, depths), 1.0, RESAMPLE, SIZE)
    assert caught.value.reason == reason


def test_wider_tolerance_keeps_the_slices_and_says_so():
    depths = [0, 1.1, 2, 3]
    stack = stack_slices(*planes(OBLIQUE, depths), 1.0, GroupingConfig(irregular_spacing=0.15))
    assert stack.flags == ("irregular_spacing_allowed",)
    assert stack.resampling is None
    with pytest.raises(RejectedScan, match="slice gaps run"):
        stack_slices(*planes(OBLIQUE, depths), 1.0, GroupingConfig(irregular_spacing=0.05))


@pytest.mark.parametrize(
    "config", [GroupingConfig(), RESAMPLE, GroupingConfig(irregular_spacing=0.2)]
)
def test_even_stack_does_not_depend_on_the_config(config):
    stack = stack_slices(*planes(OBLIQUE, range(5)), 1.0, config, SIZE)
    assert (stack.flags, stack.resampling) == ((), None)


def test_lean_is_refused_when_only_gaps_may_be_resampled():
    with pytest.raises(RejectedScan, match="leans by") as caught:
        stack_slices(*planes(np.eye(4), range(5), (0.0, 1.0)), 1.0,
                     GroupingConfig(irregular_spacing="resample"), SIZE)  # fmt: skip
    assert caught.value.reason == "gantry_tilt"


def test_tilted_series_is_read_as_its_group_says(tmp_path):
    affine = rotation_affine((0, 0, 0), (1.0, 1.0, 4.0))
    tilted = affine.copy()
    tilted[1, 2] = 4.0 * np.tan(np.radians(15))
    volume = linear_volume((8, 9, 6), tilted)
    paths = write_dicom_series(volume, tilted, tmp_path, modality="CT")
    headers = [DICOM.read_header(path, path.name, SALT) for path in paths]
    (group,) = DICOM.group(headers, RESAMPLE)
    files = [tmp_path / header.path for header in group.headers]
    read = DICOM.read_voxels(files, group.reading)
    assert group.flags == ("gantry_tilt_resampled",)
    assert read.voxels_CXYZ.shape == (1, *group.shape) == (1, 8, 15, 6)
    np.testing.assert_allclose(read.affine, group.affine)
    assert orientation_of(group.affine) == "RAS"
    lowest = volume.min()
    assert off_linear(read, read.voxels_CXYZ[0], lowest)[0] < 0.6
    (refused,) = DICOM.group(headers, GroupingConfig())
    assert refused.reason == "gantry_tilt"


def test_stack_that_leans_out_of_itself_is_refused(tmp_path):
    paths = write_dicom_series(linear_volume((8, 7, 3)), np.eye(4), tmp_path)
    for number, path in enumerate(paths):
        dataset = pydicom.dcmread(path)
        dataset.ImagePositionPatient = [1e6 * number, 0, number]
        dataset.save_as(path)
    headers = [DICOM.read_header(path, path.name, SALT) for path in paths]
    assert [group.reason for group in DICOM.group(headers, RESAMPLE)] == ["gantry_tilt"]


def test_grid_that_would_be_too_large_is_refused(tmp_path, monkeypatch):
    paths = write_dicom_series(linear_volume((8, 7, 4)), np.eye(4), tmp_path)
    headers = [DICOM.read_header(path, path.name, SALT) for path in paths if path != paths[1]]
    monkeypatch.setattr(_dicom_groups, "MAX_VOXELS", 8 * 7 * 3)
    assert [group.reason for group in DICOM.group(headers, RESAMPLE)] == ["too_large"]
