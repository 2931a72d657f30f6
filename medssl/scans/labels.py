"""Labels of scans from tables (a row a scan, series or patient) and from folders named by class.

Tables name scans by what their owner knows them by (file name, PatientID, SeriesInstanceUID). Those
names are matched here and go no further: what comes out is named by scan key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from medssl.errors import ConfigError, LabelError
from medssl.scans.index import Index
from medssl.scans.label_report import LabelReport, complete
from medssl.scans.patients import read_table
from medssl.scans.scan_names import MEANING, By, ScanNames

__all__ = ["By", "LabelRows", "LabelTable", "read_class_folders", "read_label_columns",
           "read_label_table"]  # fmt: skip


class LabelTable(dict[str, str | float]):
    """Label by scan key.

    Attributes:
        report: what did not fit.
    """

    report: LabelReport

    @property
    def num_unmatched_rows(self) -> int:
        """Rows of the table that fit no accepted scan."""
        return self.report.counts.get("rows_without_scan", 0)

    @property
    def num_unlabelled_scans(self) -> int:
        """Accepted scans without a label."""
        return self.report.counts.get("scans_without_label", 0)


class LabelRows(dict[str, tuple[str | None, ...]]):
    """The cells of a row by scan key, one for each column asked for; None where empty.

    Attributes:
        report: what did not fit.
    """

    report: LabelReport


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
    rows = read_label_columns(
        index, path, by=by, id_column=id_column, label_columns=(label_column,)
    )
    values = _as_numbers([str(cells[0]) for cells in rows.values()])
    labels = LabelTable(zip(rows, values, strict=True))
    labels.report = rows.report
    return labels


def read_label_columns(
    index: Index, path: Path, *, by: By, id_column: str, label_columns: Sequence[str]
) -> LabelRows:
    """Read several labels a scan from a CSV or Parquet table.

    Rows whose cells are all empty are no label. See `read_label_table`.
    """
    table = read_table(path, "label", (id_column, *label_columns))
    table = table[[id_column, *label_columns]]
    names = ScanNames(index, by)
    rows = LabelRows()
    rows.report = report = LabelReport(num_given=len(table))
    named = table[table[id_column].notna()]
    report.note("rows_without_scan", len(table) - len(named))
    filled = named[named[list(label_columns)].notna().any(axis=1)]
    report.note("rows_without_value", len(named) - len(filled))
    doubled: list[str] = []
    columns = [filled[column].tolist() for column in label_columns]
    for name, *cells in zip(filled[id_column].astype(str).str.strip(), *columns, strict=True):
        keys = names.find(name)
        if not keys:
            report.note("rows_without_scan")
        values = tuple(None if pd.isna(cell) else str(cell).strip() for cell in cells)
        for key in keys:
            if key in rows:
                doubled.append(key)
            if _meaning(rows.setdefault(key, values)) != _meaning(values):
                differing = _first_difference(label_columns, rows[key], values)
                raise LabelError(
                    f"scan {key} gets two different labels from column {differing!r}. "
                    f"Keep one row for each {by}."
                )
    report.note_keys("double_rows", doubled)
    if not rows:
        raise LabelError(
            f"none of the {len(filled)} rows of the label table fits one of the "
            f"{len(index.accepted)} accepted scans. Column {id_column!r} is read as {MEANING[by]}. "
            "Check the column, and `by` (scan, series or patient)."
        )
    complete(report, index, {key: _meaning(cells) for key, cells in rows.items()})
    return rows


def read_class_folders(index: Index, folder: Path) -> LabelTable:
    """Read the class of each scan from the folder that its files lie in: ``folder/class/...``.

    Either the indexed scans themselves lie below the folder, or files of the same names do.

    Raises:
        ConfigError: there is no such folder.
        LabelError: no file fits a scan, or a scan lies in two of the folders.
    """
    if not folder.is_dir():
        raise ConfigError("there is no folder of classes at the path given. Check its spelling.")
    root = folder.resolve()
    labels = LabelTable()
    labels.report = report = LabelReport()
    for key in index.accepted["scan_key"]:
        place = index.files(key)[0].resolve()
        if place.is_relative_to(root) and len(parts := place.relative_to(root).parts) > 1:
            labels[key] = parts[0]
    report.num_given = len(labels)
    if not labels:
        _from_copies(labels, index, root)
    if not labels:
        raise LabelError(
            f"none of the {report.num_given} files in the folders of classes is or fits one of "
            f"the {len(index.accepted)} accepted scans. Each class is a folder directly below "
            "the one given, and holds scans, or files with the names of scans."
        )
    complete(report, index, labels)
    return labels


def _from_copies(labels: LabelTable, index: Index, root: Path) -> None:
    """Label scans by files of the same names that lie sorted by class."""
    names = ScanNames(index, "scan")
    doubled = []
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        parts = path.relative_to(root).parts
        if len(parts) < 2:
            continue
        labels.report.num_given += 1
        keys = names.find(path.name)
        labels.report.note("files_without_scan", int(not keys))
        for key in keys:
            if key in labels:
                doubled.append(key)
            if labels.setdefault(key, parts[0]) != parts[0]:
                raise LabelError(
                    f"scan {key} lies in the folders of two classes. Keep it in one of them."
                )
    labels.report.note_keys("double_rows", doubled)


def _as_numbers(texts: Sequence[str]) -> Iterable[str | float]:
    try:
        return [float(text) for text in texts]
    except ValueError:
        return texts


def _meaning(cells: tuple[str | None, ...]) -> tuple[str | float | None, ...]:
    """Return cells as they are compared: 1 and 1.0 are the same."""
    return tuple(None if cell is None else next(iter(_as_numbers([cell]))) for cell in cells)


def _first_difference(
    columns: Sequence[str], ours: tuple[str | None, ...], theirs: tuple[str | None, ...]
) -> str:
    pairs = zip(columns, _meaning(ours), _meaning(theirs), strict=True)
    return next(column for column, one, other in pairs if one != other)
