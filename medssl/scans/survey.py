"""Look at a folder nobody has indexed yet: what scans it holds, and where its labels may be.

Names of files and of table columns are matched here; what comes out are counts, shapes, and paths
that the owner of the folder has given or would give.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from medssl.errors import DataError, LabelError
from medssl.scans.building import IndexConfig, build_index
from medssl.scans.files import Progress, find_files
from medssl.scans.index import Index
from medssl.scans.masks import grid_of_mask, match_masks
from medssl.scans.patients import PatientsConfig, read_table, stem_of
from medssl.scans.scan_names import By, ScanNames

MAX_FILES = 600
"""Files that are looked at; their headers take about ten seconds."""

_MAX_FOUND = 200_000  # of larger archives only this many file names are gone through
_MAX_MASKS = 80
_ENOUGH_ROWS = 0.5  # share of rows of a table, or of scans, that must match
_MASK_FOLDER = re.compile(  # whole words: folders of patients are named Labelle or Segovia, too
    r"^(labels?|masks?|segs?|segmentations?|annotations?|ground.?truths?|gts?)"
    r"(T[rs]|Train|Test|Val|Files?|Maps?|Masks?|Class|Volumes?)?(?![a-z])",
    re.IGNORECASE,
)
_PATIENT_COLUMN = re.compile(r"^(patient|subject|participant|person|case)", re.IGNORECASE)
_LABEL_COLUMN = re.compile(r"label|class|diagnos|target|outcome|grade|finding", re.IGNORECASE)
_TABLES = ("*.csv", "*.parquet")


@dataclass(frozen=True)
class Layout:
    """Where things lie in a folder.

    Attributes:
        scans: the folder to index.
        masks: a folder of masks of these scans, by its name and its file names.
        exclude: what must not be indexed: masks that lie inside the folder of scans.
        tables: CSV and Parquet files in the folder and beside it.
    """

    scans: Path
    masks: Path | None = None
    exclude: tuple[str, ...] = ()
    tables: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Survey:
    """What a look at some files of a folder has shown.

    Attributes:
        index: of the files that were looked at; it lasts as long as the survey.
        num_files: in the folder; at least so many, where it holds very many.
        num_looked_at: of these.
    """

    index: Index
    num_files: int
    num_looked_at: int

    @property
    def is_whole(self) -> bool:
        """Whether every file was looked at."""
        return self.num_looked_at == self.num_files


@dataclass(frozen=True)
class Column:
    """A column of a table that may hold labels.

    Attributes:
        name: of the column.
        values: how many different ones it has.
        is_number: whether all are numbers.
        is_named_so: whether its name says that it holds labels.
    """

    name: str
    values: int
    is_number: bool
    is_named_so: bool


@dataclass(frozen=True)
class FittingTable:
    """A table whose rows name scans, series or patients.

    Attributes:
        path: of the table.
        by: what its rows are about.
        id_column: where their names are.
        columns: the others that may be labels, those that are called so first.
    """

    path: Path
    by: By
    id_column: str
    columns: tuple[Column, ...]


def find_layout(folder: Path) -> Layout:
    """Tell scans from masks below a folder, by the names of folders and files.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder.name!r} at the path given.")
    inside = _subfolders(folder)
    masks_inside = [path for path in inside if _MASK_FOLDER.match(path.name) and _nifti_names(path)]
    tables = _tables(folder)
    for masks in masks_inside:
        names = _nifti_names(masks)
        for other in [path for path in inside if path not in masks_inside]:
            if names & _nifti_names(other):
                return Layout(other, masks, (), (*tables, *_tables(other)))
    exclude = tuple(f"{path.name}/*" for path in masks_inside)
    own = _nifti_names(folder)
    beside = [path for path in _subfolders(folder.parent) if _MASK_FOLDER.match(path.name)]
    fitting = (masks for masks in [*masks_inside, *beside] if own & _nifti_names(masks))
    return Layout(folder, next(fitting, None), exclude, (*tables, *_tables(folder.parent)))


def keep_out(layout: Layout, labels: Path) -> Layout:
    """Return a layout that does not index a folder of masks that lies inside the scans' own."""
    if not labels.is_dir():
        return layout
    inside = layout.scans.resolve()
    masks = labels.resolve()
    if masks == inside or not masks.is_relative_to(inside):
        return layout
    pattern = f"{masks.relative_to(inside)}/*"
    return replace(layout, exclude=tuple(dict.fromkeys([*layout.exclude, pattern])))


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def _tables(folder: Path) -> list[Path]:
    return sorted(path for pattern in _TABLES for path in folder.glob(pattern))


def _nifti_names(folder: Path) -> set[str]:
    """Return the file names of NIfTI files directly in a folder, without their endings."""
    names = itertools.chain(folder.glob("*.nii"), folder.glob("*.nii.gz"))
    return {stem_of(path.name) for path in names}


@contextmanager
def surveyed(
    layout: Layout, patients: PatientsConfig | None = None, progress: Progress | None = None
) -> Iterator[Survey]:
    """Index some files of a folder, into a folder that is removed at the end of the block.

    Raises:
        DataError: none of them is a usable scan.
    """
    with tempfile.TemporaryDirectory(prefix="medssl-survey-") as made:
        found = find_files(layout.scans, None, layout.exclude)
        paths = sorted(file.path for file in itertools.islice(found, _MAX_FOUND) if not file.reason)
        folder, chosen = layout.scans, paths
        if len(paths) > MAX_FILES:
            chosen = _choose(paths)
            folder = Path(made, "files")
            for path in chosen:
                link = folder / path
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to((layout.scans / path).resolve())
        config = IndexConfig(folder=folder, patients=patients, exclude=layout.exclude)
        index = build_index(config, Path(made, "index"), progress)
        yield Survey(index, len(paths), len(chosen))


def _choose(paths: Sequence[str]) -> list[str]:
    """Choose files from all over a folder; what lies in one folder together stays together."""
    units: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        alone = path.lower().endswith((".nii", ".nii.gz"))
        units[path if alone else str(Path(path).parent)].append(path)
    names = sorted(units)
    # First, last and middle before what lies between: any beginning of this order is spread out.
    order = sorted(range(len(names)), key=lambda number: (_reversed_bits(number), number))
    chosen: list[str] = []
    for number in order:
        chosen += units[names[number]][: MAX_FILES - len(chosen)]
        if len(chosen) >= MAX_FILES:
            break
    return chosen


def _reversed_bits(number: int) -> int:
    return int(f"{number:032b}"[::-1], 2)


def find_patients(tables: Sequence[Path], scans: Path) -> PatientsConfig | None:
    """Return the table that says whose the NIfTI files of a folder are, if one does."""
    stems = {stem_of(path.name) for path in scans.rglob("*.nii*")}
    for path in tables:
        table = _read(path)
        if table is None or not stems:
            continue
        owners = [name for name in table.columns if _PATIENT_COLUMN.match(str(name))]
        for column in table.columns:
            named = {stem_of(Path(str(name)).name) for name in table[column].dropna()}
            others = [name for name in owners if name != column]
            if stems <= named and others:
                return PatientsConfig(
                    table=path, scan_column=str(column), patient_column=str(others[0])
                )
    return None


def fit_table(index: Index, path: Path) -> FittingTable | None:
    """Find out what the rows of a table are about, and which columns may be labels; None: nothing.

    Raises:
        ConfigError, DataError: there is no such table, or it is none.
    """
    table = read_table(path, "label", ())
    best: tuple[float, By, str] = (0.0, "scan", "")
    for by in ("patient", "series", "scan"):
        names = ScanNames(index, by)
        for column in table.columns:
            share = _share_named(names, table[column], len(index.accepted))
            if share > best[0]:
                best = (share, by, str(column))
    share, by, column = best
    if share < _ENOUGH_ROWS:
        return None
    return FittingTable(path, by, column, _label_columns(table, column))


def _share_named(names: ScanNames, column: pd.Series[str], num_scans: int) -> float:
    """Return the share of rows that name a scan, or of scans that are named; what is more."""
    filled = [str(value).strip() for value in column.dropna()]
    keys: set[str] = set()
    rows = 0
    for value in filled:
        try:
            found = names.find(value)
        except LabelError:  # a name of several scans names none
            continue
        rows += bool(found)
        keys.update(found)
    return max(rows / max(1, len(column)), len(keys) / max(1, num_scans))


def _label_columns(table: pd.DataFrame, id_column: str) -> tuple[Column, ...]:
    columns = []
    for name in map(str, table.columns):
        if name == id_column or name.startswith("Unnamed") or _PATIENT_COLUMN.match(name):
            continue
        values = table[name].dropna().astype(str).str.strip()
        distinct = values.nunique()
        is_number = bool(pd.to_numeric(values, errors="coerce").notna().all())
        # Texts that differ from row to row are names or remarks, numbers that do are counters.
        if distinct < 2 or distinct > (0.9 if is_number else 0.2) * len(values) + 2:
            continue
        named = bool(_LABEL_COLUMN.search(name))
        columns.append(Column(name, distinct, is_number, named))
    return tuple(sorted(columns, key=lambda column: not column.is_named_so))


def _read(path: Path) -> pd.DataFrame | None:
    try:
        return read_table(path, "patients", ())
    except DataError:
        return None


def count_mask_classes(index: Index, masks: Path) -> int:
    """Return the largest value in some masks of the indexed scans: how many classes there are.

    Raises:
        LabelError: no mask fits a scan, or one cannot be read.
    """
    matched = match_masks(index, masks)
    step = max(1, len(matched) // _MAX_MASKS)
    keys = sorted(matched)[::step][:_MAX_MASKS]
    highest = max(float(grid_of_mask(matched[key], key)[0].max()) for key in keys)
    if highest < 1:
        raise LabelError(f"{len(keys)} masks that were looked at are empty: no value above 0.")
    return int(highest)


def kinds_of(index: Index) -> Counter[tuple[str, str, int]]:
    """Count accepted scans by dims, modality and channels."""
    columns = (index.accepted[name] for name in ("dims", "modality", "num_channels"))
    return Counter((str(d), str(m), int(c)) for d, m, c in zip(*columns, strict=True))
