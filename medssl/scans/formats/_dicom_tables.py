"""Look pixels up in the tables of their file: palettes and modality tables.

pydicom's own functions take the words of a big-endian palette for little-endian ones, know only
modality tables of 8 and 16 bits, and unfold segments without a limit: a few bytes can ask for
65,536 entries, again and again.

Source: DICOM PS3.3, sections C.7.6.3.1.5, C.7.9.2 and C.11.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from medssl.errors import RejectedScan
from medssl.scans.formats._dicom_values import tag_of

_MAX_ENTRIES = 2**16
_DISCRETE, _LINEAR = 0, 1

_Table = npt.NDArray[np.int64]


def apply_palette(
    dataset: Any, indices: npt.NDArray[Any], *, big_endian: bool
) -> npt.NDArray[np.float32]:
    """Return (rows, columns, 3) entries of the palette, as they are stored (8 or 16 bits).

    Args:
        indices: (rows, columns), stored values.

    Raises:
        RejectedScan: ``colour_unsupported``.
    """
    planes = []
    for colour in ("Red", "Green", "Blue"):
        descriptor = dataset[f"{colour}PaletteColorLookupTableDescriptor"].value
        count, first, bits = _described(descriptor, indices)
        table = _table(dataset, colour, count, bits, big_endian)
        planes.append(_look_up(table, indices, count, first))
    return np.stack(planes, axis=-1)


def apply_modality_table(
    item: Any, stored: npt.NDArray[Any], *, big_endian: bool, inverted: bool
) -> npt.NDArray[np.float32]:
    """Return (rows, columns) values of a ModalityLUTSequence item, mirrored if wanted.

    Raises:
        RejectedScan: ``unreadable`` when the table is shorter than it says.
    """
    count, first, _ = _described(item["LUTDescriptor"].value, stored)
    table = _entries(item["LUTData"].value, True, big_endian)
    if len(table) < count:
        raise RejectedScan(
            "unreadable", f"the table has {len(table)} entries, not as many as it says"
        )
    table = table[:count]
    return _look_up(table.min() + table.max() - table if inverted else table, stored, count, first)


def _described(descriptor: Any, stored: npt.NDArray[Any]) -> tuple[int, int, int]:
    """Return the number of entries, the stored value of the first one, and their bits."""
    count, first, bits = (int(part) for part in descriptor)
    if stored.dtype.kind == "i" and first >= _MAX_ENTRIES // 2:
        first -= _MAX_ENTRIES  # signed, like the pixels
    return count or _MAX_ENTRIES, first, bits


def _look_up(
    table: _Table, stored: npt.NDArray[Any], count: int, first: int
) -> npt.NDArray[np.float32]:
    places = np.clip(stored.astype(np.int64) - first, 0, count - 1)
    return table[places].astype(np.float32)


def _table(dataset: Any, colour: str, count: int, bits: int, big_endian: bool) -> _Table:
    if tag_of(f"{colour}PaletteColorLookupTableData") in dataset:
        content = dataset[f"{colour}PaletteColorLookupTableData"].value
        wide = not isinstance(content, bytes) or len(content) >= 2 * count
        table = _entries(content, wide, big_endian)
    elif tag_of(f"Segmented{colour}PaletteColorLookupTableData") in dataset:
        content = dataset[f"Segmented{colour}PaletteColorLookupTableData"].value
        table = _unfold(_entries(content, bits > 8, big_endian))
    else:
        raise RejectedScan("colour_unsupported", "there is no palette")
    if len(table) < count:
        raise RejectedScan(
            "colour_unsupported", f"the palette has {len(table)} entries, says {count}"
        )
    return table


def _entries(content: Any, wide: bool, big_endian: bool) -> _Table:
    """Return the numbers of a table: words, or bytes that lie two in a word."""
    if not isinstance(content, bytes):
        return np.asarray(content, np.int64)
    words = np.frombuffer(content[: len(content) // 2 * 2], ">u2" if big_endian else "<u2")
    return (words if wide else words.astype("<u2").view(np.uint8)).astype(np.int64)


def _unfold(codes: _Table) -> _Table:
    """Return the entries of a segmented table."""
    table: list[int] = []
    at = 0
    while at + 1 < len(codes):
        kind, length = int(codes[at]), int(codes[at + 1])
        if len(table) + length > _MAX_ENTRIES:
            raise RejectedScan("colour_unsupported", "a segmented palette is too long")
        values = codes[at + 2 : at + 2 + (length if kind == _DISCRETE else 1)].tolist()
        if kind == _DISCRETE:
            table += values
        elif kind == _LINEAR and table and values:
            steps = np.linspace(table[-1], values[0], length + 1)[1:]
            table += np.rint(steps).astype(int).tolist()
        else:
            raise RejectedScan("colour_unsupported", "a palette segment of an unusual kind")
        at += 2 + len(values)
    return np.array(table, np.int64)
