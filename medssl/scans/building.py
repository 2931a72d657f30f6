"""Build an index, or bring it up to date.

Every step can be killed at any moment and goes on where it was: files and headers are in the
ledger as soon as they are known, tables are written whole.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from medssl.atomic import atomic_write, disk_errors
from medssl.config import ComponentConfig, Config, component
from medssl.errors import DataError, MachineError, RejectedScan
from medssl.executors import EXECUTORS
from medssl.executors.base import Executor, Guard, Loss
from medssl.executors.local import Config as LocalConfig
from medssl.scans.archives import Member, unpack
from medssl.scans.files import FileToParse, FoundFile, Progress, find_files, lost_file, parse_file
from medssl.scans.flags import Flag
from medssl.scans.formats.base import GroupingConfig, Header, load_formats
from medssl.scans.identity import Salt, private_folder
from medssl.scans.index import INDEX_NAME, SUMMARY_NAME, Index
from medssl.scans.ledger import Ledger
from medssl.scans.ledger_reading import Changes, changes_of
from medssl.scans.patients import PatientFinder, PatientsConfig
from medssl.scans.rows import INDEX_SCHEMA, RowMaker, summarize

_ROWS_VERSION = 1
"""Raised when the same headers would give other rows: they are then grouped again."""

_READERS = (
    "nibabel", "pydicom", "pyjpegls", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg",
    "python-gdcm",
)  # fmt: skip

_CHUNK = 16  # files sent to a worker at once
_RECORD_FILES, _RECORD_SECONDS = 500, 2.0  # what a kill may cost
_ROWS_A_WRITE = 10_000
_UNPACKED = "unpacked"


class LimitsConfig(Config):
    """What one file may cost.

    Attributes:
        seconds: for reading the header of one file, voxels included where they decide.
        megabytes: that a worker's memory may grow by meanwhile.
        archive_seconds: for unpacking one archive.
        archive_gigabytes: that the members of one archive may take together.
    """

    seconds: float = Field(300.0, gt=0)
    megabytes: int = Field(8192, gt=0)
    archive_seconds: float = Field(7200.0, gt=0)
    archive_gigabytes: float = Field(50.0, gt=0)


class IndexConfig(GroupingConfig):
    """What to index.

    Attributes:
        folder: searched with all its subfolders.
        patients: how to tell patients apart where files do not name them (NIfTI); it overrules
            PatientID for DICOM files that it covers.
        exclude: patterns on paths below the folder, for example ``labels/*``.
        quarantine: flags for which a scan is rejected, as it may show who the patient is.
        public_salt: for public data alone: keys are made with this text instead of a secret, so
            that they, and the splits drawn by them, are the same on every machine. Whoever knows
            the text can find out which key belongs to a name.
        limits: what one file may cost.
        executor: where files are read: ``local`` processes, or ``ray``.
    """

    folder: Path
    patients: PatientsConfig | None = None
    exclude: tuple[str, ...] = ()
    quarantine: tuple[Flag, ...] = ("burned_in_annotation",)
    public_salt: str | None = Field(default=None, min_length=1)
    limits: LimitsConfig = LimitsConfig()
    executor: Annotated[ComponentConfig, component(EXECUTORS)] = LocalConfig()

    def digest(self) -> str:
        """Return the digest of what decides which scans are found; not of how they are read."""
        kept = self.model_dump(mode="json", exclude={"limits", "executor"})
        if self.public_salt is None:
            del kept["public_salt"]  # an index of before there was any
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def plan_index(config: IndexConfig, out: Path | None = None) -> Changes:
    """Say what `build_index` would do, and touch nothing.

    Raises:
        DataError: the folder is missing or empty.
    """
    _check_folder(config, out)
    found = find_files(config.folder, out, config.exclude)
    return changes_of((out / "private") if out else None, config.folder, found)


def build_index(config: IndexConfig, out: Path, progress: Progress | None = None) -> Index:
    """Index a folder, or bring an index up to date: only new and changed files are parsed.

    Args:
        config: what to index.
        out: folder of the index; its salt, when there is one, is kept.
        progress: told about files as they are found and parsed.

    Raises:
        DataError: the folder is missing or empty, nothing in it is a usable scan, or scans are
            left without a patient.
        MachineError: the disk is full, ``out`` cannot be written, another process is building the
            same index, or its salt is exposed.
    """
    _check_folder(config, out)
    if out.exists() and not out.is_dir():
        raise MachineError(
            f"{out.name!r} is a file; the index needs a folder. Choose another --out."
        )
    private = private_folder(out / "private")
    with _only_process(private), closing(Ledger(private, config.folder)) as ledger:
        salt = Salt.load_or_create(private / "salt", config.public_salt)
        patients = PatientFinder(config.patients, salt)
        executor = EXECUTORS.build(config.executor)
        read_together = [ending for item in load_formats() for ending in item.read_together]
        found = _told(find_files(config.folder, out, config.exclude), progress)
        ledger.see(found, read_together, _conditions(config.limits))
        _remove_stale(ledger, private / _UNPACKED)
        _parse(ledger, salt, executor, config.limits, progress)
        if _unpack(ledger, executor, config.limits, progress):
            _parse(ledger, salt, executor, config.limits, progress)
        made_by = _fingerprint(config)
        if ledger.rows_of != made_by or not _has_tables(out):
            if progress:
                progress("grouping", 0, 0)
            RowMaker(ledger, salt, patients, config, config.quarantine).make_all()
            _write_tables(ledger, out)
            ledger.finish_scans(made_by)
    index = Index.open(out)
    if not index.summary["num_scans"]:
        raise DataError(_nothing_accepted(index.summary))
    return index


def _check_folder(config: IndexConfig, out: Path | None) -> None:
    if not config.folder.is_dir():
        raise DataError("there is no folder at the path given as `folder`. Check its spelling.")
    if next(find_files(config.folder, out, config.exclude), None) is None:
        raise DataError(
            "the folder to index is empty: no file in it or below it. "
            "Give one that holds DICOM or NIfTI files."
        )


@contextmanager
def _only_process(private: Path) -> Iterator[None]:
    """Hold an index against a second process; a record lock ends with its process, however."""
    with disk_errors(private):
        handle = os.open(private / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MachineError(
                "another medssl process is building this index. Wait until it ends, or choose "
                "another --out."
            ) from None
        yield
    finally:
        os.close(handle)


def _told(files: Iterator[FoundFile], progress: Progress | None) -> Iterator[FoundFile]:
    for number, file in enumerate(files, start=1):
        if progress and number % 1000 == 0:
            progress("finding files", number, 0)
        yield file


def _parse(
    ledger: Ledger,
    salt: Salt,
    executor: Executor,
    limits: LimitsConfig,
    progress: Progress | None,
) -> None:
    """Read the headers that are missing; what is read is recorded from time to time."""
    total = ledger.num_to_parse()
    if not total:
        return
    in_flight: deque[FileToParse] = deque()

    def feed() -> Iterator[FileToParse]:
        for file in ledger.to_parse():
            in_flight.append(file)
            yield file

    guard = Guard(limits.seconds, limits.megabytes)
    results = executor.map(
        functools.partial(parse_file, salt), feed(), lost=lost_file, guard=guard, chunk_size=_CHUNK
    )
    waiting: list[tuple[int, Header]] = []
    recorded = time.monotonic()
    try:
        for done, header in enumerate(results, start=1):
            waiting.append((in_flight.popleft().number, header))
            if len(waiting) >= _RECORD_FILES or time.monotonic() - recorded > _RECORD_SECONDS:
                ledger.record(waiting)
                waiting, recorded = [], time.monotonic()
            if progress:
                progress("reading headers", done, total)
    finally:
        ledger.record(waiting)


def _unpack(
    ledger: Ledger, executor: Executor, limits: LimitsConfig, progress: Progress | None
) -> bool:
    """Unpack the archives that were found; return whether there was one."""
    archives = ledger.archives()
    targets = ledger.private / _UNPACKED
    jobs = [(place, targets / str(number)) for number, _, place in archives]
    function = functools.partial(_unpack_one, int(limits.archive_gigabytes * 1e9))
    guard = Guard(limits.archive_seconds, limits.megabytes)
    results = executor.map(function, jobs, lost=_lost_archive, guard=guard)
    for done, ((number, path, _), found) in enumerate(zip(archives, results, strict=True), start=1):
        if isinstance(found, str):
            ledger.reject(number, found)
        else:
            rows = [
                (m.name, f"{_UNPACKED}/{number}/{m.place}", m.size, m.mtime_ns, m.reason)
                for m in found
            ]
            ledger.add_members(number, path, rows)
        if progress:
            progress("unpacking archives", done, len(archives))
    return bool(archives)


def _unpack_one(max_bytes: int, job: tuple[Path, Path]) -> list[Member] | str:
    archive, target = job
    try:
        with disk_errors(target):
            return unpack(archive, target, max_bytes)
    except RejectedScan as error:
        return error.reason
    except PermissionError:
        return "no_access"
    except FileNotFoundError:
        return "changed_while_read"


def _lost_archive(job: tuple[Path, Path], loss: Loss) -> list[Member] | str:
    del job
    return "archive_unsafe" if loss != "died" else "reader_crashed"


def _remove_stale(ledger: Ledger, folder: Path) -> None:
    """Remove what was unpacked from archives that are gone or have changed."""
    kept = ledger.unpacked_folders()
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)


def _fingerprint(config: IndexConfig) -> str:
    """Return what the rows depend on beside the headers."""
    table = config.patients.table if config.patients else None
    content = hashlib.sha256(table.read_bytes()).hexdigest() if table else ""
    return f"{_ROWS_VERSION}-{config.digest()}-{content}"


def _conditions(limits: LimitsConfig) -> str:
    """Return what decides, beside a file itself, whether it can be read."""
    versions = {name: _version(name) for name in _READERS}
    return json.dumps([limits.model_dump(), versions], sort_keys=True)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _has_tables(out: Path) -> bool:
    """Return whether the tables are there and can be read."""
    try:
        return bool(Index.open(out).summary)
    except DataError:
        return False


def _write_tables(ledger: Ledger, out: Path) -> None:
    def write(part: Path) -> None:
        with pq.ParquetWriter(part, INDEX_SCHEMA) as writer:
            batch: list[dict[str, Any]] = []
            for row in ledger.rows():
                batch.append(row)
                if len(batch) == _ROWS_A_WRITE:
                    writer.write_table(pa.Table.from_pylist(batch, schema=INDEX_SCHEMA))
                    batch = []
            writer.write_table(pa.Table.from_pylist(batch, schema=INDEX_SCHEMA))

    atomic_write(out / INDEX_NAME, write)
    summary = summarize(ledger.rows(), **ledger.count_files())
    atomic_write(out / SUMMARY_NAME, json.dumps(summary, indent=1) + "\n")


def _nothing_accepted(summary: Mapping[str, Any]) -> str:
    lines = [
        f"  {entry['files']} files: {reason}. {entry['remedy']}"
        for reason, entry in summary["rejected"].items()
    ]
    reasons = "\n".join(lines)
    return f"none of the {summary['num_files']} files is a usable scan:\n{reasons}"
