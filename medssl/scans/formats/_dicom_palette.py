"""Bound what a segmented palette may unfold to, before it is unfolded.

Source: DICOM PS3.3, section C.7.9.2.
"""

from __future__ import annotations

import struct
from typing import Any

from medssl.errors import RejectedScan
from medssl.scans.formats._dicom_values import tag_of

_MAX_ENTRIES = 2**16
_DISCRETE, _LINEAR = 0, 1


def check_palette(dataset: Any) -> None:
    """Refuse a segmented palette of more entries than a palette may have.

    A few bytes can ask for 65,536 entries, again and again.

    Raises:
        RejectedScan: ``colour_unsupported``.
    """
    for colour in ("Red", "Green", "Blue"):
        tag = tag_of(f"Segmented{colour}PaletteColorLookupTableData")
        if tag not in dataset:
            continue
        content = dataset[tag].value
        if not isinstance(content, bytes):
            raise RejectedScan("colour_unsupported", "a segmented palette holds no bytes")
        codes = struct.unpack(f"<{len(content) // 2}H", content[: len(content) // 2 * 2])
        if _num_entries(codes) > _MAX_ENTRIES:
            raise RejectedScan("colour_unsupported", "a segmented palette is too long")


def _num_entries(codes: tuple[int, ...]) -> int:
    total = at = 0
    while at + 1 < len(codes):
        kind, length = codes[at], codes[at + 1]
        if kind not in (_DISCRETE, _LINEAR):
            raise RejectedScan("colour_unsupported", "a palette segment of an unusual kind")
        total += length
        at += 2 + (length if kind == _DISCRETE else 1)
    return total
