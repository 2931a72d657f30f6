"""DICOM: single-frame images and series. Headers by pydicom, volumes assembled by highdicom."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydicom import config as pydicom_config
from pydicom import dcmread
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.filereader import read_file_meta_info
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from medssl.errors import RejectedScan
from medssl.scans.formats import _dicom_groups
from medssl.scans.formats._dicom_values import (
    finite_or,
    image_type,
    number,
    numbers,
    plain,
    text,
)
from medssl.scans.formats._pixel_bytes import find_pixel_bytes
from medssl.scans.formats._stacking import check_directions, gap_tolerance_mm, stack_slices
from medssl.scans.formats.base import (
    MAX_FILE_BYTES,
    Group,
    GroupingConfig,
    Header,
    ScanFormat,
    Volume,
    check_size,
)
from medssl.scans.identity import Salt

_KEYWORDS = (
    "AcquisitionNumber", "BitsAllocated", "BitsStored", "BurnedInAnnotation", "Columns",
    "DiffusionBValue", "EchoNumbers", "EchoTime", "FrameOfReferenceUID", "HighBit",
    "ImageOrientationPatient", "ImagePositionPatient", "ImageType", "ImagerPixelSpacing",
    "LossyImageCompression", "Modality", "ModalityLUTSequence", "NumberOfFrames", "PatientID",
    "PhotometricInterpretation", "PixelRepresentation", "PixelSpacing", "PresentationLUTShape",
    "RescaleIntercept", "RescaleSlope", "RescaleType", "Rows", "SOPClassUID", "SOPInstanceUID",
    "SamplesPerPixel", "SeriesInstanceUID", "SliceThickness", "StudyInstanceUID",
    "TemporalPositionIdentifier",
)  # fmt: skip
_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1."
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_NOT_IMAGES = tuple(
    _IMAGE_STORAGE + end for end in ("9.", "11.", "66", "67", "68.", "88.", "104.", "481.")
)  # waveforms, display states, segmentations and registrations, reports, documents, radiotherapy
_MULTI_FRAME = {
    "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2", "1.2.840.10008.5.1.4.1.1.4.1",
    "1.2.840.10008.5.1.4.1.1.4.3", "1.2.840.10008.5.1.4.1.1.4.4", "1.2.840.10008.5.1.4.1.1.30",
    "1.2.840.10008.5.1.4.1.1.128.1", "1.2.840.10008.5.1.4.1.1.130",
    "1.2.840.10008.5.1.4.1.1.13.1.3", "1.2.840.10008.5.1.4.1.1.77.1.6",
}  # fmt: skip
_LOCALIZER = {"LOCALIZER", "SCOUT", "TOPOGRAM"}
_COMPUTED = {
    "MPR", "REFORMATTED", "MIP", "MINIP", "PROJECTION IMAGE", "CSA MPR", "CSA RESAMPLED", "ADC",
    "FA", "TRACEW", "SUBTRACTION", "SUB", "TTEST", "PERFUSION", "RESAMPLED", "PROJECTION",
}  # fmt: skip
_PROJECTIONS = {"CR", "DX", "MG", "XA", "RF", "PX", "IO", "DG", "US", "XC", "ES", "GM", "OP"}
_MODALITIES = {"CT", "MR", "PT", "NM", "OT", "SC", "BI", "OPT", "IVUS", "IVOCT", *_PROJECTIONS}
_QUANTITATIVE = {"CT", "MR", "PT", "NM"}  # never inverted for display
_TAG = re.compile(r"\(\s*([0-9A-Fa-f]{4})\s*,\s*([0-9A-Fa-f]{4})\s*\)")


class DicomFormat(ScanFormat):
    """DICOM files: one frame each, alone (2D) or stacked to a volume (3D)."""

    name = "dicom"

    def claims(self, path: Path, head: bytes) -> bool:
        """See `ScanFormat.claims`: by the mark at byte 128, a group 8 start, or the name."""
        if head[128:132] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom", ".ima"):
            return True
        return head[:2] == b"\x08\x00" and head[2:4] in (b"\x00\x00", b"\x05\x00", b"\x08\x00")

    def read_header(self, path: Path, relative: str, salt: Salt) -> Header:
        """See `ScanFormat.read_header`."""
        with path.open("rb") as file, _quiet() as flags:
            dataset = _parse(file, path, headers_only=True)
            facts, reason = _facts(dataset, salt)
            digest = ""
            if not reason:
                digest, reason = _check_pixels(file, dataset, facts)
            series = text(dataset, "SeriesInstanceUID") or f"file\x1f{relative}"
            patient, study = text(dataset, "PatientID"), text(dataset, "StudyInstanceUID")
        facts["flags"] = sorted({*facts["flags"], *flags})
        return Header(
            path=relative,
            format=self.name,
            reason=reason,
            patient_key=salt.key("patient", patient) if patient else "",
            study_key=salt.key("study", study) if study else "",
            series_key=salt.key("series", series),
            digest=digest,
            facts=facts,
        )

    def group(self, headers: Sequence[Header], config: GroupingConfig) -> list[Group]:
        """See `ScanFormat.group`."""
        return _dicom_groups.group_headers(headers)

    def read_voxels(self, paths: Sequence[Path], reading: Mapping[str, Any]) -> Volume:
        """See `ScanFormat.read_voxels`: highdicom decodes, rescales each slice and stacks."""
        with _quiet():
            datasets = [_read_slice(path) for path in paths]
            return _assemble(datasets)


def _parse(file: BinaryIO, path: Path, headers_only: bool) -> FileDataset:
    """Parse a file, after bounding what parsing may cost."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise RejectedScan("too_large", "the file is larger than 4 GiB")
    has_mark = file.read(132)[128:] == b"DICM"
    file.seek(0)
    try:
        # A deflated file is inflated whole, even for its header: 200 KB can become 600 MB.
        syntax = read_file_meta_info(path).get("TransferSyntaxUID") if has_mark else None
        if syntax == DeflatedExplicitVRLittleEndian:
            raise RejectedScan("unsupported_transfer_syntax", "deflated")
        return dcmread(
            file,
            force=not has_mark,
            stop_before_pixels=headers_only,
            specific_tags=list(_KEYWORDS) if headers_only else None,
        )
    except (RejectedScan, OSError):
        raise
    except Exception:  # noqa: BLE001  (a damaged file can fail in any way; values stay inside)
        raise RejectedScan("unreadable", "not parsable as DICOM") from None


def _facts(dataset: FileDataset, salt: Salt) -> tuple[dict[str, Any], str]:
    """Return what grouping needs, and the reason for which the file is rejected, if it is."""
    modality = text(dataset, "Modality").upper()
    facts: dict[str, Any] = {
        "modality": modality if modality in _MODALITIES else "OT",
        "flags": [],
    }
    try:
        reason = _kind(dataset)
        if not reason:
            _add_image_facts(facts, dataset, salt)
    except RejectedScan as error:
        return facts, error.reason
    except Exception:  # noqa: BLE001  (values of the wrong type; they stay inside)
        return facts, "unreadable"
    return facts, reason


def _kind(dataset: FileDataset) -> str:
    """Return why this is not a usable single image, or ""."""
    sop_class = _sop_class(dataset)
    if not sop_class and "Rows" not in dataset:
        return "unreadable"
    if not sop_class.startswith(_IMAGE_STORAGE) or sop_class.startswith(_NOT_IMAGES):
        return "not_an_image"
    if sop_class == _SECONDARY_CAPTURE or sop_class.startswith(_SECONDARY_CAPTURE + "."):
        return "secondary_capture"
    if sop_class in _MULTI_FRAME or int(dataset.get("NumberOfFrames") or 1) > 1:
        return "multi_frame_unsupported"
    words = image_type(dataset)
    if _LOCALIZER & set(words):
        return "localizer"
    if words[:1] == ["DERIVED"] and (words[1:2] == ["SECONDARY"] or _COMPUTED & set(words[2:])):
        return "derived"
    if "Rows" not in dataset or "Columns" not in dataset:
        named = UID(sop_class).name
        return "truncated_pixels" if named.endswith("Image Storage") else "not_an_image"
    if int(dataset.get("SamplesPerPixel") or 1) != 1:
        return "colour_unsupported"
    if not text(dataset, "PhotometricInterpretation").startswith("MONOCHROME"):
        return "colour_unsupported"
    return ""


def _add_image_facts(facts: dict[str, Any], dataset: FileDataset, salt: Salt) -> None:
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    check_size(rows * columns)
    projection = facts["modality"] in _PROJECTIONS
    rescale = [number(dataset, "RescaleSlope", 1.0), number(dataset, "RescaleIntercept", 0.0)]
    if not all(map(math.isfinite, rescale)) or rescale[0] == 0:
        raise RejectedScan("nonfinite_geometry", "the rescaling is not finite or zero")
    hounsfield = text(dataset, "RescaleType") in ("", "HU") and "RescaleIntercept" in dataset
    orientation, position, spacing = _plane(dataset, projection, facts["flags"])
    facts.update(
        rows=rows,
        columns=columns,
        projection=projection,
        rescale=rescale,
        calibrated=facts["modality"] == "CT" and hounsfield,
        orientation=orientation,
        position=position,
        spacing_mm=spacing,
        thickness_mm=finite_or(number(dataset, "SliceThickness", 0.0), 0.0),
        photometric=text(dataset, "PhotometricInterpretation"),
        bits=[int(dataset.BitsAllocated), int(dataset.get("BitsStored") or 0)],
        signed=int(dataset.get("PixelRepresentation") or 0),
        echo=[plain(dataset, "EchoNumbers"), plain(dataset, "EchoTime")],
        temporal_position=plain(dataset, "TemporalPositionIdentifier"),
        b_value=plain(dataset, "DiffusionBValue"),
        acquisition=plain(dataset, "AcquisitionNumber"),
        image_type_key=salt.key("series", "\\".join(image_type(dataset))),
        frame_key=salt.key("series", text(dataset, "FrameOfReferenceUID")),
        instance_key=salt.key("file", text(dataset, "SOPInstanceUID")),
    )
    facts["echo"] = json.dumps(facts["echo"])
    if facts["photometric"] == "MONOCHROME1":
        facts["flags"].append("monochrome1")
    if image_type(dataset)[:1] == ["DERIVED"]:
        facts["flags"].append("derived_primary")
    if text(dataset, "LossyImageCompression") == "01":
        facts["flags"].append("lossy")
    if text(dataset, "BurnedInAnnotation").upper() == "YES":
        facts["flags"].append("burned_in_annotation")


def _plane(
    dataset: FileDataset, projection: bool, flags: list[str]
) -> tuple[list[float], list[float], list[float]]:
    """Return orientation (6), position (3) and pixel spacing (2: rows, columns), LPS mm."""
    orientation = numbers(dataset, "ImageOrientationPatient", 6)
    position = numbers(dataset, "ImagePositionPatient", 3)
    spacing = numbers(dataset, "PixelSpacing", 2)
    if orientation is None or position is None:
        if not projection:
            raise RejectedScan("no_orientation", "orientation or position is missing")
        flags.append("no_patient_geometry")
        orientation, position = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0]
    if spacing is None and projection:
        spacing = numbers(dataset, "ImagerPixelSpacing", 2)
        if spacing is None:
            flags.append("spacing_unknown")
            spacing = [1.0, 1.0]
    if spacing is None or min(spacing) <= 0 or not all(map(math.isfinite, [*spacing, *position])):
        raise RejectedScan("nonfinite_geometry", "position or pixel spacing is unusable")
    check_directions(np.array(orientation))
    return orientation, position, spacing


def _check_pixels(file: BinaryIO, dataset: FileDataset, facts: dict[str, Any]) -> tuple[str, str]:
    """Return the digest of the pixels and of what decides how they are read, and a reason."""
    meta = getattr(dataset, "file_meta", None)
    syntax = UID(str(meta.get("TransferSyntaxUID", "") if meta else ""))
    try:
        compressed = bool(syntax) and syntax.is_compressed
        if compressed and not get_decoder(syntax).is_available:
            return "", "unsupported_transfer_syntax"
    except (NotImplementedError, ValueError):
        return "", "unsupported_transfer_syntax"
    wanted = (facts["rows"] * facts["columns"] * facts["bits"][0] + 7) // 8
    try:
        ranges = find_pixel_bytes(file, wanted, big_endian=not dataset.original_encoding[1])
    except RejectedScan as error:
        return "", error.reason
    read_by = ("rows", "columns", "rescale", "orientation", "position", "spacing_mm",
               "thickness_mm", "photometric", "bits", "signed")  # fmt: skip
    digest = hashlib.sha256(json.dumps([str(syntax), *(facts[name] for name in read_by)]).encode())
    for start, length in ranges:
        file.seek(start)
        while length > 0:
            block = file.read(min(length, 1 << 20))
            if not block:
                return "", "truncated_pixels"
            digest.update(block)
            length -= len(block)
    return digest.hexdigest(), ""


def _read_slice(path: Path) -> FileDataset:
    with path.open("rb") as file:
        dataset = _parse(file, path, headers_only=False)
    try:
        reason = _kind(dataset)
        if reason:
            raise RejectedScan(reason)
        check_size(int(dataset.Rows) * int(dataset.Columns))
    except RejectedScan:
        raise
    except Exception:  # noqa: BLE001  (values of the wrong type; they stay inside)
        raise RejectedScan("unreadable") from None
    if not getattr(dataset, "file_meta", None) or "TransferSyntaxUID" not in dataset.file_meta:
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = _syntax_of(dataset)
    return dataset


def _syntax_of(dataset: FileDataset) -> UID:
    """Return the transfer syntax as the parser found it, for a file that does not state it."""
    implicit, little_endian = dataset.original_encoding
    if implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if little_endian else ExplicitVRBigEndian


def _assemble(datasets: list[FileDataset]) -> Volume:
    """Stack slices that `group` found to belong together."""
    from highdicom import get_volume_from_series

    projection = text(datasets[0], "Modality").upper() in _PROJECTIONS
    planes = [_plane(dataset, projection, []) for dataset in datasets]
    orientation, _, spacing = planes[0]
    thickness = finite_or(number(datasets[0], "SliceThickness", 0.0), 0.0)
    positions = np.array([position for _, position, _ in planes])
    stack = stack_slices(positions, np.array(orientation), np.array(spacing), thickness)
    ordered = [datasets[index] for index in stack.order]
    for dataset, index in zip(ordered, stack.order, strict=True):
        # highdicom compares these exactly; that they agree within tolerance is known already.
        dataset.ImageOrientationPatient, dataset.PixelSpacing = orientation, spacing
        dataset.ImagePositionPatient = planes[index][1]
        dataset.FrameOfReferenceUID = dataset.SeriesInstanceUID = "2.25.1"
        dataset.SOPClassUID = _sop_class(dataset)
        dataset.pop("SpacingBetweenSlices", None)  # not trusted: see FIELD_NOTES, section 3
    try:
        volume = get_volume_from_series(
            ordered,
            dtype=np.float32,
            apply_real_world_transform=False,
            apply_voi_transform=False,
            apply_presentation_lut=text(ordered[0], "Modality").upper() not in _QUANTITATIVE,
            atol=gap_tolerance_mm(stack.gap_mm) if len(ordered) > 1 else None,
        )
    except Exception:  # noqa: BLE001  (decoders fail in any way; their words may hold values)
        raise RejectedScan("unreadable", "the pixels cannot be decoded") from None
    voxels = np.transpose(volume.array, (2, 1, 0))  # (slice, row, column) to (X, Y, Z)
    if float((np.diag([-1, -1, 1]) @ volume.affine[:3, 0]) @ stack.affine[:3, 2]) < 0:
        voxels = voxels[:, :, ::-1]
    if not np.isfinite(voxels).all():
        raise RejectedScan("nan_voxels", "some voxels are not finite")
    if len(ordered) == 1:
        voxels = voxels[:, :, 0]
    return Volume(np.ascontiguousarray(voxels)[np.newaxis], stack.affine)


def _sop_class(dataset: FileDataset) -> str:
    meta = getattr(dataset, "file_meta", None)
    fallback = meta.get("MediaStorageSOPClassUID", "") if meta else ""
    return str(dataset.get("SOPClassUID") or fallback or "")


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep pydicom's and highdicom's own words, which may hold values, from getting out.

    Yields:
        Flags: after the block, one ``dicom_warning`` (with the tag, where one was named) a warning.
    """
    flags: list[str] = []
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    disabled = [logger.disabled for logger in loggers]
    mode = pydicom_config.settings.reading_validation_mode
    try:
        for logger in loggers:
            logger.disabled = True
        pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield flags
        for warning in caught:
            tag = _TAG.search(str(warning.message))
            flags.append("dicom_warning" + (f"_{tag[1]}_{tag[2]}".lower() if tag else ""))
    finally:
        pydicom_config.settings.reading_validation_mode = mode
        for logger, was in zip(loggers, disabled, strict=True):
            logger.disabled = was
