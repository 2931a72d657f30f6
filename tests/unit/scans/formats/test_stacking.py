from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medssl.errors import RejectedScan
from medssl.scans.formats._stacking import stack_slices
from medssl.scans.geometry import RAS_FROM_LPS
from samples import OBLIQUE, linear_values, rotation_affine
from strategies import affines


def planes(affine, num_slices):
    """Positions, orientation and pixel spacing as a DICOM series states them."""
    lps = RAS_FROM_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    orientation = (lps[:3, :2] / spacing[:2]).T.ravel()
    positions = lps[:3, 3] + np.arange(num_slices)[:, None] * lps[:3, 2]
    return positions, orientation, spacing[[1, 0]]


def shifted(positions, number, distance_mm):
    """Move one slice along the stack."""
    along = positions[-1] - positions[0]
    moved = positions.copy()
    moved[number] += distance_mm * along / np.linalg.norm(along)
    return moved


@given(affine=affines(), seed=st.integers(0, 999), num_slices=st.integers(2, 9))
def test_shuffled_slices_are_put_where_they_lie(affine, seed, num_slices):
    positions, orientation, spacing = planes(affine, num_slices)
    shuffle = np.random.default_rng(seed).permutation(num_slices)
    stack = stack_slices(positions[shuffle], orientation, spacing, 1.0)
    back = shuffle[list(stack.order)]  # the true number of each slice in the stack
    truth = linear_values(affine, (3, 4, num_slices))[:, :, back]
    np.testing.assert_allclose(linear_values(stack.affine, (3, 4, num_slices)), truth, atol=1e-6)


@given(affine=affines())
def test_stack_is_right_handed_in_lps(affine):
    stack = stack_slices(*planes(affine, 4), 1.0)
    assert np.linalg.det((RAS_FROM_LPS @ stack.affine)[:3, :3]) > 0


@pytest.mark.parametrize(
    ("change", "reason", "text"),
    [
        (lambda p: np.delete(p, 3, 0), "missing_slice", r"from 2.50 to 5.00 mm .* 1 missing"),
        (lambda p: np.delete(p, [3, 4, 6], 0), "missing_slice", "3 missing"),
        (lambda p: np.vstack([p, p[2:3]]), "duplicate_position", "same position"),
        (lambda p: shifted(p, 1, 0.3), "irregular_spacing", "from 2.20 to 2.80 mm"),
    ],
)
def test_uneven_stack_is_rejected(change, reason, text):
    positions, orientation, spacing = planes(OBLIQUE, 8)
    with pytest.raises(RejectedScan, match=text) as caught:
        stack_slices(change(positions), orientation, spacing, 1.0)
    assert caught.value.reason == reason


def test_leaning_stack_is_rejected_as_tilt():
    positions, orientation, spacing = planes(rotation_affine(spacing_mm=(1, 1, 5)), 10)
    lean = np.outer(np.arange(10), [0.0, 5 * np.tan(np.radians(12)), 0.0])
    with pytest.raises(RejectedScan, match=r"leans by 12.0 degrees") as caught:
        stack_slices(positions + lean, orientation, spacing, 1.0)
    assert caught.value.reason == "gantry_tilt"


def test_positions_rounded_to_two_decimals_are_even():
    positions, orientation, spacing = planes(rotation_affine(spacing_mm=(0.7, 0.7, 0.6251)), 300)
    stack = stack_slices(np.round(positions, 2), orientation, spacing, 1.0)
    assert stack.gap_mm == pytest.approx(0.6251, abs=1e-4)


@pytest.mark.parametrize(
    ("orientation", "reason"),
    [
        ([0, 0, 0, 0, 0, 0], "no_orientation"),
        ([1, 0, 0, 0, 1.1, 0], "nonfinite_geometry"),
        ([1, 0, 0, 0.6, 0.8, 0], "nonfinite_geometry"),
        ([1, 0, 0, 0, np.nan, 0], "nonfinite_geometry"),
    ],
)
def test_impossible_directions_are_rejected(orientation, reason):
    positions, _, spacing = planes(np.eye(4), 3)
    with pytest.raises(RejectedScan) as caught:
        stack_slices(positions, np.array(orientation, float), spacing, 1.0)
    assert caught.value.reason == reason
