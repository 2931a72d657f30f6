"""Strict grouping of DICOM headers to scans. Works on plain headers: no pydicom here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from medssl.errors import RejectedScan
from medssl.scans.formats._stacking import ORIENTATION_TOLERANCE, Stack, stack_slices
from medssl.scans.formats.base import MAX_VOXELS, Group, Header

_ALWAYS_APART = ("modality", "echo", "temporal_position", "b_value")
_APART_WHEN_DUPLICATE = ("image_type_key", "acquisition")
_SPACING_TOLERANCE_MM = 1e-3


def group_headers(headers: Sequence[Header]) -> list[Group]:
    """Put the slices of each series together; every header ends in exactly one group."""
    groups: list[Group] = []
    for series_key, members in _split(headers, lambda header: header.series_key):
        groups.extend(_group_series(str(series_key), members))
    return groups


def _group_series(series_key: str, headers: list[Header]) -> list[Group]:
    groups = []
    unique: dict[str, Header] = {}
    copies = []
    for header in sorted(headers, key=lambda header: header.path):
        if header.digest in unique:
            copies.append(header)
        else:
            unique[header.digest] = header
    if copies:
        groups.append(_rejected(f"{series_key}|copies", copies, "duplicate_file"))
    flat = [header for header in unique.values() if header.facts["projection"]]
    groups += [
        _accepted(f"{series_key}|{header.facts['instance_key']}", [header]) for header in flat
    ]
    slices = [header for header in unique.values() if not header.facts["projection"]]
    if not slices:
        return groups
    if reason := _inconsistent(slices):
        return [*groups, _rejected(series_key, slices, reason)]
    stacks = [
        part
        for _, stack in _split(slices, _facts(_ALWAYS_APART))
        for part in _without_duplicates(stack)
    ]
    volumes_exist = any(len(stack) > 1 for stack in stacks)
    for number, stack in enumerate(stacks):
        identity = series_key if len(stacks) == 1 else f"{series_key}|{_identity(stack[0], number)}"
        if volumes_exist and len(stack) == 1:
            groups.append(_rejected(identity, stack, "stray_slice"))
        else:
            groups.append(_accepted(identity, stack))
    return groups


def _inconsistent(headers: list[Header]) -> str:
    """Return the reason for which slices of one series cannot belong together, or ""."""
    first = headers[0].facts
    size = (first["rows"], first["columns"])
    if any((header.facts["rows"], header.facts["columns"]) != size for header in headers):
        return "mixed_size"
    spacings = np.array([header.facts["spacing_mm"] for header in headers])
    if np.abs(spacings - spacings[0]).max() > _SPACING_TOLERANCE_MM:
        return "mixed_size"
    orientations = np.array([header.facts["orientation"] for header in headers])
    if np.abs(orientations - orientations[0]).max() > ORIENTATION_TOLERANCE:
        return "mixed_orientation"
    frames = {header.facts["frame_key"] for header in headers}
    return "mixed_orientation" if len(frames) > 1 else ""


def _without_duplicates(stack: list[Header]) -> list[list[Header]]:
    """Separate a stack whose slices share places by what distinguishes them, if anything does."""
    for field in _APART_WHEN_DUPLICATE:
        if not _has_duplicates(stack):
            break
        parts = [part for _, part in _split(stack, _facts((field,)))]
        if len(parts) > 1 and all(len(part) > 1 and not _has_duplicates(part) for part in parts):
            return parts
    return [stack]


def _has_duplicates(stack: list[Header]) -> bool:
    try:
        _stack(stack)
    except RejectedScan as error:
        return error.reason == "duplicate_position"
    return False


def _stack(headers: list[Header]) -> Stack:
    facts = headers[0].facts
    return stack_slices(
        np.array([header.facts["position"] for header in headers]),
        np.array(facts["orientation"]),
        np.array(facts["spacing_mm"]),
        facts["thickness_mm"],
    )


def _accepted(identity: str, headers: list[Header]) -> Group:
    facts = headers[0].facts
    try:
        stack = _stack(headers)
        if facts["rows"] * facts["columns"] * len(headers) > MAX_VOXELS:
            raise RejectedScan("too_large")
    except RejectedScan as error:
        return _rejected(identity, headers, error.reason)
    shape = (facts["columns"], facts["rows"])
    calibrated = all(header.facts["calibrated"] for header in headers)
    intensity: Literal["HU", "arbitrary"] = "HU" if calibrated else "arbitrary"
    return Group(
        identity=identity,
        headers=tuple(headers[index] for index in stack.order),
        modality=facts["modality"],
        dims="2D" if len(headers) == 1 else "3D",
        shape=shape if len(headers) == 1 else (*shape, len(headers)),
        affine=stack.affine,
        intensity=intensity,
        flags=_flags(headers),
    )


def _rejected(identity: str, headers: Sequence[Header], reason: str) -> Group:
    return Group(
        identity=identity,
        headers=tuple(headers),
        reason=reason,
        modality=headers[0].facts.get("modality", ""),
        flags=_flags(headers),
    )


def _flags(headers: Iterable[Header]) -> tuple[str, ...]:
    return tuple(sorted({flag for header in headers for flag in header.facts.get("flags", ())}))


def _identity(header: Header, number: int) -> str:
    values = [header.facts[name] for name in (*_ALWAYS_APART, *_APART_WHEN_DUPLICATE)]
    return "|".join(map(str, [*values, number]))


def _facts(names: Sequence[str]) -> Callable[[Header], Hashable]:
    return lambda header: tuple(header.facts[name] for name in names)


def _split(
    headers: Iterable[Header], key: Callable[[Header], Any]
) -> list[tuple[Any, list[Header]]]:
    parts: dict[Any, list[Header]] = defaultdict(list)
    for header in headers:
        parts[key(header)].append(header)
    return sorted(parts.items(), key=lambda part: repr(part[0]))
