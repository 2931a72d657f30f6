"""The whole hostile corpus, by name."""

from __future__ import annotations

from hostile_bytes import DAMAGE_CASES
from hostile_dicom import GEOMETRY_CASES
from hostile_files import FILE_CASES
from hostile_frames import FRAME_CASES
from hostile_nifti import NIFTI_CASES
from hostile_pixels import PIXEL_CASES

DICOM_CASES = (*GEOMETRY_CASES, *PIXEL_CASES, *DAMAGE_CASES, *FRAME_CASES)
CASES = {case.name: case for case in (*DICOM_CASES, *NIFTI_CASES, *FILE_CASES)}
