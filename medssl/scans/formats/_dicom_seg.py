"""DICOM segmentations (SEG), by highdicom: which series one is of, and its segments as classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medssl.errors import LabelError, MachineError, RejectedScan
from medssl.scans.formats._dicom_parse import open_unchanged, parse, quiet
from medssl.scans.formats._dicom_values import tag_of
from medssl.scans.formats.base import Volume, check_size
from medssl.scans.geometry import RAS_FROM_LPS

SOP_CLASSES = frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"})
"""Segmentation and Label Map Segmentation Storage."""

_MARK_AT = 128
_PROBABLE = 0.5  # of a fractional segment: more likely in it than not


def is_dicom(path: Path) -> bool:
    """Say whether a file bears DICOM's mark."""
    with path.open("rb") as file:
        return file.read(_MARK_AT + 4)[_MARK_AT:] == b"DICM"


def referenced_series(path: Path) -> tuple[str, ...]:
    """Return the SeriesInstanceUIDs that a segmentation refers to; none, where it is none.

    Private: identifiers, for keys to be made from.
    """
    tags = [int(tag_of(keyword)) for keyword in ("SOPClassUID", "ReferencedSeriesSequence")]
    with open_unchanged(path) as file, quiet():
        try:
            parsed = parse(file, tags)
            if parsed.sop_class not in SOP_CLASSES:
                return ()
            series = parsed.dataset.get("ReferencedSeriesSequence") or ()
            return tuple(str(item.SeriesInstanceUID) for item in series)
        except (RejectedScan, AttributeError, TypeError, ValueError):
            return ()


def read_segments(path: Path, classes: Sequence[str]) -> Volume:
    """Read a segmentation on the grid that its own frames span.

    Args:
        path: the file.
        classes: labels of segments, whatever their case; the first becomes 1. Segments of other
            labels are left out. Without any, the segments keep their numbers.

    Returns:
        Class numbers; the axes are slice, row and column. Frames that were left out as empty are 0.

    Raises:
        RejectedScan: it is no segmentation, or cannot be read.
        LabelError: it has no segment of these labels, or two classes share voxels.
        MachineError: highdicom is not installed.
    """
    try:
        import highdicom
    except ImportError:
        raise MachineError(
            "a mask is a DICOM segmentation, and highdicom, which reads them, is not installed. "
            "Install it: pip install 'medssl[seg]'."
        ) from None
    with quiet():
        try:
            segmentation: Any = highdicom.seg.segread(path)
            labels = {
                int(number): str(segmentation.get_segment_description(number).segment_label)
                for number in segmentation.segment_numbers
            }
        except Exception:  # noqa: BLE001  (its words may hold values of the file; they stay inside)
            raise RejectedScan("unreadable", "no segmentation that can be read") from None
        numbers = _class_numbers(labels, classes)
        try:
            geometry = segmentation.get_volume_geometry()
            check_size(int(np.prod(geometry.spatial_shape)) * len(numbers))
            volume = segmentation.get_volume(
                segment_numbers=sorted(numbers), combine_segments=False, rescale_fractional=True
            )
        except RejectedScan:
            raise
        except Exception:  # noqa: BLE001  (the same)
            raise RejectedScan("nonfinite_geometry", "its frames form no volume") from None
    values = _combined(volume.array, [numbers[number] for number in sorted(numbers)])
    return Volume(values[np.newaxis], np.asarray(RAS_FROM_LPS @ volume.affine))


def _class_numbers(labels: dict[int, str], classes: Sequence[str]) -> dict[int, int]:
    """Return the class of each segment that is wanted."""
    if not classes:
        return {number: number for number in labels}
    wanted = {name.strip().casefold(): number for number, name in enumerate(classes, start=1)}
    found = {
        number: wanted[label.strip().casefold()]
        for number, label in labels.items()
        if label.strip().casefold() in wanted
    }
    if not found:
        raise LabelError(
            f"none of the {len(labels)} segments of a DICOM segmentation is labelled as one of the "
            f"classes {list(classes)}. Name classes as the segments are labelled."
        )
    return found


def _combined(segments: npt.NDArray[Any], numbers: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return class numbers (Z, Y, X) from segments (Z, Y, X, segments)."""
    values = np.zeros(segments.shape[:3], np.float32)
    for position, number in enumerate(numbers):
        inside = segments[..., position] >= _PROBABLE
        if ((values[inside] != 0) & (values[inside] != number)).any():
            raise LabelError(
                "two classes of a DICOM segmentation share voxels; a mask has one class a voxel. "
                "Evaluate them as tasks of their own, each with its classes."
            )
        values[inside] = number
    return values
