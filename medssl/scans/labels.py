"""Labels of scans: tables of classes or numbers, and masks on the scan's own grid.

Tables name scans by what their owner knows them by (file name, PatientID, SeriesInstanceUID). Those
names are matched here and go no further: what comes out is named by scan key.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from medssl.errors import LabelError, RejectedScan
from medssl.scans.formats.base import REASONS
from medssl.scans.formats.nifti import read_grid
from medssl.scans.index import Index
from medssl.scans.patients import names_of, read_table, stem_of
from medssl.scans.scan import Scan

By = Literal["scan", "series", "patient"]

_WHAT = {
    "scan": "the scan's file name, its path below the indexed folder (for a DICOM series: of its "
    "folder), or its scan key",
    "series": "SeriesInstanceUID",
    "patient": "PatientID, or the name that `patients` in the index config gives",
}
_GRID_TOLERANCE = 0.1  # of a voxel, at the corners of the grid


class LabelTable(dict[str, str | float]):
    """Label by scan key.

    Attributes:
        num_unmatched_rows: rows of the table that fit no accepted scan.
        num_unlabelled_scans: accepted scans without a label.
    """

    num_unmatched_rows = 0
    num_unlabelled_scans = 0


def read_label_table(
    index: Index, path: Path, *, by: By, id_column: str, label_column: str
) -> LabelTable:
    """Read one label a scan from a CSV or Parquet table.

    Args:
        index: the scans.
        path: the table.
        by: what ``id_column`` names: scans, series or patients (whose label all their scans get).
        id_column: column of names.
        label_column: column of labels; where all are numbers they come out as float. Empty cells
            are no label.

    Raises:
        ConfigError: there is no such table.
        DataError: it is no table, or a column is missing.
        LabelError: no row fits a scan, a name fits several scans, or a scan gets two labels.
    """
    table = read_table(path, "label", (id_column, label_column))
    pairs = table[[id_column, label_column]].dropna()
    values = _as_numbers(pairs[label_column])
    names = _scans_by_name(index, by)
    labels = LabelTable()
    for name, value in zip(pairs[id_column].astype(str).str.strip(), values, strict=True):
        keys = _look_up(index, names, name, by)
        if not keys:
            labels.num_unmatched_rows += 1
        for key in keys:
            if labels.setdefault(key, value) != value:
                raise LabelError(
                    f"scan {key} gets two different labels from column {label_column!r}. "
                    f"Keep one row for each {by}."
                )
    labels.num_unlabelled_scans = len(index.accepted) - len(labels)
    if not labels:
        raise LabelError(
            f"none of the {len(pairs)} rows of the label table fits one of the "
            f"{len(index.accepted)} accepted scans. Column {id_column!r} is read as {_WHAT[by]}. "
            "Check the column, and `by` (scan, series or patient)."
        )
    return labels


def match_masks(index: Index, folder: Path) -> dict[str, Path]:
    """Find the mask of every scan that has one.

    Either ``masks.csv`` in the folder says so (columns ``scan`` and ``mask``; a scan is named by
    its file or folder, its scan key, or its SeriesInstanceUID), or the mask is a NIfTI file of the
    same name as the scan's file.

    Returns:
        Mask files by scan key. For `medssl.scans` and what reads masks; never for output.

    Raises:
        LabelError: there is no such folder, no mask fits a scan, or one fits several.
    """
    if not folder.is_dir():
        raise LabelError("there is no folder of masks at the path given. Check its spelling.")
    names = _scans_by_name(index, "scan")
    found: dict[str, Path] = {}
    if (folder / "masks.csv").is_file():
        pairs = _listed_masks(folder)
    else:
        files = (path for path in folder.rglob("*.nii*") if path.is_file())
        pairs = [(stem_of(path.name), path) for path in sorted(files)]
    for name, path in pairs:
        for key in _look_up(index, names, name, "scan") or _look_up(index, names, name, "series"):
            if key in found:
                raise LabelError(f"scan {key} has two masks. Keep one a scan.")
            found[key] = path
    if not found:
        raise LabelError(
            f"none of the {len(pairs)} masks fits one of the {len(index.accepted)} accepted scans. "
            "Give each mask the name of its scan's file, or list them in masks.csv with the "
            "columns scan and mask."
        )
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


def _scans_by_name(index: Index, by: By) -> dict[str, list[str]]:
    """Return the scan keys that each name stands for."""
    names: dict[str, list[str]] = defaultdict(list)
    accepted = index.accepted
    if by == "scan":
        for key, path, num_files in index.file_names():
            for name in {key, *names_of(path, single=num_files == 1)}:
                names[name].append(key)
    column = {"series": "series_key", "scan": "series_key", "patient": "patient_key"}[by]
    for key, named in zip(accepted["scan_key"], accepted[column], strict=True):
        if named:
            names[f"{column}\x1f{named}"].append(key)
    return names


def _look_up(index: Index, names: dict[str, list[str]], name: str, by: By) -> list[str]:
    if by == "scan":
        keys = names.get(name) or names.get(stem_of(name)) or []
        if len(keys) > 1:
            raise LabelError(
                f"one name fits {len(keys)} scans (keys {', '.join(sorted(keys)[:3])}). "
                "Name scans by their path below the indexed folder, or by scan key."
            )
        return keys
    return names.get(f"{by}_key\x1f{index.salt.key(by, name)}", [])


def _as_numbers(values: pd.Series[Any]) -> Iterable[str | float]:
    texts = values.astype(str).str.strip()
    try:
        return [float(value) for value in texts]
    except ValueError:
        return list(texts)


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
