"""Read one scan from its DICOM files: decode, rescale each slice, stack, and resample if wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medssl.errors import RejectedScan
from medssl.scans.formats._dicom_facts import TAGS, facts_of, modality_of
from medssl.scans.formats._dicom_frames import frames_of
from medssl.scans.formats._dicom_parse import Parsed, open_unchanged, parse
from medssl.scans.formats._dicom_pixels import PIXEL_TAGS, decode_frames
from medssl.scans.formats._resampling import resample_stack
from medssl.scans.formats._stacking import stack_slices
from medssl.scans.formats.base import GroupingConfig, Volume, check_size


def read_volume(paths: Sequence[Path], reading: Mapping[str, Any]) -> Volume:
    """Read the voxels of one group.

    Args:
        paths: one file of frames, one image, one cine, or the slices of a volume in any order.
        reading: of the group.

    Raises:
        RejectedScan: the files cannot be read any more.
    """
    config = GroupingConfig(**{key: reading[key] for key in GroupingConfig.model_fields
                               if key in reading})  # fmt: skip
    if "frames" in reading:
        return _frames(paths[0], reading["frames"], config)
    opened = _files(paths)
    parsed, facts = next(opened)
    if facts["kind"] == "frames":
        raise RejectedScan("multi_frame_unsupported", "which frames to read was not said")
    if facts["kind"] == "cine":
        num_frames = facts["num_frames"]
        cine = _array(facts, num_frames)
        values = decode_frames(parsed, facts, range(num_frames), [facts["rescale"]] * num_frames)
        for number, plane in enumerate(values):
            cine[..., number] = plane
        return _stacked(cine, facts, [facts["position"]], GroupingConfig())
    voxels = _array(facts, len(paths))
    positions = []
    for number, (slice_parsed, slice_facts) in enumerate(chain([(parsed, facts)], opened)):
        if any(slice_facts[name] != facts[name] for name in ("rows", "columns", "channels")):
            raise RejectedScan("mixed_size", "the slices differ in size")
        (plane,) = decode_frames(slice_parsed, slice_facts, [0], [slice_facts["rescale"]])
        voxels[..., number] = plane
        positions.append(slice_facts["position"])
    return _stacked(voxels, facts, positions, config)


def _frames(path: Path, wanted: Sequence[int], config: GroupingConfig) -> Volume:
    ((parsed, facts),) = _files([path])
    frames = frames_of(parsed.dataset, facts["num_frames"], modality_of(parsed.dataset))
    if facts["kind"] != "frames" or not wanted or max(wanted) >= len(frames) or min(wanted) < 0:
        raise RejectedScan("unreadable", "the file does not hold the frames that it held")
    voxels = _array(facts, len(wanted))
    rescale = [frames[number].rescale for number in wanted]
    for position, plane in enumerate(decode_frames(parsed, facts, wanted, rescale)):
        voxels[..., position] = plane
    first = frames[wanted[0]]
    plane_facts = {"orientation": first.orientation, "spacing_mm": first.spacing_mm,
                   "thickness_mm": first.thickness_mm}  # fmt: skip
    return _stacked(voxels, plane_facts, [frames[number].position for number in wanted], config)


def _files(paths: Sequence[Path]) -> Iterator[tuple[Parsed, dict[str, Any]]]:
    for path in paths:
        with open_unchanged(path) as file:
            parsed = parse(file, [*TAGS, *PIXEL_TAGS], with_pixels=True)
        yield parsed, facts_of(parsed, lambda _: "")


def _array(facts: dict[str, Any], count: int) -> npt.NDArray[np.float32]:
    check_size(facts["columns"] * facts["rows"] * count * facts["channels"])
    return np.empty((facts["channels"], facts["columns"], facts["rows"], count), np.float32)


def _stacked(
    voxels: npt.NDArray[np.float32],
    plane: dict[str, Any],
    positions: Sequence[Sequence[float]],
    config: GroupingConfig,
) -> Volume:
    stack = stack_slices(
        np.array(positions),
        np.array(plane["orientation"]),
        np.array(plane["spacing_mm"]),
        plane["thickness_mm"],
        config,
        (voxels.shape[1], voxels.shape[2]),
    )
    if len(stack.order) > 1 and list(stack.order) != sorted(stack.order):
        voxels = voxels[..., list(stack.order)]
    if stack.resampling is not None:
        check_size(int(np.prod(stack.resampling.shape, dtype=object)) * voxels.shape[0])
        voxels = resample_stack(voxels, stack.resampling)
    if plane.get("kind") != "cine" and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    return Volume(np.ascontiguousarray(voxels), stack.affine)
