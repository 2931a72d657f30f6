"""Bring an uneven or leaning stack of slices onto its even, straight grid."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medssl.scans.formats._stacking import Resampling

_WHOLE = 1e-4  # of a pixel or a slice: nearer to a whole number than matters


def resample_stack(
    voxels_CXYZ: npt.NDArray[np.float32], resampling: Resampling
) -> npt.NDArray[np.float32]:
    """Interpolate linearly within each slice (where the stack leans) and between slices.

    Args:
        voxels_CXYZ: the slices in the stack's order, not changed.
        resampling: from `stack_slices`.

    Returns:
        (C, *resampling.shape); outside of the data the lowest value of the scan. A linear function
        of the place stays what it is.
    """
    columns, rows, num_slices = resampling.shape
    lowest = voxels_CXYZ.min()
    even = np.empty((voxels_CXYZ.shape[0], columns, rows, num_slices), np.float32)
    placed: dict[int, npt.NDArray[np.float32]] = {}

    def slice_at(index: int) -> npt.NDArray[np.float32]:
        if index not in placed:
            placed[index] = _shifted(voxels_CXYZ[..., index], resampling.shifts[index], even.shape)
        return placed[index]

    for depth in range(num_slices):
        above = int(np.searchsorted(resampling.depths, depth - _WHOLE))
        above = min(max(above, 0), len(resampling.depths) - 1)
        below = max(above - 1, 0)
        span = float(resampling.depths[above] - resampling.depths[below])
        weight = (depth - float(resampling.depths[below])) / span if span > 0 else 1.0
        if abs(weight - 1.0) * max(span, 1.0) <= _WHOLE or span <= 0:
            even[..., depth] = slice_at(above)
        else:
            even[..., depth] = (1.0 - weight) * slice_at(below) + weight * slice_at(above)
        for index in [index for index in placed if index < below]:
            del placed[index]
    even[np.isnan(even)] = lowest
    return even


def _shifted(
    slice_CXY: npt.NDArray[np.float32],
    shift: npt.NDArray[np.float64],
    shape: tuple[int, ...],
) -> npt.NDArray[np.float32]:
    """Return the slice moved by so many columns and rows on a wider plane, NaN around it."""
    channels, columns, rows = slice_CXY.shape
    near = np.abs(shift - np.round(shift)) < _WHOLE
    exact = np.where(near, np.round(shift), shift)
    plane = np.full((channels, shape[1], shape[2]), np.nan, np.float32)
    for channel in range(channels):
        if near.all():
            x, y = (int(part) for part in exact)
            plane[channel, x : x + columns, y : y + rows] = slice_CXY[channel]
        else:
            ndimage.affine_transform(
                slice_CXY[channel],
                np.ones(2),
                offset=-exact,
                output=plane[channel],
                output_shape=(shape[1], shape[2]),
                order=1,
                mode="constant",
                cval=np.nan,
            )
    return plane
