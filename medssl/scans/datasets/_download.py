"""Downloads that are checked, and archives that cannot write outside their folder."""

from __future__ import annotations

import hashlib
import http.client
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from medssl.errors import DataError, MachineError

Progress = Callable[[int, int], None]

_CHUNK = 1 << 20  # bytes
_TIMEOUT = 30  # seconds without any answer
_SLACK = 1.5
"""A download may exceed the size that is known by this factor before it is given up."""


@dataclass(frozen=True)
class Archive:
    """A file to download.

    Attributes:
        algorithm: of the checksum, as its publisher gives it: ``md5`` or ``sha256``.
        size_bytes: about; far more than this is refused.
    """

    url: str
    algorithm: str
    checksum: str
    size_bytes: int

    @property
    def file_name(self) -> str:
        """The last part of the address."""
        return Path(urlsplit(self.url).path).name


def check(path: Path, archive: Archive) -> None:
    """Refuse a file whose checksum differs.

    Raises:
        DataError: found and wanted checksums are named.
    """
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, archive.algorithm).hexdigest()
    if found != archive.checksum:
        raise DataError(
            f"{archive.file_name} has {archive.algorithm} {found}, {archive.checksum} is wanted. "
            "The copy is incomplete or altered: get it again."
        )


def download(archive: Archive, target: Path, progress: Progress | None = None) -> None:
    """Download and check one file.

    Raises:
        MachineError: the address cannot be reached, or sends far more than it should.
        DataError: the checksum differs.
    """
    if urlsplit(archive.url).scheme not in ("https", "http"):
        raise MachineError(f"{archive.url} is no web address.")
    try:
        with (
            urllib.request.urlopen(archive.url, timeout=_TIMEOUT) as response,  # noqa: S310
            target.open("wb") as stream,
        ):
            total = int(response.headers.get("Content-Length") or archive.size_bytes)
            done = 0
            while chunk := response.read(_CHUNK):
                done += len(chunk)
                if done > archive.size_bytes * _SLACK:
                    raise MachineError(
                        f"{archive.url} sends more than the {archive.size_bytes} bytes expected."
                    )
                stream.write(chunk)
                if progress:
                    progress(done, total)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
        reason = getattr(e, "reason", None) or type(e).__name__
        raise MachineError(
            f"{archive.url} cannot be reached ({reason}). Check the network, or download the file "
            "elsewhere and set MEDSSL_DATA_MIRROR to the folder that holds it."
        ) from None
    check(target, archive)


def extract(path: Path, folder: Path, wanted: Callable[[str], str | None]) -> int:
    """Extract chosen regular files of a tar.

    Args:
        path: the tar, compressed or not.
        folder: where to.
        wanted: gives a member's new relative path, or None to leave it out.

    Returns:
        How many files were written.

    Raises:
        DataError: it is no tar, is cut short, or a member would land outside the folder.
    """
    count = 0
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = wanted(member.name) if member.isfile() else None
                if name is not None:
                    tar.extract(member.replace(name=name), folder, filter="data")
                    count += 1
    except tarfile.FilterError:
        raise DataError(f"{path.name} holds a path that leads outside its folder.") from None
    except (tarfile.TarError, EOFError):
        raise DataError(f"{path.name} is no tar archive, or is cut short.") from None
    return count
