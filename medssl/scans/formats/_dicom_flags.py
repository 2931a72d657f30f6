"""What the index should know of a DICOM file beside its voxels, above all who might be seen in it.

Source: DICOM PS3.3, sections C.7.6.1.1 and C.8.5.5; PS3.15, annex E.
"""

from __future__ import annotations

import re
from typing import Any

from medssl.scans.formats._dicom_values import tag_of, text, words

_OFTEN_BURNED_IN = {"US", "IVUS", "ES", "XC", "GM", "OP", "OT", "SC"}
_FACES_IN = {"CT", "MR", "PT"}
_HEAD = re.compile(r"HEAD|BRAIN|FACE|FACIAL|NECK|SKULL|CRANI|ORBIT|SINUS|JAW|MAXILL|MANDIB")


def flags_of(dataset: Any, modality: str, photometric: str) -> list[str]:
    """Return the flags of one file."""
    flags = []
    if photometric == "MONOCHROME1":
        flags.append("monochrome1")
    if words(dataset, "ImageType")[:1] == ["DERIVED"]:
        flags.append("derived_primary")
    if text(dataset, "LossyImageCompression") == "01":
        flags.append("lossy")
    burned_in = text(dataset, "BurnedInAnnotation").upper()
    if burned_in == "YES":
        flags.append("burned_in_annotation")
    elif burned_in != "NO" and modality in _OFTEN_BURNED_IN:
        flags.append("burned_in_possible")
    if tag_of("SequenceOfUltrasoundRegions") in dataset:
        flags.append("ultrasound_regions")
    return flags


def may_show_face(dataset: Any, modality: str) -> bool:
    """Whether a face could be rendered from a volume of such slices."""
    if modality not in _FACES_IN:
        return False
    if text(dataset, "RecognizableVisualFeatures").upper() == "NO":
        return False
    return bool(_HEAD.search(text(dataset, "BodyPartExamined").upper()))
