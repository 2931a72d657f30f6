"""What a DICOM file holds: one slice, one image, a cine, or frames that lie in the patient."""

from __future__ import annotations

from typing import Any, Literal

from pydicom.uid import UID

from medssl.errors import RejectedScan
from medssl.scans.formats._dicom_values import integer, tag_of, text, words

Kind = Literal["slice", "image", "cine", "frames"]

_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1."
_DICOMDIR = "1.2.840.10008.1.3.10"
_SECONDARY_CAPTURE = _IMAGE_STORAGE + "7"
_PARAMETRIC_MAP = _IMAGE_STORAGE + "30"
_WHOLE_SLIDE = _IMAGE_STORAGE + "77.1.6"
_NOT_IMAGES = tuple(
    _IMAGE_STORAGE + end for end in ("9.", "11.", "66", "67", "68.", "88.", "104.", "481.")
)  # waveforms, display states, segmentations and registrations, reports, documents, radiotherapy
_OF_FRAMES = {
    _IMAGE_STORAGE + end
    for end in ("2.1", "2.2", "4.1", "4.3", "4.4", "128.1", "130", "13.1.1", "13.1.2", "13.1.3")
}  # enhanced and converted CT, MR and PET, X-ray angiography in 3D, breast tomosynthesis
_ULTRASOUND_VOLUME = _IMAGE_STORAGE + "6.2"
_LOCALIZER = {"LOCALIZER", "SCOUT", "TOPOGRAM"}
_COMPUTED = {
    "MPR", "REFORMATTED", "MIP", "MINIP", "PROJECTION IMAGE", "CSA MPR", "CSA RESAMPLED", "ADC",
    "FA", "TRACEW", "SUBTRACTION", "SUB", "TTEST", "PERFUSION", "RESAMPLED", "PROJECTION",
    "MAX_IP", "MIN_IP", "MAXIMUM", "MINIMUM", "ADDITION", "DIVISION", "MULTIPLICATION",
    "STD_DEVIATION",
}  # fmt: skip
PROJECTIONS = {"CR", "DX", "MG", "XA", "RF", "PX", "IO", "DG", "US", "XC", "ES", "GM", "OP"}
_CINES = PROJECTIONS - {"MG", "CR"} | {"NM", "IVUS"}
MODALITIES = {"CT", "MR", "PT", "NM", "OT", "SC", "BI", "OPT", "IVUS", "IVOCT", *PROJECTIONS}
QUANTITATIVE = {"CT", "MR", "PT", "NM"}  # never inverted for display
_TIMES = {0x00181063, 0x00181065, 0x00540070, 0x00540100}
# frame time, frame times, time slots, time slices


def kind_of(dataset: Any, sop_class: str) -> Kind:
    """Return what the file holds.

    Raises:
        RejectedScan: it holds nothing that could become a scan.
    """
    if sop_class == _DICOMDIR or tag_of("DirectoryRecordSequence") in dataset:
        raise RejectedScan("dicomdir")
    if not sop_class and tag_of("Rows") not in dataset:
        raise RejectedScan("unreadable")
    if not dataset or _IMAGE_STORAGE.startswith(sop_class or "-"):
        raise RejectedScan("unreadable", "the file ends in its header")
    if not sop_class.startswith(_IMAGE_STORAGE) or sop_class.startswith(_NOT_IMAGES):
        raise RejectedScan("not_an_image")
    if sop_class == _SECONDARY_CAPTURE or sop_class.startswith(_SECONDARY_CAPTURE + "."):
        raise RejectedScan("secondary_capture")
    if sop_class == _PARAMETRIC_MAP:
        raise RejectedScan("derived")
    kind = _frames_kind(dataset, sop_class)
    if reason := reason_of_type(words(dataset, "ImageType")):
        raise RejectedScan(reason)
    if "Rows" not in dataset or "Columns" not in dataset:
        named = "Image Storage" in UID(sop_class).name
        raise RejectedScan("truncated_pixels" if named else "not_an_image")
    return kind


def reason_of_type(image_type: list[str]) -> str:
    """Return why an image of this ImageType or FrameType is no scan, or ""."""
    if _LOCALIZER & set(image_type):
        return "localizer"
    if image_type[:1] == ["DERIVED"] and (
        image_type[1:2] == ["SECONDARY"] or _COMPUTED & set(image_type[2:])
    ):
        return "derived"
    # Many slices of a functional series side by side in one image, without their places.
    return "multi_frame_unsupported" if "MOSAIC" in image_type else ""


def _frames_kind(dataset: Any, sop_class: str) -> Kind:
    modality = text(dataset, "Modality").upper()
    num_frames = integer(dataset, "NumberOfFrames", 1)
    if sop_class in (_WHOLE_SLIDE, _ULTRASOUND_VOLUME):
        raise RejectedScan("multi_frame_unsupported")
    if _is_part(dataset):
        raise RejectedScan(
            "multi_frame_unsupported", "one of several files into which the frames were divided"
        )
    grouped = tag_of("PerFrameFunctionalGroupsSequence") in dataset
    if grouped and (sop_class in _OF_FRAMES or modality not in _CINES):
        return "frames"
    if sop_class in _OF_FRAMES:
        raise RejectedScan("multi_frame_unsupported", "functional groups are missing")
    if num_frames <= 1:
        return "image" if modality in PROJECTIONS else "slice"
    if modality not in _CINES:
        raise RejectedScan("multi_frame_unsupported")
    if not _over_time(dataset, modality):
        raise RejectedScan("multi_frame_unsupported", "the frames do not follow each other in time")
    return "cine"


def _is_part(dataset: Any) -> bool:
    """Whether the frames go on in another file, as in the parts of a concatenation."""
    total = integer(dataset, "InConcatenationTotalNumber", 0)
    return total > 1 or (total != 1 and text(dataset, "ConcatenationUID") != "")


def _over_time(dataset: Any, modality: str) -> bool:
    """Whether the frames are counted by time, not by detector, slice or angle.

    In nuclear medicine the file must say so, and count by nothing else; elsewhere it may say
    nothing.
    """
    pointer = dataset.get("FrameIncrementPointer")
    tags = [] if pointer is None else list(pointer) if hasattr(pointer, "__iter__") else [pointer]
    in_time = [int(tag) in _TIMES for tag in tags]
    if modality == "NM":
        return bool(tags) and all(in_time)
    return not tags or any(in_time)
