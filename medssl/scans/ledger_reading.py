"""Read what a ledger knows, also while another process brings it up to date."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl.scans.files import FoundFile
from medssl.scans.ledger_file import (
    LEDGER_NAME,
    empty_ledger,
    fact_of,
    is_of,
    ledger_errors,
    note_seen,
    open_to_read,
)


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


def changes_of(private: Path | None, root: Path, files: Iterable[FoundFile]) -> Changes:
    """Return how the files differ from what the ledger in a private folder knows, if there is one.

    Touches nothing.
    """
    with ledger_errors():
        path = private / LEDGER_NAME if private else None
        db = empty_ledger()
        if path and path.is_file():
            known = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
            if is_of(known, os.fsencode(root.resolve())):
                db, known = known, db
            known.close()
        try:
            note_seen(db, files)
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


def scan_files(private: Path, scan_key: str) -> ScanFiles | None:
    """Return where the files of one scan are.

    Raises:
        FileNotFoundError: the private part of the index is absent.
    """
    with open_to_read(private) as db:
        scan = db.execute(
            "SELECT number, reading FROM scans WHERE scan_key = ?", (scan_key,)
        ).fetchone()
        if scan is None:
            return None
        root = Path(os.fsdecode(fact_of(db, "root")))
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
    with open_to_read(private) as db:
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
    with open_to_read(private) as db:
        for path, key, reason in db.execute(
            "SELECT path, scan_key, scans.reason FROM scans "
            "JOIN places ON places.scan = scans.number "
            "WHERE status = 'rejected' ORDER BY scans.reason, path"
        ):
            yield os.fsdecode(path), key, reason
