"""What does not fit between labels and scans: every kind of mismatch, counted and named by key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from medssl.scans.index import Index

MISMATCHES: dict[str, str] = {
    "double_rows": "rows that say again what another row says of the scan",
    "files_without_scan": "files that fit no accepted scan",
    "left_out_classes": "scans whose class is none of those configured",
    "patients_disagree": "patients whose scans have different labels",
    "rows_without_scan": "rows that fit no accepted scan",
    "rows_without_value": "rows with no label (an empty cell, or not a number)",
    "scans_without_label": "accepted scans without a label",
}
"""Kinds of mismatch, with what each counts."""

KEYS_KEPT = 20
"""Keys that a report holds of each kind, in the order of the keys; the count says how many."""


@dataclass
class LabelReport:
    """How labels and scans fit each other. Holds scan and patient keys, and no other name.

    Attributes:
        num_given: rows, or files, that give labels.
        num_labelled: scans that have a label.
        counts: how often each of `MISMATCHES` was met.
        keys: of the scans or patients concerned, where there are any.
    """

    num_given: int = 0
    num_labelled: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def note(self, kind: str, count: int = 1) -> None:
        """Count a mismatch that concerns no scan of the index."""
        if kind not in MISMATCHES:
            raise ValueError(f"no mismatch is called {kind!r}")
        if count:
            self.counts[kind] = self.counts.get(kind, 0) + count

    def note_keys(self, kind: str, keys: Iterable[str]) -> None:
        """Count a mismatch for each of some scans or patients, and keep the first keys."""
        found = sorted(keys)
        self.note(kind, len(found))
        if found:
            kept = sorted({*self.keys.get(kind, ()), *found})
            self.keys[kind] = tuple(kept[:KEYS_KEPT])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values: a count a mismatch, with keys where there are any."""
        return {
            "given": self.num_given,
            "labelled": self.num_labelled,
            "mismatches": {
                kind: {
                    "count": count,
                    "what": MISMATCHES[kind],
                    "keys": list(self.keys.get(kind, ())),
                }
                for kind, count in sorted(self.counts.items())
            },
        }


def complete(
    report: LabelReport, index: Index, labels: Mapping[str, object], *, disagreeing: bool = True
) -> None:
    """Note what can be told when all labels are read.

    Args:
        report: to note it in.
        index: the scans.
        labels: by scan key.
        disagreeing: whether scans of one patient should have the same label.
    """
    report.num_labelled = len(labels)
    owners = dict(zip(index.accepted["scan_key"], index.accepted["patient_key"], strict=True))
    report.note_keys("scans_without_label", owners.keys() - labels.keys())
    if disagreeing:
        found: dict[str, set[object]] = defaultdict(set)
        for key, label in labels.items():
            found[owners[key]].add(label)
        several = (patient for patient, values in found.items() if len(values) > 1)
        report.note_keys("patients_disagree", several)
