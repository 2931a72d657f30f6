"""Strict grouping of DICOM headers to scans. Works on plain headers: no pydicom here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medssl.errors import RejectedScan
from medssl.scans.formats._dicom_frames import SPACING_TOLERANCE_MM
from medssl.scans.formats._dicom_interleaved import APART_WHEN_SHARED, parts_of_stack
from medssl.scans.formats._stacking import ORIENTATION_TOLERANCE, Stack, stack_slices
from medssl.scans.formats.base import MAX_VOXELS, Dims, Group, GroupingConfig, Header

_ALWAYS_APART = ("modality", "channels", "echo", "temporal_position", "b_value")


def group_headers(headers: Sequence[Header], config: GroupingConfig) -> list[Group]:
    """Put the slices of each series together; every header ends in at least one group."""
    groups: list[Group] = []
    for series_key, members in _split(headers, lambda header: header.series_key):
        groups.extend(_group_series(str(series_key), members, config))
    return groups


def _group_series(series_key: str, headers: list[Header], config: GroupingConfig) -> list[Group]:
    groups = []
    unique: dict[Hashable, Header] = {}
    copies = []
    for header in sorted(headers, key=lambda header: header.path):
        # Blank slices of two time points are equal in their pixels, and no copies.
        same = (header.digest, *map(header.facts.get, (*_ALWAYS_APART, *APART_WHEN_SHARED)))
        if same in unique:
            copies.append(header)
        else:
            unique[same] = header
    if copies:
        groups.append(_rejected(f"{series_key}|copies", copies, "duplicate_file"))
    slices = []
    for header in unique.values():
        if header.facts["kind"] == "slice":
            slices.append(header)
        elif header.facts["kind"] == "frames":
            groups += _group_frames(series_key, header, config)
        else:
            # By its pixels too: an export may give one instance UID to all images.
            own = f"{series_key}|{header.facts['instance_key']}|{header.digest}"
            groups.append(_flat(own, header))
    return [*groups, *_group_slices(series_key, slices, config)]


def _group_slices(series_key: str, slices: list[Header], config: GroupingConfig) -> list[Group]:
    if not slices:
        return []
    if reason := _inconsistent(slices):
        return [_rejected(series_key, slices, reason)]
    stacks = [
        part
        for _, stack in _split(slices, _facts(_ALWAYS_APART))
        for part in parts_of_stack(stack, config)
    ]
    volumes_exist = any(len(stack) > 1 for stack in stacks)
    groups = []
    for number, stack in enumerate(stacks):
        identity = series_key if len(stacks) == 1 else f"{series_key}|{_identity(stack[0], number)}"
        if volumes_exist and len(stack) == 1:
            groups.append(_rejected(identity, stack, "stray_slice"))
        else:
            groups.append(_slices(identity, stack, config))
    return groups


def _inconsistent(headers: list[Header]) -> str:
    """Return the reason for which slices of one series cannot belong together, or ""."""
    first = headers[0].facts
    size = (first["rows"], first["columns"])
    if any((header.facts["rows"], header.facts["columns"]) != size for header in headers):
        return "mixed_size"
    spacings = np.array([header.facts["spacing_mm"] for header in headers])
    if np.abs(spacings - spacings[0]).max() > SPACING_TOLERANCE_MM:
        return "mixed_size"
    orientations = np.array([header.facts["orientation"] for header in headers])
    if np.abs(orientations - orientations[0]).max() > ORIENTATION_TOLERANCE:
        return "mixed_orientation"
    frames = {header.facts["frame_key"] for header in headers}
    return "mixed_orientation" if len(frames) > 1 else ""


def _stack_of(headers: list[Header], config: GroupingConfig) -> Stack:
    return _stack(headers[0].facts, [header.facts["position"] for header in headers], config)


def _stack(plane: dict[str, Any], positions: list[list[float]], config: GroupingConfig) -> Stack:
    return stack_slices(
        np.array(positions),
        np.array(plane["orientation"]),
        np.array(plane["spacing_mm"]),
        plane["thickness_mm"],
        config,
        (plane.get("columns", 1), plane.get("rows", 1)),
    )


def _slices(identity: str, headers: list[Header], config: GroupingConfig) -> Group:
    try:
        stack = _stack_of(headers, config)
        # Once more from the first slice, whose directions the volume gets, as when it is read.
        headers = [headers[index] for index in stack.order]
        stack, facts = _stack_of(headers, config), headers[0].facts
        calibrated = all(header.facts["calibrated"] for header in headers)
        group = _stacked(identity, facts, stack, config, calibrated=calibrated)
    except RejectedScan as error:
        return _rejected(identity, headers, error.reason)
    ordered = tuple(headers[index] for index in stack.order)
    face = ("may_show_face",) if len(headers) > 1 and any(h.facts["face"] for h in headers) else ()
    return replace(group, headers=ordered, flags=_flags(headers, *stack.flags, *face))


def _group_frames(series_key: str, header: Header, config: GroupingConfig) -> list[Group]:
    """Return one group for each stack of frames of a multi-frame file."""
    parts = header.facts["parts"]
    volumes_exist = any(len(part["frames"]) > 1 for part in parts)
    own = f"{series_key}|{header.facts['instance_key']}"
    groups = []
    for number, part in enumerate(parts):
        identity = own if len(parts) == 1 else f"{own}|{part['apart']}|{number}"
        reason = part["reason"]
        if not reason and volumes_exist and len(part["frames"]) == 1:
            reason = "stray_slice"
        groups.append(
            _rejected(identity, [header], reason)
            if reason
            else _frames(identity, header, part, config)
        )
    return groups


def _frames(identity: str, header: Header, part: dict[str, Any], config: GroupingConfig) -> Group:
    plane = {**header.facts, **part}
    try:
        stack = _stack(plane, part["positions"], config)
        group = _stacked(identity, plane, stack, config, calibrated=part["calibrated"])
    except RejectedScan as error:
        return _rejected(identity, [header], error.reason)
    several = len(part["frames"]) > 1
    face = ("may_show_face",) if several and header.facts["face"] else ()
    return replace(
        group,
        headers=(header,),
        flags=_flags([header], *stack.flags, *face),
        reading={**group.reading, "frames": [part["frames"][index] for index in stack.order]},
    )


def _stacked(
    identity: str, plane: dict[str, Any], stack: Stack, config: GroupingConfig, *, calibrated: bool
) -> Group:
    """Return the group of a stack, without its headers and flags."""
    num_slices = len(stack.order)
    shape: tuple[int, ...] = (plane["columns"], plane["rows"], num_slices)
    if stack.resampling is not None:
        shape = stack.resampling.shape
    source = plane["columns"] * plane["rows"] * num_slices
    if max(int(np.prod(shape, dtype=object)), source) * plane["channels"] > MAX_VOXELS:
        raise RejectedScan("too_large")
    return _group(
        identity, plane, shape if num_slices > 1 else shape[:2], stack.affine, calibrated,
        dims="3D" if num_slices > 1 else "2D",
        reading=_settings(config) if stack.flags else {},
    )  # fmt: skip


def _settings(config: GroupingConfig) -> dict[str, Any]:
    """Return what a config says of grouping; a config of more may name folders."""
    return {name: getattr(config, name) for name in GroupingConfig.model_fields}


def _flat(identity: str, header: Header) -> Group:
    """Return the group of a single image or a cine."""
    facts = header.facts
    try:
        stack = _stack(facts, [facts["position"]], GroupingConfig())
    except RejectedScan as error:
        return _rejected(identity, [header], error.reason)
    shape: tuple[int, ...] = (facts["columns"], facts["rows"])
    cine = facts["kind"] == "cine"
    group = _group(
        identity, facts, (*shape, facts["num_frames"]) if cine else shape, stack.affine,
        facts["calibrated"], dims="2D+t" if cine else "2D", reading={},
    )  # fmt: skip
    return replace(group, headers=(header,), flags=_flags([header]))


def _group(
    identity: str, facts: dict[str, Any], shape: tuple[int, ...],
    affine: npt.NDArray[np.float64], calibrated: bool, *, dims: Dims, reading: dict[str, Any],
) -> Group:  # fmt: skip
    intensity: Literal["HU", "arbitrary"] = "HU" if calibrated else "arbitrary"
    return Group(
        identity=identity,
        headers=(),
        modality=facts["modality"],
        dims=dims,
        shape=shape,
        num_channels=facts["channels"],
        affine=affine,
        intensity=intensity,
        reading=reading,
    )


def _rejected(identity: str, headers: Sequence[Header], reason: str) -> Group:
    return Group(
        identity=identity,
        headers=tuple(headers),
        reason=reason,
        modality=headers[0].facts.get("modality", ""),
        flags=_flags(headers),
    )


def _flags(headers: Iterable[Header], *more: str) -> tuple[str, ...]:
    found = {flag for header in headers for flag in header.facts.get("flags", ())}
    return tuple(sorted(found.union(more)))


def _identity(header: Header, number: int) -> str:
    values = [header.facts[name] for name in (*_ALWAYS_APART, *APART_WHEN_SHARED)]
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
