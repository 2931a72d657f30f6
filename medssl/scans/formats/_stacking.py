"""Geometry of a DICOM series: order its slices to an even, straight stack, or refuse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medssl.errors import RejectedScan
from medssl.scans.formats.base import GroupingConfig
from medssl.scans.geometry import RAS_FROM_LPS

Array = npt.NDArray[np.float64]

ORIENTATION_TOLERANCE = 1e-3  # of a direction cosine: 0.06 degrees
SPACING_TOLERANCE = 0.01  # of the mean gap between slices
ROUNDING_MM = 0.01  # positions are often written with two decimals
MAX_LEAN = np.tan(np.radians(1.0))  # sideways drift per mm of stack
MAX_DRIFT_PIXELS = 0.5  # over the whole stack
MAX_HOLE = 4.0  # times the typical gap: what lies across a wider one is not guessed
_STRICT = GroupingConfig()


@dataclass(frozen=True)
class Resampling:
    """How the slices of an uneven or leaning stack come onto an even, straight grid.

    Attributes:
        depths: (N,), where each slice lies along the stack, in new slices, in the stack's order.
        shifts: (N, 2), by how many columns and rows each slice lies off the first place of the
            grid; zero where the stack is straight.
        shape: (columns, rows, slices) of the grid.
    """

    depths: Array
    shifts: Array
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Stack:
    """A stack of slices.

    Attributes:
        order: positions in the input, in the order in which the slices lie.
        affine: (4, 4), (column, row, slice) to RAS mm.
        gap_mm: distance between neighbouring slices of the volume; 0 for a single one.
        flags: what was allowed or resampled.
        resampling: None for an even, straight stack.
    """

    order: tuple[int, ...]
    affine: Array
    gap_mm: float
    flags: tuple[str, ...] = ()
    resampling: Resampling | None = None


def check_directions(orientation: Sequence[float] | Array) -> None:
    """Refuse directions of row and column that are not perpendicular unit vectors.

    Raises:
        RejectedScan: ``no_orientation`` for zero vectors, else ``nonfinite_geometry``.
    """
    if not all(map(math.isfinite, orientation)):
        raise RejectedScan("nonfinite_geometry", "a direction cosine is not finite")
    # Plain numbers: this runs for every file, and arrays of three take ten times as long.
    row, column = list(orientation[:3]), list(orientation[3:])
    lengths = [math.hypot(*row), math.hypot(*column)]
    if min(lengths) < ORIENTATION_TOLERANCE:
        raise RejectedScan("no_orientation", "the direction cosines are zero")
    cosine = sum(one * other for one, other in zip(row, column, strict=True))
    off = max(*(abs(length - 1) for length in lengths), abs(cosine))
    if off > ORIENTATION_TOLERANCE:
        raise RejectedScan(
            "nonfinite_geometry",
            f"the directions of row and column are off by {off:.4f} from perpendicular unit "
            f"vectors (allowed: {ORIENTATION_TOLERANCE})",
        )


def stack_slices(
    positions_mm: Array,
    orientation: Array,
    pixel_spacing_mm: Array,
    thickness_mm: float,
    config: GroupingConfig = _STRICT,
    size: tuple[int, int] = (1, 1),
) -> Stack:
    """Order slices along their normal, and check that they form a volume.

    A stack that is resampled keeps its first and last slice. The new gap is the even one nearest to
    the median gap (where slices are missing from an even stack: its own gap); a stack that leans
    gets a grid along its normal, wide enough for all its slices.

    Args:
        positions_mm: (N, 3), centre of each slice's first pixel, LPS.
        orientation: (6,), direction cosines along a row, then down a column.
        pixel_spacing_mm: (2,), between rows, then between columns.
        thickness_mm: used as the third spacing of a single slice.
        config: what to do with an uneven or leaning stack.
        size: columns and rows of a slice; needed for resampling only.

    Raises:
        RejectedScan: ``duplicate_position``, ``missing_slice``, ``irregular_spacing`` or
            ``gantry_tilt``.

    Source: DICOM PS3.3, equation C.7.6.2.1-1.
    """
    check_directions(orientation)
    normal = np.cross(orientation[:3], orientation[3:])
    normal /= np.linalg.norm(normal)
    distances = positions_mm @ normal
    order = tuple(int(index) for index in np.argsort(distances, kind="stable"))
    lps = np.eye(4)
    lps[:3, 0] = orientation[:3] * pixel_spacing_mm[1]
    lps[:3, 1] = orientation[3:] * pixel_spacing_mm[0]
    lps[:3, 2] = normal * (thickness_mm if thickness_mm > 0 else 1.0)
    lps[:3, 3] = positions_mm[order[0]]
    if len(order) == 1:
        return Stack(order, RAS_FROM_LPS @ lps, 0.0)
    ordered = positions_mm[list(order)]
    num_gaps, gap_flag = _gaps(np.diff(distances[list(order)]), config)
    leans = _leans(ordered, normal, float(pixel_spacing_mm.min()), config)
    flags = [gap_flag] * bool(gap_flag) + ["gantry_tilt_resampled"] * leans
    extent = float(distances[order[-1]] - distances[order[0]])
    lps[:3, 2] = normal * extent / num_gaps if leans else (ordered[-1] - ordered[0]) / num_gaps
    resampling = None
    if leans or gap_flag.endswith("_resampled"):
        # In columns, rows and new slices, from the first pixel of the first slice.
        places = np.linalg.solve(lps[:3, :3], (ordered - ordered[0]).T).T
        shifts = places[:, :2] if leans else np.zeros((len(order), 2))
        first = np.floor(shifts.min(axis=0) + ROUNDING_MM)
        wider = np.ceil((shifts - first).max(axis=0) - ROUNDING_MM).astype(int)
        if (wider >= np.maximum(size, 2)).any():
            raise RejectedScan("gantry_tilt", "the last slice does not lie over the first any more")
        lps[:3, 3] += lps[:3, :2] @ first
        shape = (size[0] + int(wider[0]), size[1] + int(wider[1]), num_gaps + 1)
        resampling = Resampling(places[:, 2], shifts - first, shape)
    return Stack(order, RAS_FROM_LPS @ lps, extent / num_gaps, tuple(flags), resampling)


def gap_tolerance_mm(gap_mm: float) -> float:
    """Return by how much a gap may differ from the mean gap."""
    return SPACING_TOLERANCE * gap_mm + ROUNDING_MM


def _gaps(gaps: Array, config: GroupingConfig) -> tuple[int, str]:
    """Return the number of gaps that the volume has, and a flag when it is not the stack's own."""
    allowed = config.irregular_spacing
    typical, smallest, widest = float(np.median(gaps)), float(gaps.min()), float(gaps.max())
    if smallest <= max(SPACING_TOLERANCE * typical, 1e-6):
        raise RejectedScan("duplicate_position", "two slices lie at the same position")
    mean = float(gaps.mean())
    uneven = float(np.abs(gaps - mean).max())
    if uneven <= gap_tolerance_mm(mean):
        return len(gaps), ""
    if not isinstance(allowed, str) and uneven <= allowed * mean + ROUNDING_MM:
        return len(gaps), "irregular_spacing_allowed"
    multiples = np.round(gaps / smallest)
    even = np.abs(gaps - multiples * smallest).max() <= gap_tolerance_mm(smallest)
    found = f"slice gaps run from {smallest:.2f} to {widest:.2f} mm (allowed: 1 %)"
    resample = allowed == "resample" and widest <= MAX_HOLE * (smallest if even else typical)
    if even:
        if resample:
            return int(multiples.sum()), "missing_slice_resampled"
        raise RejectedScan("missing_slice", f"{found}; {int(multiples.sum()) - len(gaps)} missing")
    if resample:
        return max(round(float(gaps.sum()) / typical), 1), "irregular_spacing_resampled"
    raise RejectedScan("irregular_spacing", found)


def _leans(ordered: Array, normal: Array, pixel_mm: float, config: GroupingConfig) -> bool:
    """Say whether the stack leans by more than may be overlooked."""
    offsets = ordered - ordered[0]
    along = offsets @ normal
    sideways = np.linalg.norm(offsets - np.outer(along, normal), axis=1)
    drift = float(sideways.max())
    lean = drift / float(along[-1])
    if drift <= MAX_DRIFT_PIXELS * pixel_mm and lean <= MAX_LEAN:
        return False
    if config.gantry_tilt == "resample":
        return True
    angle = float(np.degrees(np.arctan(lean)))
    raise RejectedScan(
        "gantry_tilt",
        f"the stack leans by {angle:.1f} degrees, {drift:.2f} mm over its length "
        f"(allowed: 1 degree and half a pixel, {MAX_DRIFT_PIXELS * pixel_mm:.2f} mm)",
    )
