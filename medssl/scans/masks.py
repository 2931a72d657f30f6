"""Masks of scans: found by name or by what they refer to, and read onto the scan's own grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from medssl.errors import LabelError, RejectedScan
from medssl.scans.formats.base import REASONS
from medssl.scans.formats.nifti import read_grid
from medssl.scans.index import Index
from medssl.scans.label_report import LabelReport, complete
from medssl.scans.patients import read_table, stem_of
from medssl.scans.scan import Scan
from medssl.scans.scan_names import ScanNames

_GRID_TOLERANCE = 0.1  # of a voxel, at the corners of the grid


class MaskFiles(dict[str, Path]):
    """The mask's file by scan key. For `medssl.scans` and what reads masks; never for output.

    Attributes:
        report: what did not fit.
    """

    report: LabelReport


def match_masks(index: Index, folder: Path) -> MaskFiles:
    """Find the mask of every scan that has one.

    Either ``masks.csv`` in the folder says so (columns ``scan`` and ``mask``; a scan is named by
    its file or folder, its scan key, or its SeriesInstanceUID), or the mask is a NIfTI file of the
    same name as the scan's file.

    Raises:
        LabelError: there is no such folder, no mask fits a scan, or one fits several.
    """
    if not folder.is_dir():
        raise LabelError("there is no folder of masks at the path given. Check its spelling.")
    names, series = ScanNames(index, "scan"), ScanNames(index, "series")
    found = MaskFiles()
    if (folder / "masks.csv").is_file():
        pairs = _listed_masks(folder)
    else:
        files = (path for path in folder.rglob("*.nii*") if path.is_file())
        pairs = [(stem_of(path.name), path) for path in sorted(files)]
    found.report = LabelReport(num_given=len(pairs))
    for name, path in pairs:
        keys = names.find(name) or series.find(name)
        found.report.note("files_without_scan", int(not keys))
        for key in keys:
            if key in found:
                raise LabelError(f"scan {key} has two masks. Keep one a scan.")
            found[key] = path
    if not found:
        raise LabelError(
            f"none of the {len(pairs)} masks fits one of the {len(index.accepted)} accepted scans. "
            "Give each mask the name of its scan's file, or list them in masks.csv with the "
            "columns scan and mask."
        )
    complete(found.report, index, found, disagreeing=False)
    return found


def read_mask(path: Path, scan: Scan) -> npt.NDArray[np.uint8]:
    """Read a mask onto the grid of its scan.

    A mask whose axes are only permuted or reversed against the scan's is turned; nothing is
    resampled.

    Returns:
        (X, Y[, Z]) uint8, class numbers.

    Raises:
        LabelError: it cannot be read, lies on another grid, or holds other than whole numbers from
            0 to 255.
    """
    try:
        volume = read_grid(path)
    except RejectedScan as error:
        raise LabelError(
            f"the mask of scan {scan.scan_key} cannot be read ({error.reason}). "
            f"{REASONS.get(error.reason, '')}"
        ) from None
    except OSError:
        raise LabelError(
            f"the mask of scan {scan.scan_key} cannot be opened. Check that it is there."
        ) from None
    if len(volume.voxels_CXYZ) != 1:
        raise LabelError(
            f"the mask of scan {scan.scan_key} has {len(volume.voxels_CXYZ)} volumes in one file, "
            "wanted one. Give one mask with a number for each class."
        )
    values = volume.voxels_CXYZ[0]
    if values.min() < 0 or values.max() > 255 or not np.array_equal(values, np.round(values)):
        raise LabelError(
            f"the mask of scan {scan.scan_key} holds values from {values.min():g} to "
            f"{values.max():g}, wanted whole numbers from 0 to 255. Is it a mask?"
        )
    return _on_grid(values, volume.affine, scan).astype(np.uint8)


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
