"""What only this package may know of an index: where rejected files lie, and why one was."""

from __future__ import annotations

import csv
import secrets
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medssl.atomic import atomic_write
from medssl.errors import DataError, RejectedScan
from medssl.executors.base import Guard, Loss
from medssl.executors.local import Config as LocalConfig
from medssl.executors.local import LocalExecutor, available_cores
from medssl.scans.building import IndexConfig, build_index
from medssl.scans.flags import meaning_of_flag
from medssl.scans.formats import FORMATS
from medssl.scans.formats.base import REASONS, Header, ScanFormat, load_formats
from medssl.scans.header_words import words_of
from medssl.scans.identity import Salt
from medssl.scans.index import INDEX_NAME, Index
from medssl.scans.ledger_reading import rejected_files, scan_files
from medssl.scans.patients import stem_of

REJECTED_NAME = "rejected.csv"
MAX_EXPLAINED = 50
"""Rows of a folder that are looked at closely; the counts cover all."""

_GUARD = Guard(seconds=300, megabytes=8192)
_MAX_WORKERS = 4  # each may hold a whole scan
_SALT_BYTES = 32
_MAX_HEADERS = 3000  # of one series; more would say nothing new


@dataclass(frozen=True)
class Explanation:
    """Why one row of an index is what it is; no identifiers, no paths.

    Attributes:
        scan_key: "" where the index was made for the occasion: its keys mean nothing later.
        meaning: of the reason, with its remedy.
        detail: what exactly was found, where the format says so.
        num_series_rows: into how many rows the series of this scan was split.
        flags: with their meanings.
        header: what the files say of themselves, in words.
    """

    scan_key: str
    status: str
    format: str
    modality: str
    num_files: int
    num_series_rows: int
    reason: str = ""
    meaning: str = ""
    detail: str = ""
    dims: str = ""
    shape: tuple[int, ...] = ()
    num_channels: int = 1
    spacing_mm: tuple[float, ...] = ()
    orientation: str = ""
    intensity: str = ""
    flags: dict[str, str] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """What became of a file or folder.

    Attributes:
        num_files: that were found.
        counts: rows by reason; "" counts the accepted ones.
        explained: the rows, accepted ones first; at most `MAX_EXPLAINED`.
    """

    num_files: int
    counts: dict[str, int]
    explained: list[Explanation]


@dataclass(frozen=True)
class _Job:
    row: Mapping[str, Any]
    places: tuple[Path, ...]
    reading: Mapping[str, Any]


def inspect_path(path: Path) -> Inspection:
    """Explain one file, or a folder, by indexing it on its own into a folder that is then removed.

    Raises:
        DataError: there is nothing at the path, or the folder holds no file.
    """
    if not path.exists():
        raise DataError(
            "there is no file or folder at the path given. Check its spelling; to look up the key "
            "of a scan, name its index with --index."
        )
    with tempfile.TemporaryDirectory(prefix="medssl-inspect-") as made:
        folder, beside = path, frozenset[Path]()
        if not path.is_dir():
            folder = Path(made, "file")
            beside = link_alone(path, folder)
        index = _index_alone(folder, Path(made, "index"))
        rows = index.table.sort_values(["status", "reason", "scan_key"])
        if beside:
            # What was read with the file is not what was asked for.
            asked = [key for key in rows["scan_key"] if not beside >= set(index.files(key))]
            rows = rows[rows["scan_key"].isin(asked)]
        closely = rows.head(MAX_EXPLAINED).to_dict("records")
        explained = [replace(item, scan_key="") for item in _explain(index, closely)]
        num_files = index.summary["num_files"] - len(beside)
    counts = Counter(str(reason) for reason in rows["reason"])
    return Inspection(num_files, dict(counts), explained)


def inspect_scan(index: Index, scan_key: str) -> Inspection:
    """Explain one row of an index, accepted or rejected.

    Raises:
        DataError: the index has no such row, or no private part.
    """
    rows = index.table[index.table["scan_key"] == scan_key]
    if rows.empty:
        raise DataError(
            f"there is no row {scan_key} in this index, accepted or rejected. Keys are the 16 "
            "digits in the first column of audit.csv."
        )
    explained = _explain(index, rows.to_dict("records"))
    counts = Counter(str(reason) for reason in rows["reason"])
    return Inspection(explained[0].num_files, dict(counts), explained)


def write_rejected(index: Index) -> Path:
    """List every rejected file with its path in ``private/rejected.csv``, mode 0600.

    The paths may name patients: the file is for whoever exported the scans, and stays where they
    are.

    Raises:
        DataError: the private part of the index is absent.
        MachineError: the folder cannot be written.
    """
    private = index.folder / "private"

    def write(part: Path) -> None:
        # Names that are not UTF-8 keep their own bytes.
        with part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["reason", "remedy", "scan_key", "path"])
            for path, key, reason in rejected_files(private):
                # "./", so that no name can be taken for a formula by a spreadsheet.
                writer.writerow([reason, REASONS.get(reason, ""), key, f"./{path}"])

    if not private.is_dir():
        raise DataError(
            "this index has no private part, so it does not know where its files are. Audit it on "
            "the machine where it was built, or build it again: medssl index."
        )
    atomic_write(private / REJECTED_NAME, write, mode=0o600)
    return private / REJECTED_NAME


def link_alone(path: Path, folder: Path) -> frozenset[Path]:
    """Put a link to a file into a folder of its own, and links to what is read with it.

    Returns:
        The latter.
    """
    folder.mkdir()
    (folder / path.name).symlink_to(path.resolve())
    beside = set()
    for ending in {ending for item in load_formats() for ending in item.read_together}:
        other = path.with_name(stem_of(path.name) + ending)
        if other.is_file() and other.name != path.name:
            (folder / other.name).symlink_to(other.resolve())
            beside.add(folder.resolve() / other.name)
    return frozenset(beside)


def _index_alone(folder: Path, out: Path) -> Index:
    """Index a folder with a salt that nobody keeps."""
    try:
        return build_index(IndexConfig(folder=folder), out)
    except DataError:
        if not (out / INDEX_NAME).is_file():
            raise
        return Index.open(out)  # no scan was accepted: just that is to be explained


def _explain(index: Index, rows: Sequence[Mapping[Any, Any]]) -> list[Explanation]:
    """Look at rows closely, in guarded workers."""
    jobs = []
    for row in rows:
        files = scan_files(index.folder / "private", row["scan_key"])
        if files is None:
            raise DataError("the index and its private part differ. Build it again: medssl index.")
        jobs.append(_Job(row, files.places, files.reading))
    sizes = index.table["series_key"].value_counts()
    executor = LocalExecutor(LocalConfig(num_workers=min(_MAX_WORKERS, available_cores())))
    looks = executor.map(_look, jobs, lost=_lost, guard=_GUARD)
    return [
        _explanation(job.row, int(sizes.get(job.row["series_key"], 1)), *look)
        for job, look in zip(jobs, looks, strict=True)
    ]


def _explanation(
    row: Mapping[Any, Any], num_series_rows: int, header: dict[str, str], detail: str
) -> Explanation:
    reason = row["reason"]
    return Explanation(
        scan_key=row["scan_key"],
        status=row["status"],
        format=row["format"],
        modality=row["modality"],
        num_files=int(row["num_files"]),
        num_series_rows=num_series_rows if row["series_key"] else 1,
        reason=reason,
        meaning=REASONS.get(reason, ""),
        detail=detail,
        dims=row["dims"],
        shape=tuple(map(int, row["shape"])),
        num_channels=int(row["num_channels"]),
        spacing_mm=tuple(map(float, row["spacing_mm"])),
        orientation=row["orientation"],
        intensity=row["intensity"],
        flags={flag: meaning_of_flag(flag) for flag in row["flags"]},
        header=header,
    )


def _look(job: _Job) -> tuple[dict[str, str], str]:
    """Return what the files say of themselves, and what exactly their format found wrong."""
    if not job.row["format"]:
        return {}, ""
    form, reason = FORMATS.load(job.row["format"])(), str(job.row["reason"])
    salt = Salt(secrets.token_bytes(_SALT_BYTES))
    outcomes = [_read(form, place, salt) for place in job.places[:_MAX_HEADERS]]
    headers = [outcome for outcome in outcomes if isinstance(outcome, Header)]
    errors = [outcome for outcome in outcomes if isinstance(outcome, RejectedScan)]
    if reason and not any(_detail(error, reason) for error in errors):
        # Grouping keeps only the reason for which a stack was refused; reading refuses it again.
        errors += _refusals(form, job)
    found = (_detail(error, reason) for error in errors)
    return words_of(headers), next(filter(None, found), "")


def _read(form: ScanFormat, place: Path, salt: Salt) -> Header | RejectedScan | None:
    """Read one header; a file that breaks its reader says nothing of itself."""
    try:
        return form.read_header(place, place.name, salt)
    except RejectedScan as error:
        return error
    except Exception:  # noqa: BLE001  (a damaged file can fail in any way)
        return None


def _refusals(form: ScanFormat, job: _Job) -> list[RejectedScan]:
    try:
        form.read_voxels(job.places, job.reading)
    except RejectedScan as error:
        return [error]
    except Exception:  # noqa: BLE001  (what was not accepted may break a reader in any way)
        return []
    return []


def _detail(error: RejectedScan, reason: str) -> str:
    """Return the text of a rejection that is the one of the index, and says more than its code."""
    text = str(error)
    return text if error.reason == reason and text != reason else ""


def _lost(job: _Job, loss: Loss) -> tuple[dict[str, str], str]:
    del job, loss  # the row's own reason says what became of it
    return {}, ""
