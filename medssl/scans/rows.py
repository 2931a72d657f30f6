"""Turn parsed headers into the rows of the index: every file ends in at least one."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from medssl.scans.formats.base import REASONS, Group, GroupingConfig, Header, load_formats
from medssl.scans.geometry import orientation_of, spacing_of
from medssl.scans.identity import Salt
from medssl.scans.ledger import Ledger
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
        ("num_channels", pa.int32()),
        ("scanner_key", pa.string()),
        ("site_key", pa.string()),
    ]
)

_NO_SLICES = {"derived", "dicomdir", "localizer", "not_an_image", "secondary_capture"}
"""Files of a series that were rejected for one of these are not missing from its scans."""


class RowMaker:
    """Groups headers to scans, series by series, and writes their rows into the ledger.

    Args:
        ledger: holds the headers, and takes the rows.
        salt: makes the keys.
        patients: finds the patient of each scan.
        grouping: what is done with uneven stacks.
        quarantine: flags for which a scan is rejected.
    """

    def __init__(
        self,
        ledger: Ledger,
        salt: Salt,
        patients: PatientFinder,
        grouping: GroupingConfig,
        quarantine: Sequence[str],
    ) -> None:
        self._ledger = ledger
        self._salt = salt
        self._patients = patients
        self._grouping = grouping
        self._quarantine = frozenset(quarantine)
        self._formats = {each.name: each for each in load_formats()}

    def make_all(self) -> None:
        """Make all rows anew.

        Raises:
            DataError: the config should name patients but leaves scans out.
        """
        self._ledger.begin_scans()
        for members in self._ledger.series():
            numbers = {header.path: number for number, header in members}
            for name, group in self._groups([header for _, header in members]):
                files = [(numbers[header.path], header.path) for header in group.headers]
                self._ledger.add_scan(self._row(group, name), group.reading, files)
        for number, row in self._ledger.copies():
            row.update(_REJECTED, status="rejected", reason="duplicate_file")
            row["scan_key"] = self._unique(f"copy\x1f{row['scan_key']}")
            self._ledger.replace_scan(number, row)
        missing = (
            row["scan_key"]
            for row in self._ledger.rows()
            if row["status"] == "accepted" and not row["patient_key"]
        )
        check_all_found(missing)

    def _groups(self, headers: Sequence[Header]) -> Iterable[tuple[str, Group]]:
        """Yield the groups of one series with the name of their format ("": none claims it)."""
        name, series_key = headers[0].format, headers[0].series_key
        usable = [header for header in headers if not header.reason]
        reasons = sorted({header.reason for header in headers if header.reason})
        if usable:
            for group in self._formats[name].group(usable, self._grouping):
                if group.reason == "" and set(reasons) - _NO_SLICES:
                    known = {*group.flags, "incomplete_series"}
                    yield name, replace(group, flags=tuple(sorted(known)))
                else:
                    yield name, group
        for reason in reasons:
            members = tuple(header for header in headers if header.reason == reason)
            flags = sorted({flag for header in members for flag in header.facts.get("flags", ())})
            modality = str(members[0].facts.get("modality", ""))
            identity = series_key or members[0].path
            yield name, Group(identity, members, reason, modality=modality, flags=tuple(flags))

    def _row(self, group: Group, name: str) -> dict[str, Any]:
        patient_key, found_flags = self._patients.find(group)
        group = self._checked(group)
        accepted = not group.reason
        first = group.headers[0]
        identity = f"{name}\x1f{group.identity}"
        row: dict[str, Any] = {
            "scan_key": self._unique(identity if accepted else f"{identity}\x1f{group.reason}"),
            "patient_key": patient_key if accepted or first.patient_key else "",
            "study_key": first.study_key,
            "series_key": first.series_key,
            "format": name,
            "modality": group.modality,
            "status": "accepted" if accepted else "rejected",
            "reason": group.reason,
            "num_files": len(group.headers),
            "scanner_key": first.facts.get("scanner_key", ""),
            "site_key": first.facts.get("site_key", ""),
            "flags": sorted({*group.flags, *(found_flags if accepted else ())}),
            **_REJECTED,
        }
        if accepted:
            row |= {
                "dims": group.dims,
                "shape": list(group.shape),
                "num_channels": group.num_channels,
                "intensity": group.intensity,
                "digest": digest_of(group),
            }
        if accepted and group.affine is not None:
            num_axes = 2 if group.dims in ("2D", "2D+t") else 3
            row["spacing_mm"] = list(spacing_of(group.affine))[:num_axes]
            unknown = "no_patient_geometry" in group.flags
            row["orientation"] = "" if unknown else orientation_of(group.affine)
            row["affine"] = group.affine.ravel().tolist()
        return row

    def _checked(self, group: Group) -> Group:
        """Reject a scan of several patients, and one that may show who the patient is."""
        if group.reason:
            return group
        if self._patients.are_several(group):
            return replace(group, reason="mixed_patients")
        if self._quarantine & set(group.flags):
            return replace(group, reason="quarantined")
        return group

    def _unique(self, identity: str) -> str:
        """Return the key of a row; two rows of one identity are told apart by a number."""
        scan_key = self._salt.key("scan", identity)
        number = 1
        while self._ledger.has_key(scan_key):
            number += 1
            scan_key = self._salt.key("scan", f"{identity}\x1f{number}")
        return scan_key


_REJECTED: dict[str, Any] = {
    "dims": "", "shape": [], "spacing_mm": [], "orientation": "", "affine": [], "intensity": "",
    "digest": "", "num_channels": 0,
}  # fmt: skip
"""What is known of accepted scans only."""


def digest_of(group: Group) -> str:
    """Return the sha256 over the digests of a scan's files, in order, and how they are read."""
    parts = [header.digest for header in group.headers]
    if group.reading:
        parts.append(repr(sorted(group.reading.items())))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def summarize(
    rows: Iterable[dict[str, Any]], num_files: int, num_scan_files: int
) -> dict[str, Any]:
    """Return the counts that a reader wants first; no keys, no paths.

    Args:
        rows: of the index, in any order.
        num_files: all files. One that holds several scans is in several rows, and counted once.
        num_scan_files: files of accepted scans.
    """
    counts: dict[str, Counter[str]] = {
        name: Counter() for name in ("format", "modality", "dims", "flags")
    }
    rejected: dict[str, dict[str, Any]] = {}
    patients: set[str] = set()
    num_scans = unknown = 0
    for row in rows:
        if row["reason"]:
            entry = rejected.setdefault(
                row["reason"], {"rows": 0, "files": 0, "remedy": REASONS.get(row["reason"], "")}
            )
            entry["rows"] += 1
            entry["files"] += row["num_files"]
            continue
        num_scans += 1
        patients.add(row["patient_key"])
        unknown += "patient_unknown" in row["flags"]
        for name in ("format", "modality", "dims"):
            counts[name][row[name] or "unknown"] += 1
        counts["flags"].update(row["flags"])
    return {
        "num_files": num_files,
        "num_scans": num_scans,
        "num_scan_files": num_scan_files,
        "num_patients": len(patients),
        "num_scans_of_unknown_patients": unknown,
        **{f"by_{name}": dict(sorted(found.items())) for name, found in counts.items()},
        "rejected": dict(sorted(rejected.items())),
    }
