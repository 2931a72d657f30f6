"""DICOM segmentations of series, written by highdicom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
from highdicom.sr.coding import CodedConcept

from samples import UID_ROOT


def write_segmentation(
    path: Path,
    series: Sequence[Path],
    segments: Mapping[str, Any],
    *,
    kind: str = "BINARY",
    omit_empty_frames: bool = True,
    number: int = 1,
) -> Path:
    """Write a segmentation of a series.

    Args:
        path: the file.
        series: the files of the series, in slice order.
        segments: by label, (X, Y, Z) in the voxels of `samples.write_dicom_series`: 0 and 1, or
            fractions.
        kind: ``BINARY``, ``FRACTIONAL`` or ``LABELMAP``.
        omit_empty_frames: leave out frames that hold nothing.
        number: distinguishes segmentations.
    """
    sources = [pydicom.dcmread(file) for file in series]
    pixels = np.stack([np.moveaxis(np.asarray(mask), (0, 1, 2), (2, 1, 0))
                       for mask in segments.values()], axis=-1)  # fmt: skip
    tissue = CodedConcept("85756007", "SCT", "Tissue")
    descriptions = [
        highdicom.seg.SegmentDescription(
            segment_number=position,
            segment_label=label,
            segmented_property_category=tissue,
            segmented_property_type=tissue,
            algorithm_type="MANUAL",
        )
        for position, label in enumerate(segments, start=1)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=pixels.astype(np.float32 if kind == "FRACTIONAL" else np.uint8),
        segmentation_type=kind,
        segment_descriptions=descriptions,
        series_instance_uid=f"{UID_ROOT}.8.{number}",
        series_number=100,
        sop_instance_uid=f"{UID_ROOT}.9.{number}",
        instance_number=1,
        manufacturer="medssl",
        manufacturer_model_name="tests",
        software_versions="1",
        device_serial_number="1",
        omit_empty_frames=omit_empty_frames,
    ).save_as(path)
    return path
