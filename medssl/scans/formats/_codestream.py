"""The size that a compressed frame says it has, read before a decoder makes room for it.

Source: ISO/IEC 10918-1, annex B (JPEG); 14495-1, annex C (JPEG-LS); 15444-1, annex A (JPEG 2000).
"""

from __future__ import annotations

import struct
from typing import BinaryIO

from medssl.errors import RejectedScan

HEAD_BYTES = 2**16
MAX_EXCESS = 2  # times the samples that the header promises; a little more is a decoder's affair
_JPEG, _JPEG_2000 = b"\xff\xd8", b"\xff\x4f\xff\x51"
_NO_FRAME = {0xC4, 0xC8, 0xCC}  # tables and extensions among the start-of-frame markers
_JPEG_LS = 0xF7
_SCAN = 0xDA


def check_frames(file: BinaryIO, fragments: list[tuple[int, int]], num_samples: int) -> None:
    """Refuse a file of which a frame would unfold to much more than its header says.

    Args:
        file: the (inflated) file.
        fragments: (start, length) of each compressed fragment.
        num_samples: rows * columns * samples of a frame.

    Raises:
        RejectedScan: ``too_large``.
    """
    for start, length in fragments:
        file.seek(start)
        if samples_of(file.read(min(length, HEAD_BYTES))) > MAX_EXCESS * num_samples:
            raise RejectedScan("too_large", "a compressed frame is larger than its header says")


def samples_of(head: bytes) -> int:
    """Return width * height * components of a JPEG, JPEG-LS or JPEG 2000 stream; else 0."""
    if head.startswith(_JPEG_2000) and len(head) >= 42:
        right, bottom, left, top = struct.unpack_from(">4L", head, 8)
        components = struct.unpack_from(">H", head, 40)[0]
        return int(max(right - left, 0) * max(bottom - top, 0) * components)
    if not head.startswith(_JPEG):
        return 0
    at = 2
    while at + 10 <= len(head) and head[at] == 0xFF and head[at + 1] != _SCAN:
        marker = head[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if (0xC0 <= marker <= 0xCF and marker not in _NO_FRAME) or marker == _JPEG_LS:
            height, width, components = struct.unpack_from(">HHB", head, at + 5)
            return int(height * width * components)
        at += 2 + int(struct.unpack_from(">H", head, at + 2)[0])
    return 0
