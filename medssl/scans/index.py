"""The index: a table of all scans below a folder, accepted or rejected with a reason.

``index.parquet`` and ``summary.json`` hold keys only and may be shared. ``private/`` (mode 0700)
holds the salt and the places of the files; nothing outside `medssl.scans` reads it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from medssl.atomic import atomic_write
from medssl.config import Config
from medssl.errors import DataError, MachineError, RejectedScan
from medssl.executors.base import Executor
from medssl.executors.local import Config as LocalConfig
from medssl.executors.local import LocalExecutor, auto_workers
from medssl.scans.files import (
    FoundFile,
    Progress,
    find_files,
    parse_files,
    read_locations,
    remembered,
    save_locations,
)
from medssl.scans.formats import FORMATS
from medssl.scans.formats.base import REASONS, Volume
from medssl.scans.identity import Salt, private_folder
from medssl.scans.patients import PatientFinder, PatientsConfig
from medssl.scans.rows import INDEX_SCHEMA, make_rows, summarize

_WORTH_WORKERS = 400  # files; below it starting processes takes longer than the work
_AFFINE_TOLERANCE_MM = 1e-4


class IndexConfig(Config):
    """What to index.

    Attributes:
        folder: searched with all its subfolders.
        patients: how to tell patients apart where files do not name them (NIfTI); it overrules
            PatientID for DICOM files that it covers.
        exclude: patterns on paths below the folder, for example ``labels/*``.
        num_workers: processes that parse headers; absent: as many as pay off; 0: this one.
    """

    folder: Path
    patients: PatientsConfig | None = None
    exclude: tuple[str, ...] = ()
    num_workers: int | None = Field(default=None, ge=0)


@dataclass(frozen=True)
class IndexPlan:
    """What an index run would do."""

    num_files: int
    num_bytes: int
    num_excluded: int
    num_to_parse: int


class Index:
    """An index on disk.

    Attributes:
        folder: where it lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def __reduce__(self) -> tuple[type[Index], tuple[Path]]:
        return Index, (self.folder,)

    @classmethod
    def open(cls, folder: Path | str) -> Index:
        """Open what `build_index` wrote.

        Raises:
            DataError: there is no index, or it is damaged.
        """
        index = cls(Path(folder))
        index.table  # noqa: B018  (read now, so that a damaged file is reported here)
        return index

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """All rows, sorted by scan key, with the columns of `INDEX_SCHEMA`."""
        path = self.folder / "index.parquet"
        if not path.is_file():
            raise DataError(
                "there is no index in the folder given (index.parquet is missing). "
                "Build one first: medssl index."
            )
        try:
            table = pq.read_table(path, schema=INDEX_SCHEMA)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OSError):
            raise DataError(
                "index.parquet is damaged or not an index. Build it again: medssl index."
            ) from None
        frame: pd.DataFrame = table.to_pandas()
        return frame

    @functools.cached_property
    def accepted(self) -> pd.DataFrame:
        """The rows of usable scans, numbered from 0."""
        return self.table[self.table["status"] == "accepted"].reset_index(drop=True)

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """Counts by format, modality and reason; see `summary.json`."""
        return summarize(_records(self.table))

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over keys and contents of all accepted scans."""
        columns = ("scan_key", "patient_key", "digest")
        rows = sorted(zip(*(self.accepted[column] for column in columns), strict=True))
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @functools.cached_property
    def salt(self) -> Salt:
        """The salt of the keys. For `medssl.scans` only."""
        path = self.folder / "private" / "salt"
        if not path.exists():
            raise self._without_private()
        return Salt.load_or_create(path)

    def patients(self) -> dict[str, list[str]]:
        """Return the accepted scan keys of every patient key, both sorted."""
        groups = self.accepted.groupby("patient_key")["scan_key"]
        return {str(patient): sorted(keys) for patient, keys in groups}

    def row(self, scan_key: str) -> Mapping[str, Any]:
        """Return the row of one accepted scan.

        Raises:
            DataError: there is no accepted scan of this key.
        """
        number = self._numbers.get(scan_key)
        if number is None:
            raise DataError(f"there is no accepted scan {scan_key} in this index.")
        return _records(self.accepted.iloc[number : number + 1])[0]

    def files(self, scan_key: str) -> list[Path]:
        """Return the files of a scan, in the order in which they are stacked. Private.

        Raises:
            DataError: there is no such scan, or the private part of the index is absent.
        """
        if scan_key not in self.paths:
            raise DataError(f"there is no scan {scan_key} in this index.")
        return [self.root / path for path, _ in self.paths[scan_key]]

    def read_volume(self, scan_key: str) -> Volume:
        """Read the voxels of one accepted scan, and check that they are what was indexed.

        Raises:
            DataError: its files are gone, damaged, or differ from what was indexed.
        """
        row = self.row(scan_key)
        paths = self.files(scan_key)
        changed = f"scan {scan_key}: its files changed after they were indexed. Run medssl index."
        try:
            sizes = [path.stat().st_size for path in paths]
            if sizes != [size for _, size in self.paths[scan_key]]:
                raise DataError(changed)
            volume = FORMATS.load(row["format"])().read_voxels(paths, {})
        except RejectedScan as error:
            raise DataError(
                f"scan {scan_key} cannot be read ({error.reason}). {REASONS.get(error.reason, '')}"
            ) from None
        except FileNotFoundError:
            raise DataError(
                f"scan {scan_key}: its files are not where they were indexed. If the folder was "
                "moved, run medssl index on its new place: the keys stay the same."
            ) from None
        except OSError:
            raise DataError(
                f"scan {scan_key}: its files cannot be opened. Check their permissions."
            ) from None
        expected = np.asarray(row["affine"]).reshape(4, 4)
        if volume.voxels_CXYZ.shape[1:] != tuple(row["shape"]) or not np.allclose(
            volume.affine, expected, atol=_AFFINE_TOLERANCE_MM
        ):
            raise DataError(changed)
        return volume

    @functools.cached_property
    def paths(self) -> dict[str, list[tuple[str, int]]]:
        """Relative path and size of the files of every scan key, in order. Private."""
        frame = self._locations.sort_values(["scan_key", "position", "path"])
        found: dict[str, list[tuple[str, int]]] = {}
        for key, path, size in zip(frame["scan_key"], frame["path"], frame["size"], strict=True):
            found.setdefault(key, []).append((os.fsdecode(path), int(size)))
        return found

    @functools.cached_property
    def root(self) -> Path:
        """The folder that was indexed. Private."""
        return Path(os.fsdecode(self._locations["root"].iloc[0]))

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {key: number for number, key in enumerate(self.accepted["scan_key"])}

    @functools.cached_property
    def _locations(self) -> pd.DataFrame:
        try:
            return read_locations(self.folder / "private")
        except FileNotFoundError:
            raise self._without_private() from None

    def _without_private(self) -> DataError:
        return DataError(
            "this index has no private part, so it does not know where its scans are. "
            "Use it on the machine where it was built, or build it again: medssl index."
        )


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def plan_index(config: IndexConfig, out: Path | None = None) -> IndexPlan:
    """Say what `build_index` would do, and touch nothing.

    Raises:
        DataError: the folder is missing or empty.
    """
    files = _found(config, out)
    known = remembered(config.folder, out / "private") if out else {}
    return IndexPlan(
        num_files=len(files),
        num_bytes=sum(file.size for file in files),
        num_excluded=sum(file.reason == "excluded" for file in files),
        num_to_parse=sum(not file.reason and file not in known for file in files),
    )


def build_index(config: IndexConfig, out: Path, progress: Progress | None = None) -> Index:
    """Index a folder, or bring an index up to date: only new and changed files are parsed.

    Args:
        config: what to index.
        out: folder of the index; its salt, when there is one, is kept.
        progress: told about files as they are parsed.

    Raises:
        DataError: the folder is missing or empty, nothing in it is a usable scan, or scans are
            left without a patient.
        MachineError: the disk is full, ``out`` cannot be written, or its salt is exposed.
    """
    files = _found(config, out)
    private = out / "private"
    if out.exists() and not out.is_dir():
        raise MachineError(
            f"{out.name!r} is a file; the index needs a folder. Choose another --out."
        )
    salt = Salt.load_or_create(private_folder(private) / "salt")
    patients = PatientFinder(config.patients, salt)

    def executor(num_files: int) -> Executor:
        workers = config.num_workers
        if workers is None:
            workers = auto_workers(num_files, _WORTH_WORKERS)
        return LocalExecutor(LocalConfig(num_workers=workers))

    parsed = parse_files(config.folder, files, salt, private, executor, progress)
    made = make_rows([item.header for item in parsed], salt, patients)
    save_locations(private, config.folder, parsed, made.places)
    table = pa.Table.from_pylist(made.rows, schema=INDEX_SCHEMA)
    atomic_write(out / "index.parquet", lambda part: pq.write_table(table, part))
    summary = summarize(made.rows)
    atomic_write(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    if not summary["num_scans"]:
        raise DataError(_nothing_accepted(summary))
    return Index.open(out)


def _found(config: IndexConfig, out: Path | None) -> list[FoundFile]:
    if not config.folder.is_dir():
        raise DataError("there is no folder at the path given as `folder`. Check its spelling.")
    files = find_files(config.folder, out, config.exclude)
    if not files:
        raise DataError(
            "the folder to index is empty: no file in it or below it. "
            "Give one that holds DICOM or NIfTI files."
        )
    return files


def _nothing_accepted(summary: Mapping[str, Any]) -> str:
    lines = [
        f"  {entry['files']} files: {reason}. {entry['remedy']}"
        for reason, entry in summary["rejected"].items()
    ]
    reasons = "\n".join(lines)
    return f"none of the {summary['num_files']} files is a usable scan:\n{reasons}"
