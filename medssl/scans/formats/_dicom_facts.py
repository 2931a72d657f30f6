"""What the index must know of a DICOM file to group and to read it, in JSON values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from medssl.errors import RejectedScan
from medssl.scans.formats._dicom_flags import flags_of, may_show_face
from medssl.scans.formats._dicom_frames import Frame, frames_of, parts_of, rescale_of
from medssl.scans.formats._dicom_kind import MODALITIES, QUANTITATIVE, kind_of
from medssl.scans.formats._dicom_parse import Parsed
from medssl.scans.formats._dicom_plane import plane_of
from medssl.scans.formats._dicom_values import (
    finite_or,
    integer,
    item,
    number,
    plain,
    tag_of,
    text,
    words,
)
from medssl.scans.formats.base import check_size
from medssl.scans.identity import name_of_scanner, name_of_site

KEYWORDS = (
    "AcquisitionNumber", "BitsAllocated", "BitsStored", "BodyPartExamined",
    "BluePaletteColorLookupTableData", "BluePaletteColorLookupTableDescriptor",
    "BurnedInAnnotation", "Columns", "ConcatenationUID", "DiffusionBValue",
    "DirectoryRecordSequence", "EchoNumbers", "EchoTime", "FrameIncrementPointer",
    "FrameOfReferenceUID",
    "GreenPaletteColorLookupTableData", "GreenPaletteColorLookupTableDescriptor", "HighBit",
    "ImageOrientationPatient", "ImagePositionPatient", "ImageType", "ImagerPixelSpacing",
    "InConcatenationTotalNumber", "InstitutionName",
    "LossyImageCompression", "Manufacturer", "ManufacturerModelName", "Modality",
    "ModalityLUTSequence", "NumberOfFrames", "PatientID",
    "PerFrameFunctionalGroupsSequence", "PhotometricInterpretation", "PixelRepresentation",
    "PixelSpacing", "PlanarConfiguration", "PresentationLUTShape", "RecognizableVisualFeatures",
    "RedPaletteColorLookupTableData", "RedPaletteColorLookupTableDescriptor",
    "RescaleIntercept", "RescaleSlope", "RescaleType", "Rows", "SOPClassUID", "SOPInstanceUID",
    "SamplesPerPixel", "SegmentedBluePaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData", "SegmentedRedPaletteColorLookupTableData",
    "SequenceOfUltrasoundRegions", "SeriesInstanceUID", "SharedFunctionalGroupsSequence",
    "SliceThickness", "StudyInstanceUID", "TemporalPositionIdentifier",
)  # fmt: skip
# Plain whole numbers: pydicom compares its own tags ten times slower.
TAGS = [int(tag_of(keyword)) for keyword in KEYWORDS]

_COLOURS = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"}
_BITS = {1, 8, 16, 32, 64}
_TABLES = tuple(
    f"{kind}{colour}PaletteColorLookupTable{end}"
    for colour in ("Red", "Green", "Blue")
    for kind, end in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
)
MAX_FRAMES = 2**16
_MOST_BITS = 64
_MOST_ROWS = 2**16 - 1
READ_BY = (
    "kind", "rows", "columns", "num_frames", "samples", "rescale", "orientation", "position",
    "spacing_mm", "thickness_mm", "photometric", "inverted", "bits", "signed", "tables", "frames",
)  # fmt: skip
"""The facts that decide what is read from the pixels."""


def modality_of(dataset: Any) -> str:
    """Return the modality; one that is none, which may hold anything, as ``OT``."""
    modality = text(dataset, "Modality").upper()
    return modality if modality in MODALITIES else "OT"


def facts_of(parsed: Parsed, key: Callable[[str], str]) -> dict[str, Any]:
    """Return what is needed of a file that may belong to a scan.

    Args:
        key: turns an identifier into a key.

    Raises:
        RejectedScan: it may not.
    """
    try:
        return _facts(parsed, key)
    except (RejectedScan, MemoryError):
        raise
    except Exception:  # noqa: BLE001  (values of the wrong type; they stay inside)
        raise RejectedScan("unreadable", "a value is not what its element may hold") from None


def _facts(parsed: Parsed, key: Callable[[str], str]) -> dict[str, Any]:
    dataset = parsed.dataset
    modality = modality_of(dataset)
    facts: dict[str, Any] = {
        "kind": kind_of(dataset, parsed.sop_class),
        "modality": modality,
        **_pixel_facts(dataset, modality),
        "face": may_show_face(dataset, modality),
        "image_type_key": key("\\".join(words(dataset, "ImageType"))),
        "frame_key": key(text(dataset, "FrameOfReferenceUID")),
        "instance_key": key(text(dataset, "SOPInstanceUID")),
        "acquisition": plain(dataset, "AcquisitionNumber"),
        **_places(dataset, key),
    }
    flags = flags_of(dataset, modality, facts["photometric"])
    if facts["channels"] > 1:
        flags.append("colour")
    if facts["kind"] == "frames":
        frames = frames_of(dataset, facts["num_frames"], modality)
        if len(frames) == 1:
            facts.update(_lone_frame(frames[0], key))
        else:
            facts["parts"] = [_part(frames, numbers, key) for numbers in parts_of(frames)]
            facts["frames"] = key(json.dumps([vars(frame) for frame in frames]))
    else:
        facts.update(_plane_facts(dataset, facts["kind"], modality, flags))
    facts["flags"] = flags
    return facts


def _places(dataset: Any, key: Callable[[str], str]) -> dict[str, str]:
    """Return the keys of the scanner and of the site; without what a file does not say."""
    names = {
        "scanner_key": name_of_scanner(
            text(dataset, "Manufacturer"), text(dataset, "ManufacturerModelName")
        ),
        "site_key": name_of_site(text(dataset, "InstitutionName")),
    }
    return {fact: key(name) for fact, name in names.items() if name}


def _pixel_facts(dataset: Any, modality: str) -> dict[str, Any]:
    rows, columns = integer(dataset, "Rows", 0), integer(dataset, "Columns", 0)
    num_frames = max(integer(dataset, "NumberOfFrames", 1), 1)
    photometric = text(dataset, "PhotometricInterpretation").upper()
    samples = integer(dataset, "SamplesPerPixel", 1)
    allocated = integer(dataset, "BitsAllocated", 0)
    stored = integer(dataset, "BitsStored", 0) or allocated
    high = integer(dataset, "HighBit", stored - 1)
    channels = _channels(dataset, photometric, samples)
    check_size(rows * columns)
    if max(rows, columns) > _MOST_ROWS:
        raise RejectedScan("unreadable", "more rows or columns than a file can state")
    if num_frames > MAX_FRAMES:
        raise RejectedScan("too_large", f"at most {MAX_FRAMES} frames are read")
    check_size(rows * columns * num_frames * channels)
    if allocated not in _BITS or not stored - 1 <= high < allocated or stored < 1:
        plausible = all(0 <= bits <= _MOST_BITS for bits in (allocated, stored, high))
        found = f"{stored} bits stored in {allocated}, the last at {high}"
        # A number beyond these is none of bits, and may be anybody's.
        raise RejectedScan("unreadable", found if plausible else "an impossible number of bits")
    shape = text(dataset, "PresentationLUTShape").upper()
    inverted = photometric == "MONOCHROME1" or (shape == "INVERSE" and channels == 1)
    return {
        "rows": rows,
        "columns": columns,
        "num_frames": num_frames,
        "samples": samples,
        "channels": channels,
        "photometric": photometric,
        "inverted": inverted and modality not in QUANTITATIVE,
        "bits": [allocated, stored, high],
        "signed": integer(dataset, "PixelRepresentation", 0),
        "planar": integer(dataset, "PlanarConfiguration", 0),
        "tables": _digest_of_tables(dataset),
    }


def _channels(dataset: Any, photometric: str, samples: int) -> int:
    if photometric in ("MONOCHROME1", "MONOCHROME2") and samples == 1:
        return 1
    if photometric == "PALETTE COLOR" and samples == 1:
        if tag_of("RedPaletteColorLookupTableDescriptor") in dataset:
            return 3
    elif photometric in _COLOURS and samples == 3:
        return 3
    raise RejectedScan("colour_unsupported", "neither grey, RGB, YBR nor palette")


def _digest_of_tables(dataset: Any) -> str:
    """Return a digest of the tables through which pixels are read, or ""."""
    palette = tag_of("RedPaletteColorLookupTableDescriptor") in dataset
    lut: Any = None
    if tag_of("ModalityLUTSequence") in dataset:
        lut = item(dataset, "ModalityLUTSequence")
    if not palette and lut is None:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for source, names in ((dataset, _TABLES), (lut, ("LUTDescriptor", "LUTData"))):
        for name in names if source is not None else ():
            element = source.get_item(tag_of(name))
            if element is not None:
                digest.update(f"{name}{element.value!r}".encode())
    return digest.hexdigest()


def _plane_facts(dataset: Any, kind: str, modality: str, flags: list[str]) -> dict[str, Any]:
    orientation, position, spacing = plane_of(dataset, kind == "slice", flags)
    rescale, calibrated = rescale_of(dataset, modality)
    if tag_of("ModalityLUTSequence") in dataset:
        lut = item(dataset, "ModalityLUTSequence")
        rescale, calibrated = [1.0, 0.0], calibrated and text(lut, "ModalityLUTType") == "HU"
    return {
        "rescale": rescale,
        "calibrated": calibrated,
        "orientation": orientation,
        "position": position,
        "spacing_mm": spacing,
        "thickness_mm": finite_or(number(dataset, "SliceThickness", 0.0), 0.0),
        "echo": json.dumps([plain(dataset, "EchoNumbers"), plain(dataset, "EchoTime")]),
        "temporal_position": plain(dataset, "TemporalPositionIdentifier"),
        "b_value": plain(dataset, "DiffusionBValue"),
    }


def _lone_frame(frame: Frame, key: Callable[[str], str]) -> dict[str, Any]:
    """Return the facts of a slice, for a file of functional groups that holds just one."""
    if frame.reason:
        raise RejectedScan(frame.reason)
    return {
        "kind": "slice",
        "rescale": frame.rescale,
        "calibrated": frame.calibrated,
        "orientation": frame.orientation,
        "position": frame.position,
        "spacing_mm": frame.spacing_mm,
        "thickness_mm": frame.thickness_mm,
        "echo": key(frame.apart),
        "temporal_position": None,
        "b_value": None,
    }


def _part(frames: list[Frame], numbers: list[int], key: Callable[[str], str]) -> dict[str, Any]:
    """Return the facts of one stack of a file of frames."""
    # The plane of the first frame of the stack, as when it is read.
    orientation = np.array(frames[numbers[0]].orientation)
    normal = np.cross(orientation[:3], orientation[3:])
    numbers = sorted(numbers, key=lambda number: float(np.dot(frames[number].position, normal)))
    first = frames[numbers[0]]
    return {
        "frames": numbers,
        "positions": [frames[number_of_frame].position for number_of_frame in numbers],
        "orientation": first.orientation,
        "spacing_mm": first.spacing_mm,
        "thickness_mm": first.thickness_mm,
        "calibrated": all(frames[number_of_frame].calibrated for number_of_frame in numbers),
        "reason": first.reason,
        "apart": key(first.apart),
    }
