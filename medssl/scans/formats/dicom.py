"""DICOM: slices of series, enhanced multi-frame files, cines and single images, by pydicom."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from medssl.errors import RejectedScan
from medssl.scans.formats import _dicom_groups
from medssl.scans.formats._codestream import check_frames, heads_of
from medssl.scans.formats._dicom_facts import READ_BY, TAGS, facts_of, modality_of
from medssl.scans.formats._dicom_parse import Parsed, open_unchanged, parse, quiet
from medssl.scans.formats._dicom_pixels import over_float32
from medssl.scans.formats._dicom_values import tag_of, text
from medssl.scans.formats._dicom_volume import read_volume
from medssl.scans.formats._pixel_bytes import find_pixel_bytes, peek_float_pixels, read_ranges
from medssl.scans.formats.base import Group, GroupingConfig, Header, ScanFormat, Volume
from medssl.scans.identity import Salt

_FLOAT32_BITS = 24
_OFFSET_BYTES = 4
_ID_TAGS = [int(tag_of(keyword)) for keyword in
            ("Modality", "PatientID", "SOPClassUID", "SeriesInstanceUID", "StudyInstanceUID")
]  # fmt: skip
# What may be said of a file that ends in its header, for want of what would have come.
_OF_LOST_VALUES = {"unreadable", "nonfinite_geometry", "no_orientation"}
_SERIES_TAG = int(tag_of("SeriesInstanceUID"))


class DicomFormat(ScanFormat):
    """DICOM files: slices and frames stacked to volumes (3D), cines (2D+t), single images (2D)."""

    name = "dicom"

    def claims(self, path: Path, head: bytes) -> bool:
        """See `ScanFormat.claims`: by the mark at byte 128, the first element, or the name."""
        if head[128:132] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom", ".ima"):
            return True
        return _starts_with_element(head)

    def read_header(self, path: Path, relative: str, salt: Salt) -> Header:
        """See `ScanFormat.read_header`."""
        digest, reason = "", ""
        with open_unchanged(path) as file, quiet() as flags:
            parsed = _parse(file)
            modality, patient, study, series = _identifiers(parsed)
            broke_off = bool(series) and parsed.ended_early
            facts: dict[str, Any] = {"modality": modality, "flags": []}
            try:
                if parsed.broken:
                    raise RejectedScan("unreadable", "not parsable as DICOM")
                facts = facts_of(parsed, lambda identifier: salt.key("file", identifier))
                digest = _digest(parsed, facts)
            except RejectedScan as error:
                reason = error.reason
                if broke_off and reason in _OF_LOST_VALUES:
                    reason = "truncated_pixels"
        facts["flags"] = sorted({*facts["flags"], *flags})
        return Header(
            path=relative,
            format=self.name,
            reason=reason,
            patient_key=salt.key("patient", patient) if patient else "",
            study_key=salt.key("study", study) if study else "",
            series_key=salt.key("series", series or f"file\x1f{relative}"),
            digest=digest,
            facts=facts,
        )

    def group(self, headers: Sequence[Header], config: GroupingConfig) -> list[Group]:
        """See `ScanFormat.group`."""
        return _dicom_groups.group_headers(headers, config)

    def read_voxels(self, paths: Sequence[Path], reading: Mapping[str, Any]) -> Volume:
        """See `ScanFormat.read_voxels`."""
        with quiet():
            return read_volume(paths, reading)


def _starts_with_element(head: bytes) -> bool:
    """Say whether a file without the mark starts with an element of group 8 or of group 2."""
    group, element, vr = head[:2], head[2:4], head[4:6]
    if group == b"\x08\x00":
        return element in (b"\x00\x00", b"\x05\x00", b"\x08\x00")
    if group == b"\x00\x08":  # the high byte first: always with the kind of value
        return element[:1] == b"\x00" and vr in (b"UL", b"CS", b"UI")
    return group == b"\x02\x00" and element[1:] == b"\x00" and vr in (b"UL", b"OB", b"UI")


def _parse(file: BinaryIO) -> Parsed:
    """Parse a file; of one that breaks off, what says to which series it belongs.

    Raises:
        RejectedScan: ``unreadable`` when it does not say so.
    """
    try:
        return parse(file, TAGS)
    except RejectedScan as error:
        if error.reason != "unreadable":
            raise
        file.seek(0)
        parsed = parse(file, _ID_TAGS, last_tag=_SERIES_TAG)
        if tag_of("SeriesInstanceUID") not in parsed.dataset:
            raise
        return replace(parsed, broken=True)


def _identifiers(parsed: Parsed) -> tuple[str, str, str, str]:
    """Return modality, and the identifiers of patient, study and series ("" where absent)."""
    dataset = parsed.dataset
    try:
        patient, study = text(dataset, "PatientID"), text(dataset, "StudyInstanceUID")
        return modality_of(dataset), patient, study, text(dataset, "SeriesInstanceUID")
    except Exception:  # noqa: BLE001  (values of an unknown type; they stay inside)
        raise RejectedScan("unreadable", "an identifier cannot be read") from None


def _digest(parsed: Parsed, facts: dict[str, Any]) -> str:
    """Return the digest of the pixels and of what decides how they are read.

    BLAKE3, the fastest of the strong digests: with others, reading a header is mostly hashing.

    Raises:
        RejectedScan: ``unsupported_transfer_syntax``, ``truncated_pixels``, ``unreadable`` or
            ``too_large``.
    """
    compressed = _is_compressed(parsed.syntax)
    allocated, stored, _ = facts["bits"]
    # 4:2:2 keeps every other colour; compressed, the size is the decoder's affair.
    samples = 2 if facts["photometric"] == "YBR_FULL_422" else facts["samples"]
    wanted = (facts["rows"] * facts["columns"] * facts["num_frames"] * samples * allocated + 7) // 8
    floating = peek_float_pixels(parsed.content, big_endian=parsed.big_endian)
    ranges = find_pixel_bytes(parsed.content, parsed.size, wanted, big_endian=parsed.big_endian)
    if compressed:
        check_frames(heads_of(parsed.content, ranges[1:]), facts)  # the first: offset table
        if 0 < ranges[0][1] // _OFFSET_BYTES < facts["num_frames"]:
            raise RejectedScan("unreadable", "the offset table is shorter than the frames are many")
    read_by = [parsed.syntax, *(facts.get(name) for name in READ_BY)]
    digest = blake3(json.dumps(read_by).encode())
    wide = stored > _FLOAT32_BITS and not floating
    over = wide and compressed
    for block in read_ranges(parsed.content, ranges):
        digest.update(block)
        over = over or (wide and over_float32(block, facts, parsed.big_endian))
    if over:
        facts["flags"].append("beyond_float32")
    return digest.hexdigest()


def _is_compressed(syntax: UID) -> bool:
    """Say whether pixels of this syntax are compressed.

    Raises:
        RejectedScan: ``unsupported_transfer_syntax`` when no decoder for it is installed.
    """
    try:
        available = get_decoder(syntax).is_available
    except (NotImplementedError, ValueError):
        available = False
    if not available:
        raise RejectedScan("unsupported_transfer_syntax", "no decoder is installed")
    return bool(syntax.is_compressed)
