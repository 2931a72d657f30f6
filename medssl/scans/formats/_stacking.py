"""Geometry of a DICOM series: order its slices, and refuse what is not an even, straight stack."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medssl.errors import RejectedScan
from medssl.scans.geometry import RAS_FROM_LPS

Array = npt.NDArray[np.float64]

ORIENTATION_TOLERANCE = 1e-3  # of a direction cosine: 0.06 degrees
SPACING_TOLERANCE = 0.01  # of the mean gap between slices
ROUNDING_MM = 0.01  # positions are often written with two decimals
MAX_LEAN = np.tan(np.radians(1.0))  # sideways drift per mm of stack
MAX_DRIFT_PIXELS = 0.5  # over the whole stack


@dataclass(frozen=True)
class Stack:
    """An even, straight stack of slices.

    Attributes:
        order: positions in the input, in the order in which the slices lie.
        affine: (4, 4), (column, row, slice) to RAS mm.
        gap_mm: mean distance between neighbouring slices; 0 for a single one.
    """

    order: tuple[int, ...]
    affine: Array
    gap_mm: float


def check_directions(orientation: Array) -> None:
    """Refuse directions of row and column that are not perpendicular unit vectors.

    Raises:
        RejectedScan: ``no_orientation`` for zero vectors, else ``nonfinite_geometry``.
    """
    if not np.isfinite(orientation).all():
        raise RejectedScan("nonfinite_geometry", "a direction cosine is not finite")
    row, column = orientation[:3], orientation[3:]
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    if (lengths < ORIENTATION_TOLERANCE).any():
        raise RejectedScan("no_orientation", "the direction cosines are zero")
    off = max(float(np.abs(lengths - 1).max()), abs(float(row @ column)))
    if off > ORIENTATION_TOLERANCE:
        raise RejectedScan(
            "nonfinite_geometry",
            f"the directions of row and column are off by {off:.4f} from perpendicular unit "
            f"vectors (allowed: {ORIENTATION_TOLERANCE})",
        )


def stack_slices(
    positions_mm: Array, orientation: Array, pixel_spacing_mm: Array, thickness_mm: float
) -> Stack:
    """Order slices along their normal, and check that they form a volume.

    Args:
        positions_mm: (N, 3), centre of each slice's first pixel, LPS.
        orientation: (6,), direction cosines along a row, then down a column.
        pixel_spacing_mm: (2,), between rows, then between columns.
        thickness_mm: used as the third spacing of a single slice.

    Raises:
        RejectedScan: ``duplicate_position``, ``missing_slice``, ``irregular_spacing`` or
            ``gantry_tilt``.

    Source: DICOM PS3.3, equation C.7.6.2.1-1.
    """
    check_directions(orientation)
    normal = np.cross(orientation[:3], orientation[3:])
    normal /= np.linalg.norm(normal)
    distances = positions_mm @ normal
    order = np.argsort(distances, kind="stable")
    step = normal * (thickness_mm if thickness_mm > 0 else 1.0)
    gap = 0.0
    if len(order) > 1:
        gap = _even_gap(distances[order])
        ordered = positions_mm[order]
        _check_straight(ordered, normal, float(pixel_spacing_mm.min()))
        step = (ordered[-1] - ordered[0]) / (len(order) - 1)
    lps = np.eye(4)
    lps[:3, 0] = orientation[:3] * pixel_spacing_mm[1]
    lps[:3, 1] = orientation[3:] * pixel_spacing_mm[0]
    lps[:3, 2] = step
    lps[:3, 3] = positions_mm[order[0]]
    return Stack(tuple(int(index) for index in order), RAS_FROM_LPS @ lps, gap)


def gap_tolerance_mm(gap_mm: float) -> float:
    """Return by how much a gap may differ from the mean gap."""
    return SPACING_TOLERANCE * gap_mm + ROUNDING_MM


def _even_gap(distances: Array) -> float:
    gaps = np.diff(distances)
    typical = float(np.median(gaps))
    if float(gaps.min()) <= max(SPACING_TOLERANCE * typical, 1e-6):
        raise RejectedScan("duplicate_position", "two slices lie at the same position")
    mean = float(gaps.mean())
    if np.abs(gaps - mean).max() <= gap_tolerance_mm(mean):
        return mean
    smallest = float(gaps.min())
    multiples = np.round(gaps / smallest)
    even = np.abs(gaps - multiples * smallest).max() <= gap_tolerance_mm(smallest)
    found = f"slice gaps run from {smallest:.2f} to {gaps.max():.2f} mm (allowed: 1 %)"
    if even:
        raise RejectedScan("missing_slice", f"{found}; {int(multiples.sum()) - len(gaps)} missing")
    raise RejectedScan("irregular_spacing", found)


def _check_straight(ordered: Array, normal: Array, pixel_mm: float) -> None:
    offsets = ordered - ordered[0]
    along = offsets @ normal
    sideways = np.linalg.norm(offsets - np.outer(along, normal), axis=1)
    drift = float(sideways.max())
    lean = drift / float(along[-1])
    if drift > MAX_DRIFT_PIXELS * pixel_mm or lean > MAX_LEAN:
        angle = float(np.degrees(np.arctan(lean)))
        raise RejectedScan(
            "gantry_tilt",
            f"the stack leans by {angle:.1f} degrees, {drift:.2f} mm over its length "
            f"(allowed: 1 degree and half a pixel, {MAX_DRIFT_PIXELS * pixel_mm:.2f} mm)",
        )
