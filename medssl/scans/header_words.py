"""What files say of their pixels, in words: only facts that name no person."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from medssl.scans.formats.base import Header

_PHOTOMETRICS = {
    "MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT",
    "YBR_RCT", "YBR_PARTIAL_420",
}  # fmt: skip
_MOST_VALUES = 4  # of one fact in one series


def words_of(headers: Sequence[Header]) -> dict[str, str]:
    """Return facts on which the files of a scan agree, or the values that occur.

    Only facts of this list are told, and only values of the expected kind: a file may hold anything
    anywhere.
    """
    told = {}
    for name, (label, told_as) in _FACTS.items():
        values = dict.fromkeys(
            text for header in headers if (text := told_as(header.facts.get(name)))
        )
        if values:
            more = len(values) - _MOST_VALUES
            shown = list(values)[:_MOST_VALUES]
            told[label] = "; ".join(shown) + (f"; and {more} more" if more > 0 else "")
    return told


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _numbers(separator: str) -> Callable[[Any], str]:
    def told(value: Any) -> str:
        parts = [_number(part) for part in value] if isinstance(value, (list, tuple)) else []
        return separator.join(parts) if all(parts) else ""

    return told


def _several(value: Any) -> str:
    return _number(value) if value != 1 else ""


def _bits(value: Any) -> str:
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        return ""
    allocated, stored = map(_number, value[:2])
    return f"{stored} of {allocated}" if allocated and stored else ""


def _signed(value: Any) -> str:
    return {0: "unsigned", 1: "signed"}.get(value, "") if isinstance(value, int) else ""


def _photometric(value: Any) -> str:
    return value if isinstance(value, str) and value in _PHOTOMETRICS else ""


def _rescale(value: Any) -> str:
    told = _numbers(", ")(value)
    return "" if told == "1, 0" else told


_FACTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "columns": ("columns", _number),
    "rows": ("rows", _number),
    "num_frames": ("frames", _several),
    "shape": ("shape", _numbers(" × ")),
    "channels": ("channels", _several),
    "num_channels": ("channels", _several),
    "spacing_mm": ("spacing of rows and columns, mm", _numbers(" × ")),
    "thickness_mm": ("slice thickness, mm", _number),
    "orientation": ("direction of rows and columns, LPS", _numbers(", ")),
    "photometric": ("photometric interpretation", _photometric),
    "bits": ("bits stored", _bits),
    "signed": ("stored values", _signed),
    "rescale": ("rescale slope and intercept", _rescale),
    "temporal_position": ("temporal position", _number),
    "b_value": ("b-value, s/mm²", _number),
    "acquisition": ("acquisition", _number),
}
