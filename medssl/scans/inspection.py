"""What only this package may know of an index: where rejected files lie."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from medssl.atomic import atomic_write
from medssl.scans.formats.base import REASONS
from medssl.scans.identity import private_folder
from medssl.scans.index import Index

REJECTED_NAME = "rejected.csv"


def write_rejected(index: Index) -> Path:
    """List every rejected file with its path in ``private/rejected.csv``, mode 0600.

    The paths may name patients: the file is for whoever exported the scans, and stays where they
    are.

    Raises:
        DataError: the private part of the index is absent.
        MachineError: the folder cannot be written.
    """

    def write(part: Path) -> None:
        # Names that are not UTF-8 keep their own bytes.
        with part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["reason", "remedy", "scan_key", "path"])
            for key, reason, path in _rejected_files(index):
                writer.writerow([reason, REASONS.get(reason, ""), key, path])

    path = private_folder(index.folder / "private") / REJECTED_NAME
    atomic_write(path, write, mode=0o600)
    return path


def _rejected_files(index: Index) -> Iterator[tuple[str, str, str]]:
    table = index.table
    rejected = table[table["status"] == "rejected"].sort_values(["reason", "scan_key"])
    for key, reason in zip(rejected["scan_key"], rejected["reason"], strict=True):
        for path in index.files(key):
            yield key, reason, os.fspath(path)
