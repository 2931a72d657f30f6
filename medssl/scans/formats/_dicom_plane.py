"""Where a DICOM image lies, and how large its pixels are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from medssl.errors import RejectedScan
from medssl.scans.formats._dicom_values import finite_or, items, number, numbers
from medssl.scans.formats._stacking import check_directions

_UNIT_CM = 3
_FORMAT_2D = 1
_SAME_REGION = 1e-6  # cm


def plane_of(
    dataset: Any, required: bool, flags: list[str]
) -> tuple[list[float], list[float], list[float]]:
    """Return orientation (6), position (3) and pixel spacing (2: rows, columns), LPS mm.

    Args:
        required: refuse an image without them; else they are made up, and flagged.

    Raises:
        RejectedScan: ``no_orientation`` or ``nonfinite_geometry``.
    """
    orientation = numbers(dataset, "ImageOrientationPatient", 6)
    position = numbers(dataset, "ImagePositionPatient", 3)
    spacing = numbers(dataset, "PixelSpacing", 2)
    if orientation is None or position is None:
        if required:
            raise RejectedScan("no_orientation", "orientation or position is missing")
        flags.append("no_patient_geometry")
        orientation, position = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0]
    if not required and not _usable(spacing):
        spacing = numbers(dataset, "ImagerPixelSpacing", 2)
        spacing = spacing if _usable(spacing) else ultrasound_spacing(dataset)
        if spacing is None:
            flags.append("spacing_unknown")
            spacing = [1.0, 1.0]
    check_plane(orientation, position, spacing)
    return orientation, position, spacing or []


def _usable(spacing: list[float] | None) -> bool:
    return spacing is not None and all(math.isfinite(size) and size > 0 for size in spacing)


def check_plane(
    orientation: list[float] | None, position: list[float] | None, spacing: list[float] | None
) -> None:
    """Refuse a plane that is not fully given by finite numbers.

    Raises:
        RejectedScan: ``no_orientation`` or ``nonfinite_geometry``.
    """
    if orientation is None or position is None:
        raise RejectedScan("no_orientation", "orientation or position is missing")
    if spacing is None or min(spacing) <= 0 or not all(map(math.isfinite, [*spacing, *position])):
        raise RejectedScan("nonfinite_geometry", "position or pixel spacing is unusable")
    check_directions(orientation)


def ultrasound_spacing(dataset: Any) -> list[float] | None:
    """Return the pixel spacing (rows, columns) in mm that all 2D regions agree on, or None.

    Source: DICOM PS3.3, section C.8.5.5.
    """
    found = []
    for region in items(dataset, "SequenceOfUltrasoundRegions"):
        if int(number(region, "RegionSpatialFormat", 0)) != _FORMAT_2D:
            continue
        units = {number(region, f"PhysicalUnits{axis}Direction", 0) for axis in "XY"}
        deltas = [abs(number(region, f"PhysicalDelta{axis}", 0)) for axis in "YX"]
        if units != {_UNIT_CM} or not all(finite_or(delta, 0.0) > 0 for delta in deltas):
            return None
        found.append(deltas)
    if not found or np.ptp(np.array(found), axis=0).max() > _SAME_REGION:
        return None
    return [delta * 10.0 for delta in found[0]]
