"""Points in patients: read in mm from tables or as centroids of masks, and put on a scan's grid.

A point is kept in mm until the very last, when the prepared grid is known: no resampling can lose
it, and none rounds it twice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from medssl.errors import DataError, LabelError
from medssl.scans.index import Index
from medssl.scans.label_report import LabelReport, complete
from medssl.scans.masks import grid_of_mask, match_masks
from medssl.scans.patients import read_table
from medssl.scans.scan_names import MEANING, By, ScanNames

Point = tuple[float, float, float]
UNKNOWN: Point = (math.nan, math.nan, math.nan)
_OUTSIDE_VOXELS = 1.0
"""A point may lie this far beyond the centres of a scan's outermost voxels."""


class PointTable(dict[str, tuple[Point, ...]]):
    """The points of each scan in RAS mm, in the order of the names; NaN where unknown.

    Attributes:
        names: of the points.
        report: what did not fit.
    """

    names: tuple[str, ...]
    report: LabelReport


@dataclass(frozen=True)
class PointSource:
    """Where points come from: a table with a row a point, or masks with a label a point.

    Attributes:
        table: CSV or Parquet with columns for scan and name of the point, and x, y, z in mm; z may
            be left out where all scans are 2D.
        masks: folder of masks; point number n is the centroid of the value n + 1.
        names: of the points; sorted from the table by default.
        by: what the table's rows name.
        id_column: names the scan.
        name_column: names the point.
        coordinates: RAS as NIfTI has them, or LPS as DICOM.
    """

    table: Path | None = None
    masks: Path | None = None
    names: tuple[str, ...] | None = None
    by: By = "scan"
    id_column: str = "scan"
    name_column: str = "name"
    coordinates: Literal["RAS", "LPS"] = "RAS"

    def read(self, index: Index) -> PointTable:
        """Return the points of every scan that has any.

        Raises:
            ConfigError: there is no such table.
            DataError: it is no table, or a column is missing.
            LabelError: no row fits a scan, one point has two places, a name is not listed, a
                coordinate is no number, or points lie outside their scans.
        """
        points = self._of_table(index) if self.masks is None else self._of_masks(index, self.masks)
        complete(points.report, index, points, disagreeing=False)
        _check_inside(points, index, self.coordinates)
        return points

    def _of_table(self, index: Index) -> PointTable:
        if self.table is None:
            raise ValueError("neither a table nor masks")
        columns = [self.id_column, self.name_column, "x", "y"]
        table = read_table(self.table, "points", tuple(columns))
        if "z" not in table.columns:
            if set(index.accepted["dims"]) - {"2D"}:
                read_table(self.table, "points", ("z",))  # says which columns there are
            table = table.assign(z="0")
        columns.append("z")
        points = PointTable()
        points.report = report = LabelReport(num_given=len(table))
        rows = table[columns].dropna()
        report.note("rows_without_value", len(table) - len(rows))
        found = {str(name).strip() for name in rows[self.name_column]}
        points.names = self.names or tuple(sorted(found))
        if unlisted := sorted(found - set(points.names)):
            raise LabelError(
                f"the points table names {len(unlisted)} points that are not among the classes "
                f"{list(points.names)}. Add them to classes, or leave them out of the table."
            )
        names, doubled = ScanNames(index, self.by), []
        for scan, name, *place in zip(*(rows[column] for column in columns), strict=True):
            number, point = points.names.index(str(name).strip()), self._point(place)
            keys = names.find(str(scan).strip())
            report.note("rows_without_scan", int(not keys))
            for key in keys:
                all_points = list(points.get(key, (UNKNOWN,) * len(points.names)))
                if all_points[number] == point:
                    doubled.append(key)
                elif not math.isnan(all_points[number][0]):
                    raise LabelError(
                        f"scan {key} has point {points.names[number]!r} at two places. "
                        "Keep one row for each point of a scan."
                    )
                all_points[number] = point
                points[key] = tuple(all_points)
        report.note_keys("double_rows", doubled)
        if not points:
            raise LabelError(
                f"none of the {len(rows)} rows of the points table fits one of the "
                f"{len(index.accepted)} accepted scans. Column {self.id_column!r} is read as "
                f"{MEANING[self.by]}. Check the column, and `by` (scan, series or patient)."
            )
        return points

    def _point(self, place: Sequence[object]) -> Point:
        try:
            x, y, z = (float(str(number)) for number in place)
        except ValueError:
            x = y = z = math.inf
        if not all(map(math.isfinite, (x, y, z))):
            raise LabelError(
                "the points table holds coordinates that are not finite numbers. Give millimetres "
                "with a point, or leave the row out where a point is unknown."
            )
        return (x, y, z) if self.coordinates == "RAS" else (-x, -y, z)

    def _of_masks(self, index: Index, folder: Path) -> PointTable:
        matched = match_masks(index, folder)
        points = PointTable()
        points.report, points.names = matched.report, self.names or ()
        for key, path in matched.items():
            values, affine = grid_of_mask(path, key, points.names)
            found = tuple(_centroid(values == n, affine) for n in range(1, len(points.names) + 1))
            if not all(math.isnan(point[0]) for point in found):
                points[key] = found
        if not points:
            raise LabelError(
                f"none of {len(matched)} masks holds one of the values 1 to {len(points.names)}, "
                "whose centroids are the points. Check the masks."
            )
        return points


def points_digest(points: Sequence[Point]) -> str:
    """Return the sha256 of one scan's points."""
    return hashlib.sha256(json.dumps(points).encode()).hexdigest()


def paint_points(
    points: Sequence[Point], affine: npt.ArrayLike, shape: tuple[int, ...], scan_key: str
) -> npt.NDArray[np.uint8]:
    """Return a mask in which point number n is one voxel of the value n + 1.

    The voxel is the nearest one to the point; or, where that is another point's, the nearest that
    is free.

    Args:
        points: in RAS mm; unknown ones are left out.
        affine: (4, 4), voxel index of the grid to RAS mm; of a 2D grid the third column lies
            across it, and points are put upon the plane.
        shape: of the grid.
        scan_key: for the message.

    Raises:
        DataError: a point lies outside the grid.
    """
    mask = np.zeros(shape, np.uint8)
    for number, point in enumerate(points, start=1):
        if math.isnan(point[0]):
            continue
        place = voxel_of(point, affine)[: len(shape)]
        nearest = np.rint(place).astype(int)
        if (nearest < 0).any() or (nearest >= shape).any():
            raise DataError(
                f"scan {scan_key}: landmark number {number} lies outside the prepared scan: the "
                "foreground crop cut it off. Raise preprocessing.margin_mm, or set "
                "preprocessing.crop_foreground=false."
            )
        around = [np.clip(nearest + step, 0, np.array(shape) - 1)
                  for step in product((0, -1, 1), repeat=len(shape))]  # fmt: skip
        free = [tuple(voxel) for voxel in around if mask[tuple(voxel)] == 0]
        if not free:
            raise DataError(
                f"scan {scan_key}: more landmarks lie at one place than there are voxels. "
                "Use finer voxels (preprocessing.spacing_mm)."
            )
        mask[min(free, key=lambda voxel: float(np.sum((np.array(voxel) - place) ** 2)))] = number
    return mask


def voxel_of(point: Point, affine: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the voxel coordinates (3,) of a point in RAS mm."""
    inverse = np.linalg.inv(np.asarray(affine, dtype=np.float64))
    return np.asarray((inverse @ np.array([*point, 1.0]))[:3])


def _centroid(inside: npt.NDArray[np.bool_], affine: npt.NDArray[np.float64]) -> Point:
    voxels = np.argwhere(inside)
    if not len(voxels):
        return UNKNOWN
    centre = np.zeros(3)
    centre[: voxels.shape[1]] = voxels.mean(axis=0)
    x, y, z = (affine[:3, :3] @ centre + affine[:3, 3]).tolist()
    return x, y, z


def _check_inside(points: PointTable, index: Index, coordinates: str) -> None:
    """Refuse points outside their scans: most often they are of the other system."""
    outside: Counter[str] = Counter()
    columns = (index.accepted[name].tolist() for name in ("scan_key", "shape", "affine"))
    for scan_key, sizes, affine in zip(*columns, strict=True):
        for point in points.get(scan_key, ()):
            if math.isnan(point[0]):
                continue
            shape = np.array([int(size) for size in sizes])
            place = voxel_of(point, np.reshape(affine, (4, 4)))[: len(shape)]
            if (place < -_OUTSIDE_VOXELS).any() or (place > shape - 1 + _OUTSIDE_VOXELS).any():
                outside[scan_key] += 1
    if outside:
        other = "LPS" if coordinates == "RAS" else "RAS"
        raise LabelError(
            f"{outside.total()} points lie outside their scans (keys "
            f"{', '.join(sorted(outside)[:3])}). Points are read as {coordinates} mm; perhaps they "
            f"are {other} (coordinates: {other}), voxel numbers, or of another scan."
        )
