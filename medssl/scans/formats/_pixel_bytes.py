"""Find the bytes of a DICOM file's pixels without reading them, and see whether all are there."""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

from medssl.errors import RejectedScan

_PIXEL_DATA = {(0x7FE0, 0x0010), (0x7FE0, 0x0008), (0x7FE0, 0x0009)}
_VRS_OF_PIXELS = (b"OB", b"OW", b"OF", b"OD", b"UN", b"OL", b"OV")
_ITEM, _END = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
_UNDEFINED = 0xFFFFFFFF


def find_pixel_bytes(file: BinaryIO, wanted: int, *, big_endian: bool) -> list[tuple[int, int]]:
    """Return (start, length) of the pixel bytes: one range, or one a fragment when compressed.

    Args:
        file: positioned at the pixel element, where parsing without pixels stops.
        wanted: bytes that uncompressed pixels take.

    Raises:
        RejectedScan: ``truncated_pixels`` when the file ends too early or holds no pixels.

    Source: DICOM PS3.5, sections 7.1 and A.4.
    """
    order = ">" if big_endian else "<"
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if len(start) < 8 or struct.unpack(order + "HH", start[:4]) not in _PIXEL_DATA:
        raise RejectedScan("truncated_pixels", "the file ends before its pixels")
    if start[4:6] in _VRS_OF_PIXELS:
        length = _unpack_length(file.read(4), order)
    else:
        length = _unpack_length(start[4:8], order)
    if length == _UNDEFINED:
        return _fragments(file, size, order)
    missing = wanted - min(length, size - file.tell())
    if missing > 0:
        raise RejectedScan(
            "truncated_pixels", f"{wanted} bytes of pixels wanted, {wanted - missing} found"
        )
    return [(file.tell(), length if length <= size - file.tell() else wanted)]


def _fragments(file: BinaryIO, size: int, order: str) -> list[tuple[int, int]]:
    ranges = []
    while True:
        head = file.read(8)
        if len(head) < 8:
            raise RejectedScan("truncated_pixels", "the compressed pixels have no end mark")
        tag = struct.unpack(order + "HH", head[:4])
        if tag == _END:
            break
        length = _unpack_length(head[4:], order)
        if tag != _ITEM or file.tell() + length > size:
            raise RejectedScan("truncated_pixels", "a compressed fragment is cut off")
        ranges.append((file.tell(), length))
        file.seek(length, os.SEEK_CUR)
    if sum(length for _, length in ranges[1:]) == 0:  # the first item is the offset table
        raise RejectedScan("truncated_pixels", "there is no compressed fragment")
    return ranges


def _unpack_length(data: bytes, order: str) -> int:
    if len(data) < 4:
        raise RejectedScan("truncated_pixels", "the file ends before its pixels")
    return int(struct.unpack(order + "L", data)[0])
