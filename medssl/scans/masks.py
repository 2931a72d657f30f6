"""Masks of scans: found by name or by what they refer to, and read onto the scan's own grid."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medssl.errors import LabelError, RejectedScan
from medssl.scans.formats._dicom_seg import is_dicom, read_segments, referenced_series
from medssl.scans.formats.base import REASONS
from medssl.scans.formats.nifti import read_grid
from medssl.scans.index import Index
from medssl.scans.label_report import LabelReport, complete
from medssl.scans.patients import read_table, stem_of
from medssl.scans.scan import Scan
from medssl.scans.scan_names import ScanNames

_GRID_TOLERANCE = 0.1  # of a voxel, at the corners of the grid


@dataclass(frozen=True)
class MaskFolder:
    """A folder of masks.

    Attributes:
        folder: where they lie.
        classes: names of the values 1, 2, …: the labels of a DICOM segmentation's segments.
    """

    folder: Path
    classes: tuple[str, ...] = ()


class MaskFiles(dict[str, Path]):
    """The mask's file by scan key. For `medssl.scans` and what reads masks; never for output.

    Attributes:
        report: what did not fit.
    """

    report: LabelReport


def match_masks(index: Index, folder: Path) -> MaskFiles:
    """Find the mask of every scan that has one.

    Either ``masks.csv`` in the folder says so (columns ``scan`` and ``mask``; a scan is named by
    its file or folder, its scan key, or its SeriesInstanceUID); or the mask is a NIfTI file of the
    same name as the scan's file, or a DICOM segmentation that refers to the scan's series.

    Raises:
        LabelError: there is no such folder, no mask fits a scan, or one fits several.
    """
    if not folder.is_dir():
        raise LabelError("there is no folder of masks at the path given. Check its spelling.")
    listed = (folder / "masks.csv").is_file()
    pairs = _keys_of_listed(index, folder) if listed else _keys_of_files(index, folder)
    found = MaskFiles()
    found.report = LabelReport(num_given=len(pairs))
    for keys, path in pairs:
        found.report.note("files_without_scan", int(not keys))
        for key in keys:
            if key in found:
                raise LabelError(f"scan {key} has two masks. Keep one a scan.")
            found[key] = path
    if not found:
        raise LabelError(
            f"none of the {len(pairs)} masks fits one of the {len(index.accepted)} accepted scans. "
            "Give each mask the name of its scan's file, or list them in masks.csv with the "
            "columns scan and mask. A DICOM segmentation must refer to the scan's series."
        )
    complete(found.report, index, found, disagreeing=False)
    return found


def mask_digest(path: Path, classes: Sequence[str]) -> str:
    """Return the sha256 of a mask, and of what decides how its file is read."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    if is_dicom(path):
        digest.update(json.dumps(list(classes)).encode())
    return digest.hexdigest()


def read_mask(path: Path, scan: Scan, classes: Sequence[str] = ()) -> npt.NDArray[np.uint8]:
    """Read a mask onto the grid of its scan.

    A mask whose axes are only permuted or reversed against the scan's is turned; nothing is
    resampled. The frames of a DICOM segmentation are put where they lie, and may be a part of the
    scan's slices.

    Args:
        path: the mask.
        scan: the scan, whose grid is wanted.
        classes: see `MaskFolder`.

    Returns:
        (X, Y[, Z]) uint8, class numbers.

    Raises:
        LabelError: it cannot be read, lies on another grid, or holds other than whole numbers from
            0 to 255.
    """
    values, affine = grid_of_mask(path, scan.scan_key, classes)
    if is_dicom(path):
        return _put_on_grid(values, affine, scan).astype(np.uint8)
    return _on_grid(values, affine, scan).astype(np.uint8)


def grid_of_mask(
    path: Path, scan_key: str, classes: Sequence[str] = ()
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Read a mask on its own grid: class numbers, and the affine to RAS mm. See `read_mask`."""
    try:
        volume = read_segments(path, classes) if is_dicom(path) else read_grid(path)
    except RejectedScan as error:
        raise LabelError(
            f"the mask of scan {scan_key} cannot be read ({error.reason}). "
            f"{REASONS.get(error.reason, '')}"
        ) from None
    except LabelError as error:
        raise LabelError(f"the mask of scan {scan_key}: {error}") from None
    except OSError:
        raise LabelError(
            f"the mask of scan {scan_key} cannot be opened. Check that it is there."
        ) from None
    if len(volume.voxels_CXYZ) != 1:
        raise LabelError(
            f"the mask of scan {scan_key} has {len(volume.voxels_CXYZ)} volumes in one file, "
            "wanted one. Give one mask with a number for each class."
        )
    values = volume.voxels_CXYZ[0]
    if values.min() < 0 or values.max() > 255 or not np.array_equal(values, np.round(values)):
        raise LabelError(
            f"the mask of scan {scan_key} holds values from {values.min():g} to "
            f"{values.max():g}, wanted whole numbers from 0 to 255. Is it a mask?"
        )
    return values, volume.affine


def _keys_of_listed(index: Index, folder: Path) -> list[tuple[list[str], Path]]:
    names, series = ScanNames(index, "scan"), ScanNames(index, "series")
    return [(names.find(name) or series.find(name), path) for name, path in _listed_masks(folder)]


def _keys_of_files(index: Index, folder: Path) -> list[tuple[list[str], Path]]:
    names, series = ScanNames(index, "scan"), ScanNames(index, "series")
    pairs: list[tuple[list[str], Path]] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name.lower().endswith((".nii", ".nii.gz")):
            name = stem_of(path.name)
            pairs.append((names.find(name) or series.find(name), path))
        elif is_dicom(path):
            keys = [key for uid in referenced_series(path) for key in series.find(uid)]
            pairs.append((keys if len(keys) == 1 else _covered(index, keys, path), path))
    return pairs


def _covered(index: Index, keys: Sequence[str], path: Path) -> list[str]:
    """Return which scans of the series that a segmentation refers to it lies on."""
    found = []
    for key in keys:
        row = index.row(key)
        values, affine = grid_of_mask(path, key)
        grid = np.reshape(row["affine"], (4, 4)), tuple(int(size) for size in row["shape"])
        if _placement(values.shape, affine, *grid) is not None:
            found.append(key)
    return found


def _put_on_grid(
    mask: npt.NDArray[np.float32], affine: npt.NDArray[np.float64], scan: Scan
) -> npt.NDArray[np.float32]:
    """Put the slices that a segmentation has where they lie in the scan; the others are 0."""
    shape = scan.voxels_CXYZ.shape[1:]
    placement = _placement(mask.shape, affine, scan.affine, shape)
    if placement is None:
        raise LabelError(
            f"the segmentation of scan {scan.scan_key} refers to its series, but has "
            f"{_by(mask.shape)} voxels (slices, rows, columns) that do not lie on the voxels of "
            f"the scan ({_by(shape)}). A mask must lie on its scan's grid: export it without "
            "resampling, and index the series without (gantry_tilt, irregular_spacing)."
        )
    axes, flips, region = placement
    whole = np.zeros((*shape, 1)[:3], np.float32)
    whole[region] = np.flip(np.transpose(mask, axes), flips)
    return whole.reshape(shape)


def _placement(
    mask_shape: tuple[int, ...],
    affine: npt.NDArray[np.float64],
    scan_affine: npt.NDArray[np.float64],
    scan_shape: tuple[int, ...],
) -> tuple[list[int], tuple[int, ...], tuple[slice, ...]] | None:
    """Return how to transpose and flip a mask, and the scan's region it covers; None if it cannot.

    The mask's voxels must be voxels of the scan, but need not be all of them.
    """
    to_scan = np.linalg.inv(scan_affine) @ affine
    if mask_shape[0] == 1:  # the distance to a next slice that there is not
        across = np.abs(to_scan[:3, 1:3]).round().sum(axis=1) == 0
        to_scan[:3, 0] = across
    turn = np.round(to_scan[:3, :3])
    if not (np.abs(turn).sum(0) == 1).all() or not (np.abs(turn).sum(1) == 1).all():
        return None
    axes = [int(axis) for axis in np.argmax(np.abs(turn), axis=1)]
    ends = np.array([(0, 0, 0, 1), (*(np.array(mask_shape) - 1), 1)], dtype=np.float64).T
    corners = np.stack(np.meshgrid(*ends[:3], [1.0], indexing="ij"), -1).reshape(-1, 4).T
    places = (to_scan @ corners)[:3]
    exact = np.round((to_scan @ ends)[:3])
    rounded = to_scan.copy()
    rounded[:3, :3], rounded[:3, 3] = turn, np.round(to_scan[:3, 3])
    low, high = exact.min(axis=1).astype(int), exact.max(axis=1).astype(int)
    if np.abs(places - (rounded @ corners)[:3]).max() > _GRID_TOLERANCE:
        return None
    if (low < 0).any() or (high >= np.array((*scan_shape, 1)[:3])).any():
        return None
    flips = tuple(axis for axis in range(3) if turn[axis].sum() < 0)
    return axes, flips, tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))


def _on_grid(
    mask: npt.NDArray[np.float32], affine: npt.NDArray[np.float64], scan: Scan
) -> npt.NDArray[np.float32]:
    shape = scan.voxels_CXYZ.shape[1:]
    if sorted(mask.shape) != sorted(shape):
        raise LabelError(
            f"the mask of scan {scan.scan_key} has shape {_by(mask.shape)}, the scan has "
            f"{_by(shape)}. A mask must lie on its scan's grid: export it without resampling."
        )
    moved = affine.copy()
    if len(shape) == 2:  # the thickness of a single slice is not compared
        moved[:, 2] = scan.affine[:, 2]
    to_scan = np.linalg.inv(scan.affine) @ moved
    turn = np.round(to_scan[:3, :3])
    is_turn = np.array_equal(np.abs(turn).sum(0), [1, 1, 1]) and np.array_equal(
        np.abs(turn).sum(1), [1, 1, 1]
    )
    if is_turn:
        axes = [int(axis) for axis in np.argmax(np.abs(turn), axis=1)][: len(shape)]
        turned = np.transpose(mask, axes) if max(axes) < len(shape) else mask
        flips = tuple(axis for axis in range(len(shape)) if turn[axis].sum() < 0)
        if turned.shape == shape and _corners_agree(to_scan, turn, mask.shape, shape):
            return np.ascontiguousarray(np.flip(turned, flips))
    raise LabelError(
        f"the mask of scan {scan.scan_key} has the scan's shape {_by(shape)} but lies elsewhere: "
        f"its origin is {_mm(affine[:3, 3])}, the scan's {_mm(scan.affine[:3, 3])} mm (RAS). "
        "Export it in the scan's own space."
    )


def _corners_agree(
    to_scan: npt.NDArray[np.float64],
    turn: npt.NDArray[np.float64],
    mask_shape: tuple[int, ...],
    shape: tuple[int, ...],
) -> bool:
    """Say whether every corner of the mask's grid falls on a corner of the scan's."""
    exact = np.eye(4)
    exact[:3, :3] = turn
    sizes = np.array([*shape, 1][:3])
    exact[:3, 3] = np.where(turn.sum(1) < 0, sizes - 1, 0)
    ends = [(0, size - 1) for size in [*mask_shape, 1][:3]]
    corners = np.stack(np.meshgrid(*ends, [1], indexing="ij"), -1).reshape(-1, 4).T
    return bool(np.abs((to_scan - exact) @ corners).max() <= _GRID_TOLERANCE)


def _listed_masks(folder: Path) -> list[tuple[str, Path]]:
    table = read_table(folder / "masks.csv", "mask", ("scan", "mask"))[["scan", "mask"]].dropna()
    pairs = [
        (str(scan).strip(), folder / str(mask).strip())
        for scan, mask in zip(table["scan"], table["mask"], strict=True)
    ]
    missing = sum(not path.is_file() for _, path in pairs)
    if missing:
        raise LabelError(
            f"masks.csv names {missing} of {len(pairs)} mask files that are not there. "
            "Paths in it are relative to its own folder."
        )
    return pairs


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _mm(point: npt.NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{value:.1f}" for value in point) + ")"
