"""Find the bytes of a DICOM file's pixels without reading them, and see whether all are there."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from medssl.errors import RejectedScan

_FLOAT_DATA = {(0x7FE0, 0x0008), (0x7FE0, 0x0009)}
_PIXEL_DATA = {(0x7FE0, 0x0010), *_FLOAT_DATA}
_VRS_OF_PIXELS = (b"OB", b"OW", b"OF", b"OD", b"UN", b"OL", b"OV")
_ITEM, _END = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
_UNDEFINED = 0xFFFFFFFF
_BLOCK_BYTES = 2**20


def find_pixel_bytes(
    file: BinaryIO, size: int, wanted: int, *, big_endian: bool
) -> list[tuple[int, int]]:
    """Return (start, length) of the pixel bytes: one range, or one a fragment when compressed.

    Args:
        file: positioned at the pixel element, where parsing without pixels stops.
        size: of the file, bytes.
        wanted: bytes that uncompressed pixels take.

    Raises:
        RejectedScan: ``truncated_pixels`` when the file ends too early or holds no pixels.

    Source: DICOM PS3.5, sections 7.1 and A.4.
    """
    order = ">" if big_endian else "<"
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


def read_ranges(file: BinaryIO, ranges: list[tuple[int, int]]) -> Iterator[memoryview | bytes]:
    """Yield the bytes of the ranges, in blocks; those of a file in memory are not copied.

    Raises:
        RejectedScan: ``truncated_pixels`` when the file has become shorter.
    """
    if isinstance(file, io.BytesIO):
        whole = file.getbuffer()
        for start, length in ranges:
            yield whole[start : start + length]
        return
    for start, length in ranges:
        file.seek(start)
        left = length
        while left > 0:
            block = file.read(min(left, _BLOCK_BYTES))
            if not block:
                raise RejectedScan("truncated_pixels", "the file became shorter")
            yield block
            left -= len(block)


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


def peek_float_pixels(file: BinaryIO, *, big_endian: bool) -> bool:
    """Say whether the pixels at which the file stands are floating point; stay there."""
    start = file.read(4)
    file.seek(-len(start), os.SEEK_CUR)
    order = ">" if big_endian else "<"
    return len(start) == 4 and struct.unpack(order + "HH", start) in _FLOAT_DATA
