"""Walk a folder and parse the header of every file, remembering what was parsed before."""

from __future__ import annotations

import functools
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from medssl.atomic import atomic_write
from medssl.errors import RejectedScan
from medssl.executors.base import Executor
from medssl.scans.formats.base import Header, ScanFormat, load_formats
from medssl.scans.identity import Salt

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how much is done, and of how much."""

HEAD_BYTES = 512
HEADER_VERSION = 1  # raise it when headers are read differently: everything is then parsed again
_SAVE_SECONDS = 30.0

LOCATIONS_SCHEMA = pa.schema(
    [
        ("path", pa.binary()),  # relative to the root, in the file system's own bytes
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("header", pa.string()),
        ("scan_key", pa.string()),
        ("position", pa.int32()),
        ("root", pa.binary()),
        ("version", pa.int32()),
    ]
)


@dataclass(frozen=True)
class FoundFile:
    """One file below the indexed folder; ``path`` is relative to it."""

    path: str
    size: int
    mtime_ns: int
    reason: str = ""  # known without opening it: excluded, or no regular file


@dataclass(frozen=True)
class ParsedFile:
    """A file with its header."""

    file: FoundFile
    header: Header


def find_files(root: Path, leave_out: Path | None, exclude: Sequence[str]) -> list[FoundFile]:
    """List all files below a folder, sorted, following links to folders once.

    Args:
        root: the folder.
        leave_out: a folder that is not entered: the index itself, where it lies inside.
        exclude: patterns such as ``labels/*`` on relative paths; what matches is not opened.
    """
    skip = leave_out.resolve() if leave_out else None
    found: list[FoundFile] = []
    seen: set[tuple[int, int]] = set()

    def closed(error: OSError) -> None:
        """Give a folder that cannot be entered a row, lest its files be missed silently."""
        relative = Path(os.fsdecode(error.filename)).relative_to(root).as_posix()
        found.append(FoundFile(relative, 0, 0, "unreadable"))

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=closed):
        here = Path(folder)
        status = here.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in seen or here.resolve() == skip:
            subfolders.clear()
            continue
        seen.add(identity)
        subfolders.sort()
        for name in names:
            relative = (here / name).relative_to(root).as_posix()
            found.append(_look(here / name, relative, exclude))
    return sorted(found, key=lambda file: file.path)


def _look(path: Path, relative: str, exclude: Sequence[str]) -> FoundFile:
    try:
        status = path.stat()
    except OSError:  # a link to nowhere
        return FoundFile(relative, 0, 0, "unreadable")
    reason = "" if stat.S_ISREG(status.st_mode) else "not_a_scan"  # a pipe would block the reader
    if any(fnmatch(relative, pattern) for pattern in exclude):
        reason = "excluded"
    return FoundFile(relative, status.st_size, status.st_mtime_ns, reason)


def parse_files(
    root: Path,
    files: Sequence[FoundFile],
    salt: Salt,
    private: Path,
    executor: Callable[[int], Executor],
    progress: Progress | None = None,
) -> list[ParsedFile]:
    """Return the header of every file, parsing only those that are new or have changed.

    What is parsed is saved from time to time, so that an interrupted run goes on where it was.
    """
    known = remembered(root, private)
    todo = [file for file in files if not file.reason and file not in known]
    parsed = {file: known[file] for file in files if file in known}
    parsed.update({file: Header(file.path, "", file.reason) for file in files if file.reason})
    function = functools.partial(parse_file, root, salt)
    saved_at = time.monotonic()
    results = executor(len(todo)).map(function, [file.path for file in todo], lost=_lost)
    for done, (file, header) in enumerate(zip(todo, results, strict=True), start=1):
        parsed[file] = header
        if progress:
            progress("reading headers", done, len(todo))
        if time.monotonic() - saved_at > _SAVE_SECONDS:
            _save(private / "progress.parquet", root, list(parsed.items()))
            saved_at = time.monotonic()
    return [ParsedFile(file, parsed[file]) for file in files]


def parse_file(root: Path, salt: Salt, relative: str) -> Header:
    """Read one header; whatever is wrong with the file becomes a reason code."""
    path = root / relative
    name = ""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        claiming = next((item for item in _formats() if item.claims(path, head)), None)
        if claiming is None:
            return Header(relative, "", "not_a_scan")
        name = claiming.name
        return claiming.read_header(path, relative, salt)
    except RejectedScan as error:
        return Header(relative, name, error.reason)
    except Exception:  # noqa: BLE001  (one broken file must not end the run)
        return Header(relative, name, "unreadable")


@functools.cache
def _formats() -> list[ScanFormat]:
    return load_formats()


def _lost(relative: str) -> Header:
    """Return the header of a file that took its worker process down."""
    return Header(relative, "", "unreadable")


def remembered(root: Path, private: Path) -> dict[FoundFile, Header]:
    """Return the headers parsed by earlier runs on the same folder, finished or not."""
    known: dict[FoundFile, Header] = {}
    for name in ("locations.parquet", "progress.parquet"):
        for row in _rows(private / name):
            if row["version"] != HEADER_VERSION or row["root"] != os.fsencode(root.resolve()):
                continue
            file = FoundFile(os.fsdecode(row["path"]), row["size"], row["mtime_ns"])
            known[file] = Header(**{**json.loads(row["header"]), "path": file.path})
    return known


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        table = pq.read_table(path, schema=LOCATIONS_SCHEMA)
    except (FileNotFoundError, pa.ArrowInvalid, pa.ArrowTypeError, OSError):
        return  # nothing remembered, or not readable: everything is parsed again
    yield from table.to_pylist()


def save_locations(
    private: Path, root: Path, parsed: Sequence[ParsedFile], places: dict[str, tuple[str, int]]
) -> None:
    """Write which file belongs to which scan, and what was parsed; mode 0600.

    Args:
        places: scan key and position in its scan, by relative path.
    """
    items = [(item.file, item.header) for item in parsed]
    _save(private / "locations.parquet", root, items, places)
    (private / "progress.parquet").unlink(missing_ok=True)


def _save(
    path: Path,
    root: Path,
    items: Sequence[tuple[FoundFile, Header]],
    places: dict[str, tuple[str, int]] | None = None,
) -> None:
    where = os.fsencode(root.resolve())
    rows = []
    for file, header in items:
        scan_key, position = (places or {}).get(file.path, ("", 0))
        rows.append(
            {
                "path": os.fsencode(file.path),
                "size": file.size,
                "mtime_ns": file.mtime_ns,
                # Known without opening: not remembered, for the config may change.
                "header": json.dumps({**asdict(header), "path": ""}),
                "scan_key": scan_key,
                "position": position,
                "root": where,
                "version": 0 if file.reason else HEADER_VERSION,
            }
        )
    table = pa.Table.from_pylist(rows, schema=LOCATIONS_SCHEMA)
    atomic_write(path, lambda part: pq.write_table(table, part), mode=0o600)


def read_locations(private: Path) -> pd.DataFrame:
    """Return the columns that say where each scan's files are."""
    columns = ["path", "size", "scan_key", "position", "root"]
    table: pd.DataFrame = pq.read_table(private / "locations.parquet", columns=columns).to_pandas()
    return table
