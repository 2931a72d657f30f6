"""Straighten NIfTI volumes whose slices lean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from medssl.errors import RejectedScan
from medssl.scans.formats._stacking import stack_slices
from medssl.scans.formats.base import GroupingConfig, Volume
from medssl.scans.geometry import RAS_FROM_LPS, shear_of

if TYPE_CHECKING:
    from medssl.scans.formats._stacking import Stack
    from medssl.scans.geometry import Affine

_UPRIGHT = 1e-3  # cosine between the slices' direction and an axis within them
_MAX_SLICES = 2**14  # their places are held in memory; no scanner makes so many

RESAMPLE = GroupingConfig(gantry_tilt="resample")


def stack_of(affine: Affine, shape: tuple[int, ...], config: GroupingConfig) -> Stack | None:
    """Look at a volume as a stack of slices along its third axis.

    Args:
        affine: (4, 4), voxel index to RAS mm; the first two axes are perpendicular.
        shape: (X, Y, Z).
        config: what to do with a stack that leans.

    Returns:
        None for a volume whose axes are perpendicular.

    Raises:
        RejectedScan: ``gantry_tilt`` unless the config asks to resample, or for too many slices.
    """
    if shear_of(affine) <= _UPRIGHT:
        return None
    if shape[2] > _MAX_SLICES:
        raise RejectedScan("gantry_tilt", f"{shape[2]} leaning slices, at most {_MAX_SLICES}")
    lps = RAS_FROM_LPS @ affine
    row_mm, column_mm = (float(np.linalg.norm(lps[:3, axis])) for axis in (0, 1))
    return stack_slices(
        lps[:3, 3] + np.arange(shape[2])[:, None] * lps[:3, 2],
        np.concatenate([lps[:3, 0] / row_mm, lps[:3, 1] / column_mm]),
        np.array([column_mm, row_mm]),
        0.0,
        config,
        (shape[0], shape[1]),
    )


def straightened(volume: Volume) -> Volume:
    """Return a volume that leans on a grid with perpendicular axes; any other as it is."""
    # Brings in scipy, which a run without leaning volumes does not need.
    from medssl.scans.formats._resampling import resample_stack

    voxels = volume.voxels_CXYZ
    stack = stack_of(volume.affine, voxels.shape[1:], RESAMPLE)
    if stack is None or stack.resampling is None:
        return volume
    ordered = voxels[..., list(stack.order)]
    return Volume(resample_stack(ordered, stack.resampling), stack.affine)
