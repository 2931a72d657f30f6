"""Decode the pixels of a DICOM file, frame by frame, to the values they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.encaps import generate_fragments
from pydicom.pixels.decoders.base import get_decoder

from medssl.errors import RejectedScan
from medssl.scans.formats._codestream import HEAD_BYTES, check_frames
from medssl.scans.formats._dicom_parse import Parsed
from medssl.scans.formats._dicom_tables import apply_modality_table, apply_palette
from medssl.scans.formats._dicom_values import item, tag_of

FLOAT_PIXELS = ("FloatPixelData", "DoubleFloatPixelData")
PIXEL_TAGS = [
    int(tag_of(keyword))
    for keyword in (
        *FLOAT_PIXELS, "PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
    )
]  # fmt: skip


def decode_frames(
    parsed: Parsed,
    facts: dict[str, Any],
    frames: Sequence[int],
    rescale: Sequence[Sequence[float]],
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield each frame as (C, X, Y), X along a row.

    Args:
        parsed: the whole file.
        facts: of the file.
        frames: numbers from 0.
        rescale: slope and intercept of each of these frames.

    Raises:
        RejectedScan: ``unreadable``, ``colour_unsupported``, or ``nan_voxels``.
    """
    try:
        for pixels, (slope, intercept) in zip(_stored(parsed, facts, frames), rescale, strict=True):
            values = _values(parsed, facts, pixels, slope, intercept)
            if not np.isfinite(values).all():
                raise RejectedScan("nan_voxels", "some voxels are not finite")
            yield values.T[np.newaxis] if values.ndim == 2 else values.transpose(2, 1, 0)
    except (RejectedScan, MemoryError):
        raise
    except Exception:  # noqa: BLE001  (decoders fail in any way; their words may hold values)
        raise RejectedScan("unreadable", "the pixels cannot be decoded") from None


def _stored(
    parsed: Parsed, facts: dict[str, Any], frames: Sequence[int]
) -> Iterator[npt.NDArray[Any]]:
    """Yield the stored values, (rows, columns) or (rows, columns, 3) RGB, without unused bits."""
    allocated, stored, high = facts["bits"]
    floating = any(tag_of(keyword) in parsed.dataset for keyword in FLOAT_PIXELS)
    shift, unused = allocated - 1 - high, allocated - stored
    # pydicom takes the lowest bits for the stored ones, which they are in nearly all files.
    by_hand = shift != unused and not parsed.syntax.is_compressed and not floating
    options: dict[str, Any] = {
        "bits_stored": stored,
        "number_of_frames": facts["num_frames"],
        "samples_per_pixel": facts["samples"],
    }
    if not floating:
        options["pixel_representation"] = facts["signed"]
    if facts["samples"] > 1:
        options["planar_configuration"] = facts["planar"]
    if by_hand:
        options["correct_unused_bits"] = False
    if parsed.syntax.is_compressed:
        # pydicom lays out what a decoder returns as the header says, whatever the frame says.
        fragments = islice(generate_fragments(parsed.dataset.PixelData), 1, None)
        check_frames((fragment[:HEAD_BYTES] for fragment in fragments), facts)
    decoder = get_decoder(parsed.syntax)
    for pixels, properties in decoder.iter_array(parsed.dataset, indices=list(frames), **options):
        if facts["samples"] == 3 and str(properties["photometric_interpretation"]) != "RGB":
            raise RejectedScan("colour_unsupported", "the colours cannot be converted to RGB")
        if by_hand:
            pixels = np.right_shift(np.left_shift(pixels, shift), unused)
        if pixels.shape[:2] != (facts["rows"], facts["columns"]):
            raise RejectedScan("unreadable", "a frame is not of the size its header says")
        yield pixels


def _values(
    parsed: Parsed, facts: dict[str, Any], pixels: npt.NDArray[Any], slope: float, intercept: float
) -> npt.NDArray[np.float32]:
    dataset = parsed.dataset
    if facts["photometric"] == "PALETTE COLOR":
        return apply_palette(dataset, pixels, big_endian=parsed.big_endian)
    if facts["channels"] == 3:
        return np.asarray(pixels, np.float32)
    table = item(dataset, "ModalityLUTSequence") if facts["tables"] else None
    if table is not None:
        return apply_modality_table(
            table, pixels, big_endian=parsed.big_endian, inverted=facts["inverted"]
        )
    values = pixels.astype(np.float64)
    if facts["inverted"]:
        values = _range_sum(facts, pixels) - values
    return np.asarray(values * slope + intercept, np.float32)


def _range_sum(facts: dict[str, Any], pixels: npt.NDArray[Any]) -> float:
    """Return the lowest plus the highest value that can be stored."""
    if pixels.dtype.kind == "f":
        return 0.0
    stored = facts["bits"][1]
    return -1.0 if facts["signed"] else 2.0**stored - 1.0


def over_float32(block: bytes | memoryview, facts: dict[str, Any], big_endian: bool) -> bool:
    """Whether whole numbers of more than 24 bits are stored, which float32 cannot hold exactly."""
    size = facts["bits"][0] // 8
    kind = ("i" if facts["signed"] else "u") + str(size)
    count = len(block) // size
    values = np.frombuffer(block, np.dtype((">" if big_endian else "<") + kind), count)
    return bool(count) and (int(values.max()) > 2**24 or int(values.min()) < -(2**24))
