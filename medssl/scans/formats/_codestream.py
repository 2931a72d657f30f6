"""The size that a compressed frame says it has, read before a decoder makes room for it.

Decoders hand out as many bytes as a frame holds, which pydicom lays out as the header says: a frame
of another width would be scrambled without a word.

Source: ISO/IEC 10918-1, annex B (JPEG); 14495-1, annex C (JPEG-LS); 15444-1, annexes A and I
(JPEG 2000).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, BinaryIO

from medssl.errors import RejectedScan

HEAD_BYTES = 2**16
MAX_EXCESS = 2  # times the samples that the header promises: more is refused for its size
_JPEG, _JPEG_2000 = b"\xff\xd8", b"\xff\x4f\xff\x51"
_JP2 = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
_NO_FRAME = {0xC4, 0xC8, 0xCC}  # tables and extensions among the start-of-frame markers
_JPEG_LS = 0xF7
_SCAN = 0xDA

Size = tuple[int, int, int]
"""Columns, rows and components."""


def heads_of(file: BinaryIO, fragments: list[tuple[int, int]]) -> Iterable[bytes]:
    """Yield the start of each fragment of a file, given (start, length) of each."""
    for start, length in fragments:
        file.seek(start)
        yield file.read(min(length, HEAD_BYTES))


def check_frames(heads: Iterable[bytes], facts: dict[str, Any]) -> None:
    """Refuse a file whose compressed frames are fewer or of another size than its header says.

    Args:
        heads: the start of each fragment, without the offset table.
        facts: rows, columns, samples and number of frames, from the header.

    Raises:
        RejectedScan: ``too_large``, ``unreadable`` or ``truncated_pixels``.
    """
    wanted = (facts["columns"], facts["rows"], facts["samples"])
    num_fragments = num_streams = 0
    for head in heads:
        num_fragments += bool(head)
        num_streams += starts_frame(head)
        size = size_of(head)
        if size is None or size == wanted:
            continue
        if size[0] * size[1] * size[2] > MAX_EXCESS * wanted[0] * wanted[1] * wanted[2]:
            raise RejectedScan("too_large", "a compressed frame is larger than its header says")
        raise RejectedScan("unreadable", "a compressed frame is not of the size its header says")
    # Of frames that may have several fragments, each begins with a stream; others have one each.
    if (num_streams or num_fragments) < facts["num_frames"]:
        raise RejectedScan("truncated_pixels", "there are fewer compressed frames than promised")


def starts_frame(head: bytes) -> bool:
    """Say whether a fragment starts with a JPEG, JPEG-LS or JPEG 2000 stream."""
    return head.startswith((_JPEG + b"\xff", _JPEG_2000, _JP2))


def size_of(head: bytes) -> Size | None:
    """Return the size that a JPEG, JPEG-LS or JPEG 2000 stream says it has; else None."""
    if head.startswith(_JP2):
        head = _unboxed(head)
    if head.startswith(_JPEG_2000) and len(head) >= 42:
        right, bottom, left, top = struct.unpack_from(">4L", head, 8)
        components = struct.unpack_from(">H", head, 40)[0]
        return max(right - left, 0), max(bottom - top, 0), int(components)
    if not head.startswith(_JPEG):
        return None
    at = 2
    while at + 10 <= len(head) and head[at] == 0xFF and head[at + 1] != _SCAN:
        marker = head[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if (0xC0 <= marker <= 0xCF and marker not in _NO_FRAME) or marker == _JPEG_LS:
            height, width, components = struct.unpack_from(">HHB", head, at + 5)
            return int(width), int(height), int(components)
        at += 2 + int(struct.unpack_from(">H", head, at + 2)[0])
    return None


def _unboxed(head: bytes) -> bytes:
    """Return the codestream in the boxes of a JP2 file; b"" where it lies too far behind."""
    at = 0
    while at + 16 <= len(head):
        length, kind = struct.unpack_from(">L4s", head, at)
        start = 8
        if length == 1:
            length, start = struct.unpack_from(">Q", head, at + 8)[0], 16
        if kind == b"jp2c":
            return head[at + start :]
        if length < start:  # 0: the last box
            break
        at += length
    return b""
