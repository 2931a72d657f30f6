"""Find all files below a folder, and read the header of each."""

from __future__ import annotations

import functools
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path

from medssl.errors import RejectedScan
from medssl.executors.base import Loss
from medssl.scans.archives import is_archive
from medssl.scans.formats.base import Header, ScanFormat, load_formats
from medssl.scans.identity import Salt

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how much is done, and of how much (0: not known)."""

HEAD_BYTES = 512
LOSS_REASONS: dict[Loss, str] = {
    "too_slow": "too_slow",
    "out_of_memory": "out_of_memory",
    "died": "reader_crashed",
}
"""The reason code of a file that cost its worker more than it may."""


@dataclass(frozen=True)
class FoundFile:
    """One file below the indexed folder; ``path`` is relative to it."""

    path: str
    size: int
    mtime_ns: int
    reason: str = ""  # known without opening it: excluded, no access, or no regular file


@dataclass(frozen=True)
class FileToParse:
    """One file whose header is wanted.

    Attributes:
        number: of its row in the ledger.
        path: relative to the indexed folder; below its archive, for a member of one.
        place: where its bytes are.
    """

    number: int
    path: str
    place: str
    is_member: bool = False


def find_files(root: Path, leave_out: Path | None, exclude: Sequence[str]) -> Iterator[FoundFile]:
    """Yield all files below a folder, each folder once, however many links lead to it.

    Real folders come before links to folders, so that a file goes by its real path. What is held in
    memory grows with the number of folders, not of files.

    Args:
        root: the folder.
        leave_out: a folder that is not entered: the index itself, where it lies inside.
        exclude: patterns such as ``labels/*`` on relative paths; what matches is not opened.
    """
    skip = leave_out.resolve() if leave_out else None
    excluded = re.compile("|".join(map(translate, exclude))) if exclude else None
    seen: set[tuple[int, int]] = set()
    folders, links = deque([""]), deque[str]()
    while folders or links:
        here = folders.popleft() if folders else links.popleft()
        inside = Path(root, here)
        subfolders: list[tuple[str, bool]] = []
        try:
            status = inside.stat()
            if (status.st_dev, status.st_ino) in seen or (skip and inside.resolve() == skip):
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(inside) as entries:
                for entry in entries:
                    path = f"{here}/{entry.name}" if here else entry.name
                    if _is_folder(entry):
                        subfolders.append((path, entry.is_symlink()))
                    else:
                        yield _look(entry, path, excluded)
        except OSError:  # a folder that cannot be entered gets a row: its files are not just missed
            yield FoundFile(here, 0, 0, "no_access")
        for path, linked in sorted(subfolders):
            (links if linked else folders).append(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _look(entry: os.DirEntry[str], path: str, excluded: re.Pattern[str] | None) -> FoundFile:
    try:
        status = entry.stat()
    except OSError:  # a link to nowhere
        return FoundFile(path, 0, 0, "no_access")
    reason = "" if stat.S_ISREG(status.st_mode) else "not_a_scan"  # a pipe would block the reader
    if excluded and excluded.match(path):
        reason = "excluded"
    return FoundFile(path, status.st_size, status.st_mtime_ns, reason)


def parse_file(salt: Salt, file: FileToParse) -> Header:
    """Read one header; whatever is wrong with the file becomes a reason code.

    An archive gets the reason ``archive``: it is unpacked later.
    """
    place = Path(file.place)
    name = ""
    try:
        with place.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
        claiming = next((item for item in _formats() if item.claims(place, head)), None)
        if claiming is None:
            reason = "not_a_scan"
            if is_archive(place, head):
                reason = "archive_in_archive" if file.is_member else "archive"
            return Header(file.path, "", reason)
        name = claiming.name
        return claiming.read_header(place, file.path, salt)
    except RejectedScan as error:
        return Header(file.path, name, error.reason)
    except PermissionError:
        return Header(file.path, name, "no_access")
    except FileNotFoundError:
        return Header(file.path, name, "changed_while_read")
    except MemoryError:
        return Header(file.path, name, "out_of_memory")
    except Exception:  # noqa: BLE001  (one broken file must not end the run)
        return Header(file.path, name, "unreadable")


def lost_file(file: FileToParse, loss: Loss) -> Header:
    """Return the header of a file that cost its worker more than it may."""
    return Header(file.path, "", LOSS_REASONS[loss])


@functools.cache
def _formats() -> list[ScanFormat]:
    return load_formats()
