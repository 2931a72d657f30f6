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
from contextlib import suppress
from pathlib import Path
from typing import Any

from medssl.scans.files import FileToParse, FoundFile
from medssl.scans.formats.base import Header
from medssl.scans.ledger_file import (
    LEDGER_NAME,
    fact_of,
    ledger_errors,
    note_seen,
    open_or_begin,
)

_PASSING = ("no_access", "changed_while_read")
"""Reasons that the next look may find gone, although the file is the same."""

_CONDITIONAL = (
    "archive_unsafe", "out_of_memory", "reader_crashed", "too_slow", "unreadable",
    "unsupported_transfer_syntax",
)  # fmt: skip
"""Reasons that other limits, or other versions of libraries, may lift."""

_BATCH = 2000  # rows


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
        self._db = open_or_begin(path, os.fsencode(self.root))

    def close(self) -> None:
        """Close the file; what was not committed is forgotten."""
        with ledger_errors():
            self._db.rollback()
            # Whoever may read a folder but not write it needs a ledger of one file.
            self._db.execute("PRAGMA busy_timeout = 0")
            with suppress(sqlite3.OperationalError):  # somebody is reading: the next run does it
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
            note_seen(self._db, files)
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
        value: str | None = fact_of(self._db, name)
        return value

    def _set(self, name: str, value: str | None) -> None:
        if value is None:
            self._db.execute("DELETE FROM facts WHERE name = ?", (name,))
        else:
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))


def _header(row: Sequence[Any]) -> Header:
    _, path, name, reason, patient, study, series, digest, facts = row
    return Header(
        os.fsdecode(path), name or "", reason or "", patient or "", study or "", series or "",
        digest or "", json.loads(facts) if facts and facts != "unpacked" else {},
    )  # fmt: skip
