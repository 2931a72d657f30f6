"""Read the voxels of a NIfTI file piece by piece, and never more bytes than its header says."""

from __future__ import annotations

import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from medssl.errors import RejectedScan
from medssl.scans.formats._nifti_header import HEADER_BYTES, Layout, read_layout

_GZIP_MAGIC = b"\x1f\x8b"
_MAX_DEFLATE_RATIO = 1032  # a byte of deflate holds no more than 1032 bytes: zlib's manual
_VALUES_AT_ONCE = 2**20


@dataclass(frozen=True)
class Stream:
    """An open file, at the first byte of its voxels."""

    layout: Layout
    _file: IO[bytes]

    def values(self) -> Iterator[npt.NDArray[np.float32]]:
        """Yield all numbers of the scan, scaled, in the order of the file, (n,) at a time.

        Raises:
            RejectedScan: the file ends early, or goes on after its voxels.
        """
        layout = self.layout
        voxel_bytes = layout.samples * layout.dtype.itemsize
        left = layout.num_bytes
        while left:
            size = min(left, _VALUES_AT_ONCE // layout.samples * voxel_bytes)
            yield _converted(_exactly(self._file, size), layout)
            left -= size
        # Reading on also makes gzip compare its checksum.
        if self._file.read(1):
            raise RejectedScan("unreadable", "the file is longer than its header says")


@contextmanager
def open_stream(path: Path) -> Iterator[Stream]:
    """Open a NIfTI file, plain or gzipped whatever its name says, and read its header.

    Raises:
        RejectedScan: it is no NIfTI file, is damaged, or changes while it is open.
    """
    with path.open("rb") as raw:
        before = os.fstat(raw.fileno())
        try:
            with _decoded(raw) as file:
                yield _started(file, before, zipped=file is not raw)
        except Exception as error:
            if _changed(path, before):
                raise RejectedScan("changed_while_read") from None
            if isinstance(error, EOFError):
                raise RejectedScan("truncated_pixels", "the gzip stream ends early") from None
            if isinstance(error, (zlib.error, gzip.BadGzipFile)):
                raise RejectedScan("unreadable", "the gzip stream is damaged") from None
            raise
        if _changed(path, before):
            raise RejectedScan("changed_while_read")


def unzipped_head(head: bytes, num_bytes: int) -> bytes:
    """Return the start of a file, inflated where it is gzip; "" bytes where that fails."""
    if not head.startswith(_GZIP_MAGIC):
        return head[:num_bytes]
    try:
        return zlib.decompressobj(wbits=31).decompress(head, num_bytes)
    except zlib.error:
        return b""


def read_head(path: Path, num_bytes: int = 8192) -> bytes:
    """Return the start of a regular file, inflated where it is gzip; b"" where there is none."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return b""
        with path.open("rb") as file:
            return unzipped_head(file.read(num_bytes), HEADER_BYTES)
    except OSError:
        return b""


@contextmanager
def _decoded(raw: IO[bytes]) -> Iterator[IO[bytes]]:
    zipped = raw.read(2) == _GZIP_MAGIC
    raw.seek(0)
    if not zipped:
        yield raw
        return
    with gzip.GzipFile(fileobj=raw) as file:
        yield file  # type: ignore[misc]  # typeshed: GzipFile reads bytes, but is no IO[bytes]


def _started(file: IO[bytes], status: os.stat_result, *, zipped: bool) -> Stream:
    try:
        head = file.read(HEADER_BYTES)
    except EOFError:
        raise RejectedScan("unreadable", "the file ends within its header") from None
    layout = read_layout(head)
    total = layout.offset + layout.num_bytes
    if total > status.st_size * (_MAX_DEFLATE_RATIO if zipped else 1):
        raise RejectedScan("truncated_pixels", "the file is shorter than its header says")
    if zipped:
        skip = layout.offset - len(head)
        if skip > 0:
            _exactly(file, skip)
        else:
            file.seek(layout.offset)
    else:
        file.seek(layout.offset)
    return Stream(layout, file)


def _exactly(file: IO[bytes], size: int) -> bytearray:
    content = bytearray(size)
    view = memoryview(content)
    done = 0
    while done < size:
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise RejectedScan("truncated_pixels", "the file ends before its voxels do")
        done += count
    return content


def _converted(content: bytearray, layout: Layout) -> npt.NDArray[np.float32]:
    stored: npt.NDArray[Any] = np.frombuffer(content, layout.dtype)
    if layout.samples == 4:
        stored = stored.reshape(-1, 4)[:, :3].ravel()
    # What float32 cannot hold becomes infinite, and is found by who looks for infinities.
    with np.errstate(over="ignore", invalid="ignore"):
        if layout.scaling is None:
            return stored.astype(np.float32)
        slope, intercept = layout.scaling
        scaled = stored.astype(np.float64)
        scaled *= slope
        scaled += intercept
        return scaled.astype(np.float32)


def _changed(path: Path, before: os.stat_result) -> bool:
    try:
        after = path.stat()
    except OSError:
        return True
    names = ("st_dev", "st_ino", "st_size", "st_mtime_ns")
    return any(getattr(after, name) != getattr(before, name) for name in names)
