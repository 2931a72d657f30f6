"""The file that a ledger lies in: its tables, opening it to write or to read, and what can fail."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medssl.errors import MachineError
from medssl.scans.files import FoundFile

LEDGER_NAME = "ledger.sqlite"
VERSION = 6  # raise it when headers are read differently: everything is then parsed again
WAIT_SECONDS = 30.0  # for another process that is writing

TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
CREATE TABLE files (
    number INTEGER PRIMARY KEY,
    path BLOB NOT NULL UNIQUE,  -- relative to the root, in the file system's own bytes
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    known TEXT NOT NULL,        -- the reason found without opening it
    archive INTEGER,            -- number of the archive it is a member of
    place TEXT,                 -- of an unpacked member, below the private folder
    format TEXT,                -- NULL: not parsed yet
    reason TEXT,
    patient_key TEXT,
    study_key TEXT,
    series_key TEXT,
    digest TEXT,
    header TEXT                 -- JSON facts of the format
);
CREATE INDEX files_by_series ON files (format, series_key, path);
CREATE INDEX files_by_archive ON files (archive) WHERE archive IS NOT NULL;
CREATE TABLE scans (
    number INTEGER PRIMARY KEY,
    scan_key TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    reason TEXT NOT NULL,
    digest TEXT NOT NULL,
    first_path BLOB NOT NULL,
    num_files INTEGER NOT NULL,
    entry TEXT NOT NULL,        -- JSON: the row of the index
    reading TEXT NOT NULL       -- JSON: what reading the voxels needs beside the files
);
CREATE INDEX scans_by_digest ON scans (digest) WHERE status = 'accepted';
CREATE TABLE places (           -- of a scan's files, as they were when it was grouped
    scan INTEGER,
    position INTEGER,
    file INTEGER,
    path BLOB,
    place TEXT,
    size INTEGER,
    mtime_ns INTEGER,
    PRIMARY KEY (scan, position)
) WITHOUT ROWID;
"""


_SEEN = """
DROP TABLE IF EXISTS temp.seen;
CREATE TEMP TABLE seen (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, known TEXT)
    WITHOUT ROWID;
"""
_COMPARED = """
DROP TABLE IF EXISTS temp.changed;
CREATE TEMP TABLE changed AS
    SELECT f.number, f.path FROM files f LEFT JOIN temp.seen s ON s.path = f.path
    WHERE f.archive IS NULL AND (
        s.path IS NULL OR s.size != f.size OR s.mtime_ns != f.mtime_ns OR s.known != f.known);
DROP TABLE IF EXISTS temp.fresh;
CREATE TEMP TABLE fresh AS
    SELECT s.path, s.known FROM temp.seen s LEFT JOIN files f ON f.path = s.path
    WHERE f.path IS NULL;
"""


def empty_ledger() -> sqlite3.Connection:
    """Return a ledger in memory that knows nothing."""
    db = sqlite3.connect(":memory:")
    db.executescript(TABLES)
    return db


def note_seen(db: sqlite3.Connection, files: Iterable[FoundFile]) -> None:
    """Write what was found into a temporary table, and what of it has changed into another."""
    db.executescript(_SEEN)
    rows = ((os.fsencode(f.path), f.size, f.mtime_ns, f.reason) for f in files)
    db.executemany("INSERT OR IGNORE INTO temp.seen VALUES (?, ?, ?, ?)", rows)
    db.executescript(_COMPARED)


def fact_of(db: sqlite3.Connection, name: str) -> Any:
    """Return one of the facts that a ledger holds beside its tables, or None."""
    found = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return found[0] if found else None


def is_of(db: sqlite3.Connection, root: bytes) -> bool:
    """Return whether a ledger is of this version and folder; a damaged one is not."""
    try:
        return bool(fact_of(db, "version") == VERSION and fact_of(db, "root") == root)
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return False
        raise  # locked, or the disk: no reason to throw it away
    except sqlite3.DatabaseError:
        return False


def open_or_begin(path: Path, root: bytes) -> sqlite3.Connection:
    """Open a ledger to write, or begin one where there is none of this version and folder.

    Raises:
        MachineError: it is held by another process, or the disk is full or not writable.
    """
    with ledger_errors():
        if path.exists():
            db = sqlite3.connect(path, timeout=WAIT_SECONDS)
            if is_of(db, root):
                return _for_writing(db)
            db.close()
            for ending in ("", "-journal", "-wal", "-shm"):
                path.with_name(path.name + ending).unlink(missing_ok=True)
        draft = path.with_name(f".{path.name}.part")
        draft.unlink(missing_ok=True)
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        db = sqlite3.connect(draft)
        db.executescript(TABLES)
        db.execute("INSERT INTO facts VALUES ('version', ?), ('root', ?)", (VERSION, root))
        db.commit()
        db.close()
        draft.replace(path)
        return _for_writing(sqlite3.connect(path, timeout=WAIT_SECONDS))


def _for_writing(db: sqlite3.Connection) -> sqlite3.Connection:
    """Let others read what was committed last while this process writes."""
    db.execute("PRAGMA journal_mode = WAL")
    return db


@contextmanager
def open_to_read(private: Path) -> Iterator[sqlite3.Connection]:
    """Open the ledger of a private folder to read.

    Raises:
        FileNotFoundError: there is none.
        MachineError: it is damaged or cannot be opened.
    """
    path = private / LEDGER_NAME
    if not path.is_file():
        raise FileNotFoundError(LEDGER_NAME)
    with ledger_errors():
        db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=WAIT_SECONDS)
        try:
            yield db
        finally:
            db.close()


@contextmanager
def ledger_errors() -> Iterator[None]:
    """Turn the failures of the database into messages that say what to do.

    Raises:
        MachineError: the disk is full, or the ledger is damaged or held by another process.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" in str(error) or "disk I/O" in str(error):
            raise MachineError(
                "no space left on the disk while writing the ledger of the index. "
                "Free some space and start the same command again: it resumes."
            ) from None
        if "locked" in str(error):
            raise MachineError(
                "the ledger of the index is held by another process. Wait until it ends."
            ) from None
        raise MachineError(
            f"the ledger of the index cannot be used ({error.sqlite_errorname}). See that its "
            "folder `private` is there and may be written."
        ) from None
    except sqlite3.DatabaseError:
        raise MachineError(
            "the ledger of the index (private/ledger.sqlite) is damaged. Delete that file and run "
            "medssl index again: the keys stay the same."
        ) from None
