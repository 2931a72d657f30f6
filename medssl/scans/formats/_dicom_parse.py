"""Parse one DICOM file with pydicom: what parsing may cost is bounded first, and its words stay in.

A whole small file is read at once and parsed from memory, because many small reads and opening the
file again for its meta information cost more than the pixels do.
"""

from __future__ import annotations

import io
import logging
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydicom import config as pydicom_config
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from medssl.errors import RejectedScan
from medssl.scans.formats._dicom_values import text
from medssl.scans.formats.base import MAX_FILE_BYTES

WHOLE_FILE_BYTES = 2**24  # smaller files are read at once; larger ones from disk, piece by piece
MAX_INFLATED_BYTES = 2**28  # 256 MiB: a deflated file is small by nature
_BLOCK_BYTES = 2**20
_PREAMBLE_BYTES = 132
_META_GROUP = 0x0002
_PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_GE_PRIVATE = "1.2.840.113619.5.2"  # implicit, with the pixels' high byte first
_META_TAGS = [0x00020002, 0x00020010]
_LOGGER = logging.getLogger("pydicom")
_TAG = re.compile(r"\(\s*([0-9A-Fa-f]{4})\s*,\s*([0-9A-Fa-f]{4})\s*\)")


@dataclass(frozen=True)
class Parsed:
    """A parsed file.

    Attributes:
        dataset: its elements, converted only when asked for.
        sop_class: from the data set, else from the meta information.
        syntax: of the pixels; a deflated file's is the one it has when inflated.
        content: the (inflated) file, positioned at the pixel element when parsing stopped there.
        size: bytes of the content.
        broken: it could not be parsed beyond what it belongs to.
    """

    dataset: Dataset
    sop_class: str
    syntax: UID
    content: BinaryIO
    size: int
    broken: bool = False

    @property
    def ended_early(self) -> bool:
        """Whether parsing came to the end of the file without meeting its pixels."""
        return not self.broken and self.content.tell() >= self.size

    @property
    def big_endian(self) -> bool:
        """Whether numbers are stored with the high byte first."""
        return self.syntax == ExplicitVRBigEndian


@contextmanager
def open_unchanged(path: Path) -> Iterator[BinaryIO]:
    """Open a file, and refuse it when it changes before the block ends.

    Raises:
        RejectedScan: ``too_large``, or ``changed_while_read``.
    """
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        if before.st_size > MAX_FILE_BYTES:
            raise RejectedScan("too_large", "the file is larger than 4 GiB")
        try:
            yield file
        finally:
            after = os.fstat(file.fileno())
            changed = (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
        if changed:
            raise RejectedScan("changed_while_read", "the file changed while it was read")


def parse(
    file: BinaryIO, tags: list[int], *, with_pixels: bool = False, last_tag: int | None = None
) -> Parsed:
    """Parse a file.

    Args:
        file: at its start, as `open_unchanged` gives it.
        tags: the elements wanted.
        with_pixels: go on to the end; else parsing stops before the pixels.
        last_tag: or behind this element.

    Raises:
        RejectedScan: ``unreadable``, ``too_large``, or ``changed_while_read``.
    """
    size = os.fstat(file.fileno()).st_size
    content: BinaryIO = file
    if size <= WHOLE_FILE_BYTES:
        content = io.BytesIO(file.read(size))
        if len(content.getbuffer()) != size:
            raise RejectedScan("changed_while_read", "the file became shorter while it was read")
    try:
        return _parse_content(content, size, tags, _stop(with_pixels, last_tag))
    except (RejectedScan, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's own; pydicom's have no number
        raise RejectedScan("unreadable", "not parsable as DICOM") from None


def _parse_content(content: BinaryIO, size: int, tags: list[int], stop: Any) -> Parsed:
    if content.read(_PREAMBLE_BYTES)[128:] != b"DICM":
        content.seek(0)
    meta = _read(content, False, True, _after_meta, _META_TAGS)
    syntax = UID(text(meta, "TransferSyntaxUID"))
    if syntax == DeflatedExplicitVRLittleEndian:
        content = _inflate(content)
        size, syntax = len(content.getbuffer()), ExplicitVRLittleEndian
    elif not syntax:
        syntax = _guess_syntax(content)
    implicit = syntax in (ImplicitVRLittleEndian, _GE_PRIVATE)
    little = syntax != ExplicitVRBigEndian
    dataset = _read(content, implicit, little, stop, tags)
    sop_class, of_meta = text(dataset, "SOPClassUID"), text(meta, "MediaStorageSOPClassUID")
    if of_meta.startswith(sop_class):  # absent, or cut short
        sop_class = of_meta
    return Parsed(dataset, sop_class, syntax, content, size)


def _read(content: BinaryIO, implicit: bool, little: bool, stop: Any, tags: list[int]) -> Dataset:
    return read_dataset(content, implicit, little, stop_when=stop, specific_tags=tags)


def _after_meta(tag: int, *_: object) -> bool:
    return tag >> 16 != _META_GROUP


def _at_pixels(tag: int, *_: object) -> bool:
    return tag in _PIXEL_TAGS


def _stop(with_pixels: bool, last_tag: int | None) -> Any:
    if last_tag is not None:
        return lambda tag, *_: tag > last_tag
    return None if with_pixels else _at_pixels


def _guess_syntax(content: BinaryIO) -> UID:
    """Return the syntax that the first element is written in, for a file that states none."""
    start = content.read(6)
    content.seek(-len(start), os.SEEK_CUR)
    if not (start[4:6].isalpha() and start[4:6].isupper()):
        return ImplicitVRLittleEndian
    # Group 8 with its high byte first.
    return ExplicitVRBigEndian if start[:1] == b"\x00" else ExplicitVRLittleEndian


def _inflate(content: BinaryIO) -> io.BytesIO:
    """Inflate the rest of a file, and stop where it would grow too large.

    pydicom inflates a file whole, even for its header: 200 KB can become 600 MB.
    """
    stream = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    inflated = io.BytesIO()
    while block := content.read(_BLOCK_BYTES):
        while block and not stream.eof:
            inflated.write(stream.decompress(block, _BLOCK_BYTES))
            block = stream.unconsumed_tail
            if inflated.tell() > MAX_INFLATED_BYTES:
                raise RejectedScan("too_large", "the deflated file grows beyond 256 MiB")
        if stream.eof:
            break
    if not stream.eof:
        raise RejectedScan("truncated_pixels", "the deflated file ends early")
    inflated.seek(0)
    return inflated


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Keep pydicom's own words, which may hold values, from getting out.

    Yields:
        Flags: after the block, one ``dicom_warning`` (with the tag, where one was named) a warning.
    """
    flags: list[str] = []
    was_disabled = _LOGGER.disabled
    mode = pydicom_config.settings.reading_validation_mode
    try:
        _LOGGER.disabled = True
        pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield flags
        for warning in caught:
            tag = _TAG.search(str(warning.message))
            flags.append("dicom_warning" + (f"_{tag[1]}_{tag[2]}".lower() if tag else ""))
    finally:
        pydicom_config.settings.reading_validation_mode = mode
        _LOGGER.disabled = was_disabled
