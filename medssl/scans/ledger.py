"""The ledger: what is known of every file of an archive, and which scans the files make.

One SQLite file in the private part of an index. It is what makes indexing incremental, safe to kill
at any moment, and constant in memory however many files there are: files and headers go in and out
of it in batches, and series by series.
"""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl.errors import MachineError
from medssl.scans.files import FileToParse, FoundFile
from medssl.scans.formats.base import Header

LEDGER_NAME = "ledger.sqlite"
VERSION = 5  # raise it when headers are read differently: everything is then parsed again
_PASSING = ("no_access", "changed_while_read")
"""Reasons that the next look may find gone, although the file is the same."""

_CONDITIONAL = (
    "archive_unsafe", "out_of_memory", "reader_crashed", "too_slow", "unreadable",
    "unsupported_transfer_syntax",
)  # fmt: skip
"""Reasons that other limits, or other versions of libraries, may lift."""

_BATCH = 2000  # rows
_WAIT_SECONDS = 30.0  # for another process that is writing

_TABLES = """
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


@dataclass(frozen=True)
class Changes:
    """How the files differ from what the ledger knew."""

    num_files: int
    num_bytes: int
    num_excluded: int
    num_to_parse: int


@dataclass(frozen=True)
class ScanFiles:
    """Where a scan's files are, in the order in which they are stacked."""

    places: tuple[Path, ...]
    marks: tuple[tuple[int, int], ...]  # size and time of change in ns
    reading: Mapping[str, Any]


class Ledger:
    """The open ledger of one index, for the one process that brings it up to date.

    Args:
        private: the private folder of the index.
        root: the indexed folder; a ledger of another root, version or that is damaged is begun
            anew.
    """

    def __init__(self, private: Path, root: Path) -> None:
        self.private = private
        self.root = root.resolve()
        path = private / LEDGER_NAME
        self._db = _open_or_begin(path, os.fsencode(self.root))

    def close(self) -> None:
        """Close the file; what was not committed is forgotten."""
        with ledger_errors():
            self._db.rollback()
            # Readers of a folder that they may not write need a ledger of one file.
            self._db.execute("PRAGMA journal_mode = DELETE")
            self._db.close()

    # --- files -----------------------------------------------------------------------------------

    def see(
        self, files: Iterable[FoundFile], read_together: Sequence[str], conditions: str
    ) -> None:
        """Take in what was found on disk: forget files that are gone or have changed, add new ones.

        Args:
            files: all files below the root.
            read_together: endings of files that are read again when one of the same stem, beside
                them, changes; in small letters.
            conditions: what decides, beside a file itself, whether it can be read (limits, versions
                of decoders). When they change, files that failed are read again.
        """
        with ledger_errors():
            _note_seen(self._db, files)
            for ending in read_together if self._knows_files() else ():
                beside = self._db.execute(
                    "SELECT path FROM (SELECT path FROM temp.changed "
                    "UNION ALL SELECT path FROM temp.fresh) "
                    "WHERE lower(CAST(substr(path, -?) AS TEXT)) = ?",
                    (len(ending), ending),
                )
                for (path,) in beside:
                    self._parse_beside(path[: -len(ending)])
            touched = self._db.execute(
                "DELETE FROM files WHERE archive IN (SELECT number FROM temp.changed)"
            ).rowcount
            touched += self._db.execute(
                "DELETE FROM files WHERE number IN (SELECT number FROM temp.changed)"
            ).rowcount
            touched += self._db.execute(
                "INSERT INTO files (path, size, mtime_ns, known, format, reason, series_key) "
                "SELECT path, size, mtime_ns, known, "
                "  CASE known WHEN '' THEN NULL ELSE '' END, known, '' FROM temp.seen "
                "WHERE path NOT IN (SELECT path FROM files)"
            ).rowcount
            failed = [*_PASSING]
            if self._fact("conditions") != conditions:
                self._set("conditions", conditions)
                failed += _CONDITIONAL
            self._db.executemany(
                "UPDATE files SET format = NULL WHERE known = '' AND reason = ?",
                [(reason,) for reason in failed],
            )
            if touched:
                self._set("rows", None)
            self._db.commit()

    def _knows_files(self) -> bool:
        return self._db.execute("SELECT 1 FROM files LIMIT 1").fetchone() is not None

    def _parse_beside(self, stem: bytes) -> None:
        self._db.execute(  # "/" is the character after "."
            "UPDATE files SET format = NULL WHERE path > ? AND path < ? AND known = ''",
            (stem + b".", stem + b"/"),
        )

    def num_to_parse(self) -> int:
        """Return how many files have no header yet."""
        return int(
            self._db.execute("SELECT count(*) FROM files WHERE format IS NULL").fetchone()[0]
        )

    def to_parse(self) -> Iterator[FileToParse]:
        """Yield the files that have no header yet, by path; more may be recorded meanwhile."""
        after = b""
        while True:
            rows = self._db.execute(
                "SELECT number, path, place, archive FROM files "
                "WHERE format IS NULL AND path > ? ORDER BY path LIMIT ?",
                (after, _BATCH),
            ).fetchall()
            for number, path, place, archive in rows:
                relative = os.fsdecode(path)
                where = self.private / place if place else self.root / relative
                yield FileToParse(number, relative, str(where), archive is not None)
            if len(rows) < _BATCH:
                return
            after = rows[-1][1]

    def record(self, headers: Sequence[tuple[int, Header]]) -> None:
        """Write down the headers of files, by their number."""
        with ledger_errors():
            self._db.executemany(
                "UPDATE files SET format = ?, reason = ?, patient_key = ?, study_key = ?, "
                "series_key = ?, digest = ?, header = ? WHERE number = ?",
                [
                    (h.format, h.reason, h.patient_key, h.study_key, h.series_key, h.digest,
                     json.dumps(h.facts), number)
                    for number, h in headers
                ],
            )  # fmt: skip
            self._set("rows", None)
            self._db.commit()

    def archives(self) -> list[tuple[int, str, Path]]:
        """Return number, relative path and place of the archives that are not unpacked yet."""
        rows = self._db.execute(
            "SELECT number, path FROM files WHERE reason = 'archive' AND archive IS NULL "
            "AND header IS NOT 'unpacked' ORDER BY path"
        )
        return [(number, os.fsdecode(path), self.root / os.fsdecode(path)) for number, path in rows]

    def add_members(
        self, archive: int, path: str, members: Sequence[tuple[str, str, int, int, str]]
    ) -> None:
        """List the members of an unpacked archive: name, place, size, time and known reason."""
        with ledger_errors():
            self._db.executemany(
                "INSERT OR REPLACE INTO files "
                "(path, size, mtime_ns, known, archive, place, format, reason, series_key) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, '')",
                [
                    (os.fsencode(f"{path}/{name}"), size, mtime_ns, reason, archive, place,
                     "" if reason else None, reason)
                    for name, place, size, mtime_ns, reason in members
                ],
            )  # fmt: skip
            self._db.execute("UPDATE files SET header = 'unpacked' WHERE number = ?", (archive,))
            self._db.commit()

    def reject(self, number: int, reason: str) -> None:
        """Give a file another reason."""
        with ledger_errors():
            self._db.execute("UPDATE files SET reason = ? WHERE number = ?", (reason, number))
            self._db.commit()

    def unpacked_folders(self) -> set[str]:
        """Return the folders, below the private one, that members lie in."""
        rows = self._db.execute("SELECT DISTINCT archive FROM files WHERE archive IS NOT NULL")
        return {str(number) for (number,) in rows}

    # --- scans -----------------------------------------------------------------------------------

    def series(self) -> Iterator[list[tuple[int, Header]]]:
        """Yield the headers of each series, with the files' numbers; sorted by path.

        A file that names no series comes alone.
        """
        rows = self._db.execute(
            "SELECT number, path, format, reason, patient_key, study_key, series_key, digest, "
            "header FROM files ORDER BY format, series_key, path"
        )
        for (_, series_key), members in itertools.groupby(rows, lambda row: (row[2], row[6])):
            if series_key:
                yield [(row[0], _header(row)) for row in members]
            else:
                yield from ([(row[0], _header(row))] for row in members)

    def begin_scans(self) -> None:
        """Forget all scans; those that were there are lost with `finish_scans`, not before.

        From now on until then the tables beside the ledger may be of either.
        """
        with ledger_errors():
            self._set("rows", None)
            self._db.commit()
            self._db.execute("DELETE FROM scans")
            self._db.execute("DELETE FROM places")

    def add_scan(
        self, entry: Mapping[str, Any], reading: Mapping[str, Any], files: Sequence[tuple[int, str]]
    ) -> None:
        """Add one scan or rejected row, with the number and path of its files in order."""
        with ledger_errors():
            number = self._db.execute(
                "INSERT INTO scans (scan_key, status, reason, digest, first_path, num_files, "
                "entry, reading) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    entry["scan_key"], entry["status"], entry["reason"], entry["digest"],
                    os.fsencode(files[0][1]), len(files), json.dumps(entry), json.dumps(reading),
                ),
            ).lastrowid  # fmt: skip
            self._db.executemany(
                "INSERT INTO places SELECT ?, ?, number, path, place, size, mtime_ns FROM files "
                "WHERE number = ?",
                [(number, position, file) for position, (file, _) in enumerate(files)],
            )

    def copies(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the accepted scans whose voxels an accepted scan with an earlier path has too."""
        numbers = self._db.execute(
            "SELECT s.number FROM scans s WHERE s.status = 'accepted' AND EXISTS ("
            "SELECT 1 FROM scans t WHERE t.status = 'accepted' AND t.digest = s.digest AND "
            "(t.first_path, t.number) < (s.first_path, s.number)) ORDER BY s.number"
        ).fetchall()  # all, before a first one is changed
        for (number,) in numbers:
            found = self._db.execute("SELECT entry FROM scans WHERE number = ?", (number,))
            yield number, json.loads(found.fetchone()[0])

    def replace_scan(self, number: int, entry: Mapping[str, Any]) -> None:
        """Write another row for a scan."""
        self._db.execute(
            "UPDATE scans SET scan_key = ?, status = ?, reason = ?, digest = ?, entry = ? "
            "WHERE number = ?",
            (
                entry["scan_key"],
                entry["status"],
                entry["reason"],
                entry["digest"],
                json.dumps(entry),
                number,
            ),
        )

    def has_key(self, scan_key: str) -> bool:
        """Return whether a row of this key is there."""
        found = self._db.execute("SELECT 1 FROM scans WHERE scan_key = ?", (scan_key,)).fetchone()
        return found is not None

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the index, by scan key."""
        for (entry,) in self._db.execute("SELECT entry FROM scans ORDER BY scan_key"):
            yield json.loads(entry)

    def count_files(self) -> dict[str, int]:
        """Return how many files there are, and how many belong to accepted scans."""
        (files,) = self._db.execute("SELECT count(*) FROM files").fetchone()
        (used,) = self._db.execute(
            "SELECT count(DISTINCT file) FROM places JOIN scans ON scans.number = places.scan "
            "WHERE status = 'accepted'"
        ).fetchone()
        return {"num_files": files, "num_scan_files": used}

    @property
    def rows_of(self) -> str | None:
        """What the rows were made by, or None when they have to be made again."""
        return self._fact("rows")

    def finish_scans(self, made_by: str) -> None:
        """Note that the rows are up to date."""
        with ledger_errors():
            self._set("rows", made_by)
            self._db.commit()

    def _fact(self, name: str) -> str | None:
        value: str | None = _fact(self._db, name)
        return value

    def _set(self, name: str, value: str | None) -> None:
        if value is None:
            self._db.execute("DELETE FROM facts WHERE name = ?", (name,))
        else:
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))


def changes_of(private: Path | None, root: Path, files: Iterable[FoundFile]) -> Changes:
    """Return how the files differ from what the ledger in a private folder knows, if there is one.

    Touches nothing.
    """
    with ledger_errors():
        path = private / LEDGER_NAME if private else None
        db = _empty()
        if path and path.is_file():
            known = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
            if _is_of(known, os.fsencode(root.resolve())):
                db, known = known, db
            known.close()
        try:
            _note_seen(db, files)
            found = db.execute(
                "SELECT count(*), coalesce(sum(size), 0), coalesce(sum(known = 'excluded'), 0), "
                "(SELECT count(*) FROM temp.fresh WHERE known = '') + "
                "(SELECT count(*) FROM temp.changed JOIN temp.seen s USING (path) "
                " WHERE s.known = '') + (SELECT count(*) FROM files JOIN temp.seen USING (path) "
                " WHERE format IS NULL AND path NOT IN (SELECT path FROM temp.changed)) "
                "FROM temp.seen"
            ).fetchone()
            return Changes(*found)
        finally:
            db.close()


def _empty() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:")
    db.executescript(_TABLES)
    return db


def _note_seen(db: sqlite3.Connection, files: Iterable[FoundFile]) -> None:
    """Write what was found into a temporary table, and what of it has changed into another."""
    db.executescript(_SEEN)
    rows = ((os.fsencode(f.path), f.size, f.mtime_ns, f.reason) for f in files)
    db.executemany("INSERT OR IGNORE INTO temp.seen VALUES (?, ?, ?, ?)", rows)
    db.executescript(_COMPARED)


def scan_files(private: Path, scan_key: str) -> ScanFiles | None:
    """Return where the files of one scan are.

    Raises:
        FileNotFoundError: the private part of the index is absent.
    """
    with _reading(private) as db:
        scan = db.execute(
            "SELECT number, reading FROM scans WHERE scan_key = ?", (scan_key,)
        ).fetchone()
        if scan is None:
            return None
        root = Path(os.fsdecode(_fact(db, "root")))
        rows = db.execute(
            "SELECT path, place, size, mtime_ns FROM places WHERE scan = ? ORDER BY position",
            (scan[0],),
        ).fetchall()
    places = [private / place if place else root / os.fsdecode(path) for path, place, *_ in rows]
    marks = tuple((size, mtime_ns) for *_, size, mtime_ns in rows)
    return ScanFiles(tuple(places), marks, json.loads(scan[1]))


def names_of_scans(private: Path) -> Iterator[tuple[str, str, int]]:
    """Yield key, first relative path and number of files of every accepted scan.

    Raises:
        FileNotFoundError: the private part of the index is absent.
    """
    with _reading(private) as db:
        for key, path, count in db.execute(
            "SELECT scan_key, first_path, num_files FROM scans WHERE status = 'accepted' "
            "ORDER BY scan_key"
        ):
            yield key, os.fsdecode(path), count


def rejected_files(private: Path) -> Iterator[tuple[str, str, str]]:
    """Yield relative path, row key and reason of every file of a rejected row, by reason and path.

    Raises:
        FileNotFoundError: the private part of the index is absent.
    """
    with _reading(private) as db:
        for path, key, reason in db.execute(
            "SELECT path, scan_key, scans.reason FROM scans "
            "JOIN places ON places.scan = scans.number "
            "WHERE status = 'rejected' ORDER BY scans.reason, path"
        ):
            yield os.fsdecode(path), key, reason


def _header(row: Sequence[Any]) -> Header:
    _, path, name, reason, patient, study, series, digest, facts = row
    return Header(
        os.fsdecode(path), name or "", reason or "", patient or "", study or "", series or "",
        digest or "", json.loads(facts) if facts and facts != "unpacked" else {},
    )  # fmt: skip


def _fact(db: sqlite3.Connection, name: str) -> Any:
    found = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return found[0] if found else None


def _is_of(db: sqlite3.Connection, root: bytes) -> bool:
    """Return whether a ledger is of this version and folder; a damaged one is not."""
    try:
        return bool(_fact(db, "version") == VERSION and _fact(db, "root") == root)
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return False
        raise  # locked, or the disk: no reason to throw it away
    except sqlite3.DatabaseError:
        return False


def _open_or_begin(path: Path, root: bytes) -> sqlite3.Connection:
    with ledger_errors():
        if path.exists():
            db = sqlite3.connect(path, timeout=_WAIT_SECONDS)
            if _is_of(db, root):
                return _for_writing(db)
            db.close()
            for ending in ("", "-journal", "-wal", "-shm"):
                path.with_name(path.name + ending).unlink(missing_ok=True)
        draft = path.with_name(f".{path.name}.part")
        draft.unlink(missing_ok=True)
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        db = sqlite3.connect(draft)
        db.executescript(_TABLES)
        db.execute("INSERT INTO facts VALUES ('version', ?), ('root', ?)", (VERSION, root))
        db.commit()
        db.close()
        draft.replace(path)
        return _for_writing(sqlite3.connect(path, timeout=_WAIT_SECONDS))


def _for_writing(db: sqlite3.Connection) -> sqlite3.Connection:
    """Let others read what was committed last while this process writes."""
    db.execute("PRAGMA journal_mode = WAL")
    return db


@contextmanager
def _reading(private: Path) -> Iterator[sqlite3.Connection]:
    path = private / LEDGER_NAME
    if not path.is_file():
        raise FileNotFoundError(LEDGER_NAME)
    with ledger_errors():
        db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=_WAIT_SECONDS)
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
