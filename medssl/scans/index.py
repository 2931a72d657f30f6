"""The index: a table of all scans below a folder, accepted or rejected with a reason.

``index.parquet`` and ``summary.json`` hold keys only and may be shared. ``private/`` (mode 0700)
holds the salt and the places of the files; nothing outside `medssl.scans` reads it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from medssl.errors import DataError, RejectedScan
from medssl.scans.formats import FORMATS
from medssl.scans.formats.base import REASONS, Volume
from medssl.scans.identity import Salt
from medssl.scans.ledger_reading import ScanFiles, names_of_scans, scan_files
from medssl.scans.rows import INDEX_SCHEMA
from medssl.scans.selection import SelectionConfig

INDEX_NAME = "index.parquet"
SUMMARY_NAME = "summary.json"
_AFFINE_TOLERANCE_MM = 1e-4


class Index:
    """An index on disk.

    Attributes:
        folder: where it lies.
        selection: what `accepted` and all that builds on it are narrowed to; None: all scans.
    """

    def __init__(self, folder: Path, selection: SelectionConfig | None = None) -> None:
        self.folder = Path(folder)
        self.selection = selection

    def __reduce__(self) -> tuple[type[Index], tuple[Path, SelectionConfig | None]]:
        return Index, (self.folder, self.selection)

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
        path = self.folder / INDEX_NAME
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
        """The rows of usable scans that are selected, numbered from 0."""
        found = self.table[self.table["status"] == "accepted"]
        if self.selection is not None:
            found = found[self.selection.keep(found)]
        return found.reset_index(drop=True)

    def select(self, selection: SelectionConfig) -> Index:
        """Return the same index, narrowed to some of its scans.

        Raises:
            DataError: none is left.
        """
        narrowed = Index(self.folder, selection)
        if len(self.accepted) and not len(narrowed.accepted):
            columns = (self.accepted[name] for name in ("modality", "dims", "num_channels"))
            kinds = Counter(zip(*columns, strict=True))
            found = ", ".join(
                f"{count} {modality or 'scans'} {dims} of {channels} channels"
                for (modality, dims, channels), count in sorted(kinds.items())
            )
            raise DataError(
                f"`select` leaves none of {len(self.accepted)} scans. The index holds: {found}. "
                "Widen select.dims, select.num_channels, select.modalities or select.without_flags."
            )
        return narrowed

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """Counts by format, modality, flag and reason.

        Raises:
            DataError: ``summary.json`` is missing or damaged.
        """
        try:
            found: dict[str, Any] = json.loads((self.folder / SUMMARY_NAME).read_text())
        except (OSError, ValueError):
            raise DataError(
                "summary.json of the index is missing or damaged. Build it again: medssl index."
            ) from None
        return found

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
        return list(self._files(scan_key).places)

    def _files(self, scan_key: str) -> ScanFiles:
        try:
            found = scan_files(self.folder / "private", scan_key)
        except FileNotFoundError:
            raise self._without_private() from None
        if found is None:
            raise DataError(f"there is no scan {scan_key} in this index.")
        return found

    def file_names(self) -> Iterator[tuple[str, str, int]]:
        """Yield key, first relative path and number of files of every selected scan. Private.

        Raises:
            DataError: the private part of the index is absent.
        """
        try:
            for key, path, num_files in names_of_scans(self.folder / "private"):
                if key in self._numbers:
                    yield key, path, num_files
        except FileNotFoundError:
            raise self._without_private() from None

    def read_volume(self, scan_key: str) -> Volume:
        """Read the voxels of one accepted scan, and check that they are what was indexed.

        Raises:
            DataError: its files are gone, damaged, or differ from what was indexed.
        """
        row = self.row(scan_key)
        files = self._files(scan_key)
        changed = f"scan {scan_key}: its files changed after they were indexed. Run medssl index."
        try:
            found = [path.stat() for path in files.places]
            if tuple((each.st_size, each.st_mtime_ns) for each in found) != files.marks:
                raise DataError(changed)
            volume = FORMATS.load(row["format"])().read_voxels(files.places, files.reading)
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
        shape = (row["num_channels"], *row["shape"])
        if volume.voxels_CXYZ.shape != shape or not np.allclose(
            volume.affine, expected, atol=_AFFINE_TOLERANCE_MM
        ):
            raise DataError(changed)
        return volume

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {key: number for number, key in enumerate(self.accepted["scan_key"])}

    def _without_private(self) -> DataError:
        return DataError(
            "this index has no private part, so it does not know where its scans are. "
            "Use it on the machine where it was built, or build it again: medssl index."
        )


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
