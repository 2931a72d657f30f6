"""The audit in numbers: one line per index row, and counts by modality, reason and flag."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.scans.flags import meaning_of_flag
from medssl.scans.formats.base import REASONS
from medssl.scans.index import Index

Row = Mapping[str, Any]

CSV_COLUMNS = (
    "scan_key", "patient_key", "study_key", "series_key", "format", "modality", "status", "reason",
    "remedy", "dims", "shape", "spacing_mm", "orientation", "intensity", "num_channels",
    "num_files", "flags",
)  # fmt: skip
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_AXES = "xyz"
_ROWS_AT_ONCE = 10_000


class _Scans:
    """The accepted scans of one modality, counted one after the other."""

    def __init__(self) -> None:
        self._patients: set[str] = set()
        self._files = 0
        self._shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        self._spacings_mm: dict[str, list[tuple[float, ...]]] = defaultdict(list)

    def add(self, row: Row) -> None:
        self._patients.add(row["patient_key"])
        self._files += int(row["num_files"])
        self._shapes[row["dims"]].append(tuple(row["shape"]))
        if "spacing_unknown" not in row["flags"]:
            self._spacings_mm[row["dims"]].append(tuple(row["spacing_mm"][: _num_places(row)]))

    def counts(self) -> dict[str, Any]:
        kinds = {name: len(shapes) for name, shapes in sorted(self._shapes.items())}
        return {
            "scans": sum(kinds.values()),
            "patients": len(self._patients),
            "files": self._files,
            "by_dims": kinds,
            "shape": _quantiles(self._shapes),
            "spacing_mm": _quantiles(self._spacings_mm),
        }


def rows_of(index: Index) -> Iterator[Row]:
    """Yield all rows of an index, accepted and rejected, by scan key."""
    table = index.table
    for start in range(0, len(table), _ROWS_AT_ONCE):
        for row in table.iloc[start : start + _ROWS_AT_ONCE].to_dict("records"):
            yield {str(name): value for name, value in row.items()}


def spacing_text(row: Row) -> str:
    """Return the spacing as ``0.9 × 0.9 × 1.2``; a cine has two numbers, "" where unknown."""
    lengths = row["spacing_mm"][: _num_places(row)]
    if "spacing_unknown" in row["flags"]:
        return ""
    return " × ".join(f"{length:.3g}" for length in lengths)


def shape_text(row: Row) -> str:
    """Return the shape as ``256 × 256 × 170``."""
    return " × ".join(map(str, row["shape"]))


def write_csv(index: Index, path: Path) -> None:
    """Write one line per index row, with the columns of `CSV_COLUMNS`."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        for row in rows_of(index):
            writer.writerow(
                {
                    **row,
                    "remedy": REASONS.get(row["reason"], ""),
                    "shape": shape_text(row).replace(" × ", "x"),
                    "spacing_mm": spacing_text(row).replace(" × ", "x"),
                    "flags": ";".join(row["flags"]),
                }
            )


def summarize_index(index: Index) -> dict[str, Any]:
    """Return the counts of ``audit.json``: no keys, no paths.

    Quantiles of shape (voxels) and spacing (mm) are the least, the quarters and the greatest over
    the scans of one modality and kind, along the scan's own axes.
    """
    flags: dict[str, Counter[str]] = defaultdict(Counter)
    scans: dict[str, _Scans] = defaultdict(_Scans)
    channels: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for row in rows_of(index):
        accepted = row["status"] == "accepted"
        modality = row["modality"] or "unknown"
        for flag in row["flags"]:
            flags[flag]["scans" if accepted else "rejected"] += 1
        if accepted:
            scans[modality].add(row)
            channels[str(num_channels(row))] += 1
        else:
            rejected[modality] += 1
    summary = {name: value for name, value in index.summary.items() if name != "by_flags"}
    return {
        **summary,
        "by_modality": {name: found.counts() for name, found in sorted(scans.items())},
        "by_channels": dict(sorted(channels.items(), key=lambda item: int(item[0]))),
        "by_flag": {
            flag: {
                "scans": counts["scans"],
                "rejected": counts["rejected"],
                "meaning": meaning_of_flag(flag),
            }
            for flag, counts in sorted(flags.items())
        },
        "rejected_by_modality": dict(sorted(rejected.items())),
        "index_digest": index.digest,
    }


def num_channels(row: Row) -> int:
    """Return how many channels a scan has; an index that does not say so has grey scans only."""
    return int(row.get("num_channels") or 1)


def _num_places(row: Row) -> int:
    """Return how many axes of a scan lie in space: the third of a cine is time."""
    return 2 if row["dims"] == "2D+t" else len(row["shape"])


def _quantiles(
    kinds: Mapping[str, Sequence[tuple[float, ...]]],
) -> dict[str, dict[str, list[float]]]:
    """Return `QUANTILES` along each axis, for each kind of scan."""
    found = {}
    for kind, values in sorted(kinds.items()):
        table = np.quantile(np.asarray(values, dtype=np.float64), QUANTILES, axis=0)
        found[kind] = {
            axis: [round(float(value), 4) for value in column]
            for axis, column in zip(_AXES, table.T, strict=False)
        }
    return found
