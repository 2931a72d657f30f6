"""Turn parsed headers into the rows of the index: every file ends in exactly one."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from medssl.scans.formats import FORMATS
from medssl.scans.formats.base import REASONS, Group, GroupingConfig, Header
from medssl.scans.geometry import orientation_of, spacing_of
from medssl.scans.identity import Salt
from medssl.scans.patients import PatientFinder, check_all_found

INDEX_SCHEMA = pa.schema(
    [
        ("scan_key", pa.string()),
        ("patient_key", pa.string()),
        ("study_key", pa.string()),
        ("series_key", pa.string()),
        ("format", pa.string()),
        ("modality", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("dims", pa.string()),
        ("shape", pa.list_(pa.int32())),
        ("spacing_mm", pa.list_(pa.float64())),
        ("orientation", pa.string()),
        ("affine", pa.list_(pa.float64())),
        ("intensity", pa.string()),
        ("num_files", pa.int32()),
        ("flags", pa.list_(pa.string())),
        ("digest", pa.string()),
    ]
)


@dataclass(frozen=True)
class Rows:
    """The table's rows, and the place of every file: (scan key, position), by relative path."""

    rows: list[dict[str, Any]]
    places: dict[str, tuple[str, int]]


def make_rows(headers: Sequence[Header], salt: Salt, patients: PatientFinder) -> Rows:
    """Group headers to scans, and give each scan its keys.

    Raises:
        DataError: the config should name patients but leaves scans out.
    """
    grouped = [(group, name) for name, group in _groups(headers)]
    # By path, so that of two equal scans always the same one is kept.
    grouped.sort(key=lambda item: item[0].headers[0].path)
    rows: list[dict[str, Any]] = []
    places: dict[str, tuple[str, int]] = {}
    digests: set[str] = set()
    without_patient = []
    for group, name in grouped:
        kept = _checked(group, digests)
        scan_key = salt.key("scan", f"{name}\x1f{group.identity}\x1f{kept.reason}")
        if not kept.reason:
            scan_key = salt.key("scan", f"{name}\x1f{group.identity}")
        patient_key, flags = patients.find(kept)
        if not patient_key and not kept.reason:
            without_patient.append(scan_key)
        rows.append(_row(kept, name, scan_key, patient_key, flags))
        for position, header in enumerate(kept.headers):
            places[header.path] = (scan_key, position)
    check_all_found(without_patient)
    rows.sort(key=lambda row: str(row["scan_key"]))
    return Rows(rows, places)


def _groups(headers: Sequence[Header]) -> list[tuple[str, Group]]:
    """Return groups with the name of their format ("" where none claims the file)."""
    usable: dict[str, list[Header]] = defaultdict(list)
    rejected: dict[tuple[str, str, str], list[Header]] = defaultdict(list)
    for header in headers:
        if not header.reason:
            usable[header.format].append(header)
        elif header.series_key:
            rejected[header.format, header.series_key, header.reason].append(header)
        else:
            rejected[header.format, header.path, header.reason].append(header)
    groups = []
    for name, members in sorted(usable.items()):
        groups += [(name, group) for group in FORMATS.load(name)().group(members, GroupingConfig())]
    for (name, identity, reason), members in rejected.items():
        ordered = tuple(sorted(members, key=lambda header: header.path))
        flags = sorted({flag for header in ordered for flag in header.facts.get("flags", ())})
        modality = str(ordered[0].facts.get("modality", ""))
        groups.append(
            (name, Group(identity, ordered, reason, modality=modality, flags=tuple(flags)))
        )
    return groups


def _checked(group: Group, digests: set[str]) -> Group:
    """Reject a scan that is a copy of an earlier one, or of several patients."""
    if group.reason:
        return group
    if len({header.patient_key for header in group.headers}) > 1:
        return replace(group, reason="mixed_patients")
    digest = digest_of(group)
    if digest in digests:
        return replace(group, reason="duplicate_file")
    digests.add(digest)
    return group


def digest_of(group: Group) -> str:
    """Return the sha256 over the digests of a scan's files, in their order."""
    return hashlib.sha256("\n".join(header.digest for header in group.headers).encode()).hexdigest()


def _row(
    group: Group, name: str, scan_key: str, patient_key: str, flags: tuple[str, ...]
) -> dict[str, Any]:
    accepted = not group.reason
    known = accepted and group.affine is not None
    first = group.headers[0]
    row: dict[str, Any] = {
        "scan_key": scan_key,
        "patient_key": patient_key if accepted or first.patient_key else "",
        "study_key": first.study_key,
        "series_key": first.series_key,
        "format": name,
        "modality": group.modality,
        "status": "accepted" if accepted else "rejected",
        "reason": group.reason,
        "dims": group.dims if accepted else "",
        "shape": list(group.shape) if accepted else [],
        "spacing_mm": [],
        "orientation": "",
        "affine": [],
        "intensity": group.intensity if accepted else "",
        "num_files": len(group.headers),
        "flags": sorted({*group.flags, *(flags if accepted else ())}),
        "digest": digest_of(group) if accepted else "",
    }
    if known and group.affine is not None:
        row["spacing_mm"] = list(spacing_of(group.affine))[: len(group.shape)]
        unknown = "no_patient_geometry" in group.flags
        row["orientation"] = "" if unknown else orientation_of(group.affine)
        row["affine"] = group.affine.ravel().tolist()
    return row


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts that a reader wants first; no keys, no paths."""
    accepted = [row for row in rows if row["status"] == "accepted"]
    unknown = sum("patient_unknown" in row["flags"] for row in accepted)
    by_reason: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["reason"]:
            entry = by_reason.setdefault(
                row["reason"], {"rows": 0, "files": 0, "remedy": REASONS.get(row["reason"], "")}
            )
            entry["rows"] += 1
            entry["files"] += row["num_files"]
    return {
        "num_files": sum(row["num_files"] for row in rows),
        "num_scans": len(accepted),
        "num_scan_files": sum(row["num_files"] for row in accepted),
        "num_patients": len({row["patient_key"] for row in accepted}),
        "num_scans_of_unknown_patients": unknown,
        "by_format": _count(accepted, "format"),
        "by_modality": _count(accepted, "modality"),
        "by_dims": _count(accepted, "dims"),
        "rejected": dict(sorted(by_reason.items())),
    }


def _count(rows: Sequence[dict[str, Any]], column: str) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row[column] or "unknown"] += 1
    return dict(sorted(counts.items()))
