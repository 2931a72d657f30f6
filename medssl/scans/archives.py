"""Zip and tar archives: unpacked once, safely, into the private part of the index.

Members are written under numbers of our own, never under the names that the archive gives them, so
no name can lead out of the folder. Links and devices inside an archive are left out; sizes are
counted as bytes are written, not believed.
"""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from medssl.errors import RejectedScan

_ZIP_SUFFIX = ".zip"
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_KEPT_SUFFIXES = (".nii.gz", ".nii", ".json", ".hdr", ".img", ".zip", *_TAR_SUFFIXES)
_MAX_MEMBERS = 1_000_000
_MAX_GROWTH = 200  # times the archive's size, above the free part; deflate's limit is 1032
_FREE_GROWTH_BYTES = 2**28
_BLOCK = 1 << 20
_DAMAGED = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError,
    NotImplementedError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Member:
    """One file of an archive.

    Attributes:
        name: its path inside the archive, without what would lead out of it.
        place: name of the unpacked file in the target folder; "" when it was not unpacked.
        size: bytes.
        mtime_ns: when it was last changed, as the archive says.
        reason: why it was not unpacked.
    """

    name: str
    place: str
    size: int
    mtime_ns: int
    reason: str = ""


def is_archive(path: Path, head: bytes) -> bool:
    """Say whether a file is a zip or tar archive, by its name or first bytes."""
    name = path.name.lower()
    if name.endswith((_ZIP_SUFFIX, *_TAR_SUFFIXES)):
        return True
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, _BLOCK)
        except zlib.error:
            return False
    return head[:4] == b"PK\x03\x04" or head[257:262] == b"ustar"


def unpack(archive: Path, target: Path, max_bytes: int) -> list[Member]:
    """Write the files of an archive below a folder; all of them, or none.

    Args:
        archive: a zip or tar file.
        target: made; replaced when it exists.
        max_bytes: that all members together may take.

    Raises:
        RejectedScan: ``archive_unsafe`` when it is encrypted, has more than a million members, or
            would grow beyond ``max_bytes`` or 200 times its own size; ``unreadable`` when it is
            damaged.
    """
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = Path(tempfile.mkdtemp(prefix=".part-", dir=target.parent))
    budget = _Budget(min(max_bytes, _FREE_GROWTH_BYTES + _MAX_GROWTH * archive.stat().st_size))
    try:
        try:
            with archive.open("rb") as file:
                zipped = file.read(2) == b"PK"  # a tar file may end in a zip
            source = _zip_members(archive) if zipped else _tar_members(archive)
            names = _Names()
            members = [
                _write(draft, names, name, size, stream, budget, mtime_ns, zipped)
                for name, size, mtime_ns, stream in source
            ]
        except _DAMAGED:
            raise RejectedScan("unreadable", "the archive is damaged") from None
        shutil.rmtree(target, ignore_errors=True)
        draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return members


class _Budget:
    """How many bytes and members may still be written."""

    def __init__(self, max_bytes: int) -> None:
        self.bytes_left = max_bytes
        self.members_left = _MAX_MEMBERS

    def take_member(self, stated_bytes: int) -> None:
        self.members_left -= 1
        if self.members_left < 0:
            raise RejectedScan("archive_unsafe", f"more than {_MAX_MEMBERS} members")
        if stated_bytes > self.bytes_left:
            raise RejectedScan("archive_unsafe", "it would grow too large")

    def take_bytes(self, count: int) -> None:
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise RejectedScan("archive_unsafe", "it grows too large")


_Source = Iterator[tuple[str, int, int, "IO[bytes] | None"]]
"""Name, stated size, time of change in ns, and content (None where there is no plain file)."""


def _zip_members(archive: Path) -> _Source:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            if info.is_dir():
                continue
            if info.flag_bits & 1:
                raise RejectedScan("archive_unsafe", "it is encrypted")
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                yield info.filename, 0, 0, None
                continue
            with opened.open(info) as stream:
                yield info.filename, info.file_size, 0, stream


def _tar_members(archive: Path) -> _Source:
    with tarfile.open(archive, "r|*") as opened:  # a stream: nothing is read twice
        for info in opened:
            if info.isdir():
                continue
            stream = opened.extractfile(info) if info.isreg() else None
            yield info.name, info.size, int(info.mtime) * 10**9, stream


class _Names:
    """Gives members their names: inside the archive, and in the folder they are written to."""

    def __init__(self) -> None:
        self._inside: set[str] = set()
        self._places: set[str] = set()
        self._number_of_stem: dict[str, int] = {}

    def inside(self, name: str) -> str:
        """Return a member's path without what would lead out of the archive; unique."""
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        clean = unique = "/".join(parts) or "unnamed"
        copy = 1
        while unique in self._inside:
            copy += 1
            unique = f"{clean}#{copy}"
        self._inside.add(unique)
        return unique

    def place(self, inside: str) -> str:
        """Return a file name of our own; files of one stem keep sharing one, as sidecars do."""
        suffix = next((end for end in _KEPT_SUFFIXES if inside.lower().endswith(end)), "")
        stem = inside[: len(inside) - len(suffix)] if suffix else inside
        number = self._number_of_stem.setdefault(stem, len(self._places))
        place = f"{number:07d}{suffix}"
        if place in self._places:
            place = f"{number:07d}-{len(self._places)}{suffix}"
        self._places.add(place)
        return place


def _write(
    folder: Path,
    names: _Names,
    name: str,
    size: int,
    stream: IO[bytes] | None,
    budget: _Budget,
    mtime_ns: int,
    alone: bool,
) -> Member:
    """Write one member; where members are packed alone, a damaged one costs itself only."""
    budget.take_member(size)
    inside = names.inside(name)
    if stream is None:
        return Member(inside, "", 0, 0, "not_a_scan")
    place = names.place(inside)
    written = 0
    descriptor = os.open(folder / place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        try:
            while block := stream.read(_BLOCK):
                budget.take_bytes(len(block))
                written += len(block)
                out.write(block)
        except _DAMAGED:
            if not alone:
                raise
            (folder / place).unlink()
            return Member(inside, "", 0, 0, "unreadable")
    os.utime(folder / place, ns=(mtime_ns, mtime_ns))
    return Member(inside, place, written, mtime_ns)
