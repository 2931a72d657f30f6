from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given

from medssl.scans.geometry import orientation_of, shear_of, spacing_of
from samples import OBLIQUE
from strategies import affines


@given(affine=affines())
def test_orientation_and_spacing_agree_with_nibabel(affine):
    weights = np.sort(np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)), axis=None)
    if np.diff(weights[-4:]).min() > 1e-6:  # at 45 degrees either answer is right
        assert orientation_of(affine) == "".join(nib.aff2axcodes(affine))
    np.testing.assert_allclose(spacing_of(affine), nib.affines.voxel_sizes(affine))


@pytest.mark.parametrize("diagonal", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_orientation_of_straight_scans(diagonal):
    letters = "".join(
        pair[sign > 0] for pair, sign in zip(("LR", "PA", "IS"), diagonal, strict=True)
    )
    assert orientation_of(np.diag([*diagonal, 1.0])) == letters


def test_perpendicular_axes_have_no_shear():
    assert shear_of(OBLIQUE) < 1e-12
    sheared = OBLIQUE.copy()
    sheared[:3, 2] += 0.5 * sheared[:3, 1]
    assert shear_of(sheared) > 0.1
