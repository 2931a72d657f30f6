"""Explain what became of one file, one series or one scan: `medssl inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medssl.scans.index import Index
from medssl.scans.inspection import (
    MAX_EXPLAINED,
    Explanation,
    Inspection,
    inspect_path,
    inspect_scan,
)

_STACKED = {"2D": "one image", "3D": "one volume", "2D+t": "one cine"}


def run(target: str, index: Path | None = None) -> Inspection:
    """Explain a file or folder, or a row of an index.

    Args:
        target: path of a file or folder; with ``index``, a scan key.
        index: folder of an index.

    Raises:
        DataError: there is nothing at the path, no such row in the index, or no index.
    """
    if index is not None:
        return inspect_scan(Index.open(index), target.strip().lower())
    return inspect_path(Path(target))


def facts_of(inspection: Inspection) -> dict[str, Any]:
    """Return an inspection as JSON values."""
    return asdict(inspection)


def describe(inspection: Inspection, name: str) -> list[str]:
    """Return an inspection in lines for people.

    Args:
        inspection: what was found.
        name: what the user asked about, in the user's own words.
    """
    accepted = inspection.counts.get("", 0)
    rejected = sum(inspection.counts.values()) - accepted
    files, scans = _count(inspection.num_files, "file"), _count(accepted, "scan")
    lines = [f"{name}: {files}, {scans} accepted, {rejected} rejected"]
    for item in inspection.explained:
        lines += ["", *_lines(item)]
    left_out = accepted + rejected - len(inspection.explained)
    if left_out:
        shown = f"at most {MAX_EXPLAINED} are shown; medssl index lists them all"
        lines += ["", f"{left_out} more: {shown}"]
    return lines


def _lines(item: Explanation) -> Iterator[str]:
    yield _verdict(item)
    if item.reason:
        yield f"  why: {item.meaning}"
    if item.detail:
        yield f"  found: {item.detail}"
    yield f"  format: {item.format or 'no format claims it'}"
    if item.format:
        yield f"  grouping: {_grouping(item)}"
    if item.modality:
        yield f"  modality: {item.modality}"
    if item.shape:
        channels = f", {item.num_channels} channels" if item.num_channels > 1 else ""
        yield f"  shape: {' × '.join(map(str, item.shape))}{channels}"
    if item.spacing_mm:
        known = "spacing_unknown" not in item.flags
        spacing = " × ".join(f"{length:.4g}" for length in item.spacing_mm)
        yield f"  spacing: {spacing + ' mm' if known else 'unknown'}"
    if item.shape:
        yield f"  orientation: {item.orientation or 'not in a patient'}"
        yield f"  values: {item.intensity}"
    for flag, meaning in item.flags.items():
        yield f"  flag {flag}: {meaning or 'set by a format from outside medssl'}"
    if item.header:
        yield "  the header says:"
        for label, value in item.header.items():
            yield f"    {label}: {value}"


def _verdict(item: Explanation) -> str:
    key = f"{item.scan_key} " if item.scan_key else ""
    if item.reason:
        return f"{key}rejected: {item.reason}"
    return f"{key}accepted as a {item.dims} scan"


def _grouping(item: Explanation) -> str:
    files = _count(item.num_files, "file")
    if item.reason:
        text = f"{files} of one series" if item.num_files > 1 else files
    else:
        text = f"{files} to {_STACKED.get(item.dims, 'one scan')}"
    if item.num_series_rows > 1:
        text += f"; the series was split into {item.num_series_rows} parts"
    return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
