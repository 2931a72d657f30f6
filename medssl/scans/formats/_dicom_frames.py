"""The frames of an enhanced multi-frame DICOM file: where each lies and what sets it apart.

Source: DICOM PS3.3, sections C.7.6.16 and C.8.13 to C.8.15.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from medssl.errors import RejectedScan
from medssl.scans.formats._dicom_kind import reason_of_type
from medssl.scans.formats._dicom_plane import check_plane
from medssl.scans.formats._dicom_values import (
    finite_or,
    item,
    items,
    number,
    numbers,
    plain,
    text,
    words,
)
from medssl.scans.formats._stacking import ORIENTATION_TOLERANCE

_FRAME_TYPES = (
    "CTImageFrameTypeSequence", "MRImageFrameTypeSequence", "PETFrameTypeSequence",
    "XRay3DFrameTypeSequence",
)  # fmt: skip
SPACING_TOLERANCE_MM = 1e-3  # frames of other pixel sizes belong to another stack


@dataclass(frozen=True)
class Frame:
    """One frame: LPS mm, row and column directions, spacing between rows and between columns."""

    position: list[float]
    orientation: list[float]
    spacing_mm: list[float]
    thickness_mm: float
    rescale: list[float]
    calibrated: bool
    apart: str
    reason: str


def frames_of(dataset: Any, num_frames: int, modality: str) -> list[Frame]:
    """Return the frames in the order of their pixels.

    Raises:
        RejectedScan: ``unreadable`` when there are not as many functional groups as frames,
            ``no_orientation`` or ``nonfinite_geometry`` when a frame has no place.
    """
    per_frame = items(dataset, "PerFrameFunctionalGroupsSequence")
    if len(per_frame) != num_frames:
        raise RejectedScan("unreadable", "there are not as many functional groups as frames")
    shared = item(dataset, "SharedFunctionalGroupsSequence")
    return [_frame(dataset, groups, shared, modality) for groups in per_frame]


def _frame(dataset: Any, groups: Any, shared: Any, modality: str) -> Frame:
    def macro(keyword: str) -> Any:
        found = item(groups, keyword)
        return item(shared, keyword) if found is None else found

    def of(keyword: str, name: str, count: int) -> list[float] | None:
        found = macro(keyword)
        return None if found is None else numbers(found, name, count)

    position = of("PlanePositionSequence", "ImagePositionPatient", 3)
    orientation = of("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    spacing = of("PixelMeasuresSequence", "PixelSpacing", 2)
    check_plane(orientation, position, spacing)
    measures = macro("PixelMeasuresSequence")
    transform = macro("PixelValueTransformationSequence")
    source = dataset if transform is None else transform
    rescale, calibrated = rescale_of(source, modality)
    frame_type: list[str] = []
    for keyword in _FRAME_TYPES:
        found = macro(keyword)
        frame_type = frame_type or ([] if found is None else words(found, "FrameType"))
    return Frame(
        position=position or [],
        orientation=orientation or [],
        spacing_mm=spacing or [],
        thickness_mm=finite_or(number(measures, "SliceThickness", 0.0), 0.0),
        rescale=rescale,
        calibrated=calibrated,
        apart=_apart(macro, frame_type),
        reason=reason_of_type(frame_type),
    )


def _apart(macro: Any, frame_type: list[str]) -> str:
    """Return what sets the frame's stack apart from the file's others."""
    content, echo = macro("FrameContentSequence"), macro("MREchoSequence")
    diffusion = macro("MRDiffusionSequence")
    direction = item(diffusion, "DiffusionGradientDirectionSequence")
    values = [
        plain(content, "TemporalPositionIndex") if content is not None else None,
        text(content, "StackID") if content is not None else "",
        plain(echo, "EffectiveEchoTime") if echo is not None else None,
        plain(diffusion, "DiffusionBValue") if diffusion is not None else None,
        None if direction is None else numbers(direction, "DiffusionGradientOrientation", 3),
        frame_type,
    ]
    return json.dumps(values)


def rescale_of(dataset: Any, modality: str) -> tuple[list[float], bool]:
    """Return slope and intercept, and whether they lead to Hounsfield units.

    Raises:
        RejectedScan: ``nonfinite_geometry``.
    """
    intercept = plain(dataset, "RescaleIntercept")
    rescale = [number(dataset, "RescaleSlope", 1.0), number(dataset, "RescaleIntercept", 0.0)]
    if not all(map(math.isfinite, rescale)) or rescale[0] == 0:
        raise RejectedScan("nonfinite_geometry", "the rescaling is not finite or zero")
    hounsfield = text(dataset, "RescaleType") in ("", "HU") and intercept is not None
    return rescale, modality == "CT" and hounsfield


def parts_of(frames: list[Frame]) -> list[list[int]]:
    """Return the numbers of the frames of each stack: those that nothing but their place parts."""
    parts: dict[tuple[object, ...], list[int]] = {}
    directions: list[list[float]] = []
    spacings: list[list[float]] = []
    for number_of_frame, frame in enumerate(frames):
        key = (
            _which(directions, frame.orientation, ORIENTATION_TOLERANCE),
            _which(spacings, frame.spacing_mm, SPACING_TOLERANCE_MM),
            frame.apart,
            frame.reason,
        )
        parts.setdefault(key, []).append(number_of_frame)
    return list(parts.values())


def _which(known: list[list[float]], values: list[float], tolerance: float) -> int:
    """Return which of the known values these are; new ones are added to them."""
    for which, others in enumerate(known):
        if np.abs(np.subtract(others, values)).max() <= tolerance:
            return which
    known.append(values)
    return len(known) - 1
