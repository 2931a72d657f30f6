"""Who a scan belongs to, where the files themselves do not say."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import pandas as pd
from pydantic import model_validator

from medssl.config import Config
from medssl.errors import ConfigError, DataError
from medssl.scans.formats.base import Group
from medssl.scans.identity import Salt

_BIDS = re.compile(r"(?:^|/)(sub-[A-Za-z0-9]+)")


class PatientsConfig(Config):
    """How patients are found: by a table, or by a pattern in the path.

    Attributes:
        table: CSV or Parquet file with one row a scan.
        scan_column: its column of file names, with or without ending.
        patient_column: its column of patients.
        pattern: regular expression with one group, searched in the path below the indexed folder;
            for BIDS ``(sub-[^_/]+)``.
    """

    table: Path | None = None
    scan_column: str = "scan"
    patient_column: str = "patient"
    pattern: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> PatientsConfig:
        if (self.table is None) == (self.pattern is None):
            raise ValueError("give either table (with scan_column, patient_column) or pattern")
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"pattern is not a regular expression: {error.msg}") from None
            if groups != 1:
                raise ValueError(f"pattern must have one group in parentheses, found {groups}")
        return self


class PatientFinder:
    """Gives every group of files its patient key."""

    def __init__(self, config: PatientsConfig | None, salt: Salt) -> None:
        self._salt = salt
        self._pattern = re.compile(config.pattern) if config and config.pattern else None
        self._table = _read_patients(config) if config and config.table else None
        self._explicit = config is not None

    def find(self, group: Group) -> tuple[str, tuple[str, ...]]:
        """Return the patient key ("" when the config should say but does not), and flags."""
        path = group.headers[0].path
        named = self._named(path, single=len(group.headers) == 1)
        if named is not None:
            return self._salt.key("patient", named), ()
        header_key = group.headers[0].patient_key
        if header_key:
            return header_key, ()
        if self._explicit:
            return "", ()
        if match := _BIDS.search(path):
            return self._salt.key("patient", match[1]), ("patient_from_path",)
        # Nothing is known: a study, or else a file, is taken for a person of its own.
        own = group.headers[0].study_key or path
        return self._salt.key("patient", f"unknown\x1f{own}"), ("patient_unknown",)

    def are_several(self, group: Group) -> bool:
        """Return whether the files of a group are of different patients."""
        single = len(group.headers) == 1
        named = {self._named(header.path, single=single) for header in group.headers}
        if named == {None}:  # the config says nothing of them: the files themselves count
            return len({header.patient_key for header in group.headers}) > 1
        return len(named) > 1

    def _named(self, path: str, *, single: bool) -> str | None:
        if self._pattern:
            match = self._pattern.search(path)
            return match[1] if match else None
        if self._table is not None:
            for name in names_of(path, single=single):
                if name in self._table:
                    return self._table[name]
        return None


def names_of(path: str, single: bool) -> list[str]:
    """Return by which names a table may call a scan: its path, file name or stem.

    A scan of several files is called by the folder they lie in.
    """
    pure = PurePosixPath(path)
    if not single:
        return [str(pure.parent), pure.parent.name]
    return [str(pure), pure.name, stem_of(pure.name)]


def stem_of(name: str) -> str:
    """Return a file name without its ending, also a double one such as ``.nii.gz``."""
    lower = name.lower()
    for ending in (".nii.gz", ".nii", ".dcm", ".dicom", ".ima"):
        if lower.endswith(ending):
            return name[: -len(ending)]
    return name


def check_all_found(missing: Iterable[str]) -> None:
    """Refuse scans for which the config names no patient.

    Args:
        missing: their keys.

    Raises:
        DataError: there are such scans; without a patient they could leak across a split.
    """
    rest = iter(missing)
    shown = list(itertools.islice(rest, 3))
    if shown:
        count = len(shown) + sum(1 for _ in rest)
        some = ", ".join(shown) + (" and more" if count > len(shown) else "")
        raise DataError(
            f"`patients` in the index config names no patient for {count} scans "
            f"(keys {some}). Without one a patient could be on two sides of a split. Complete the "
            "table or widen the pattern, or leave these files out with `exclude`."
        )


def read_table(path: Path, what: str, columns: tuple[str, ...]) -> pd.DataFrame:
    """Read a CSV or Parquet file and check that it has the columns.

    Raises:
        ConfigError: there is no such file.
        DataError: it cannot be read or lacks a column.
    """
    if not path.is_file():
        raise ConfigError(f"there is no {what} table {path.name!r} at the path given.")
    try:
        if path.suffix.lower() == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, dtype=str, encoding="utf-8-sig")
    except (ValueError, OSError, pd.errors.ParserError):
        raise DataError(f"the {what} table {path.name!r} is neither CSV nor Parquet.") from None
    for column in columns:
        if column not in table.columns:
            raise DataError(
                f"the {what} table {path.name!r} has no column {column!r}. "
                f"It has: {', '.join(map(str, table.columns))}."
            )
    return table


def _read_patients(config: PatientsConfig) -> dict[str, str]:
    if config.table is None:
        return {}
    columns = (config.scan_column, config.patient_column)
    table = read_table(config.table, "patients", columns)
    patients: dict[str, str] = {}
    pairs = table[list(columns)].dropna().astype(str)
    for scan, patient in zip(pairs[columns[0]], pairs[columns[1]], strict=True):
        name = scan.strip()
        if patients.setdefault(name, patient.strip()) != patient.strip():
            raise DataError(
                f"the patients table {config.table.name!r} gives one scan to two patients. "
                "Keep one row a scan."
            )
    return {**{stem_of(name): patient for name, patient in patients.items()}, **patients}
