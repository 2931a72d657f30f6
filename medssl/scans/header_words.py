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
_IMPLAUSIBLE = "implausible"
_MOST_BITS = 64
_MOST_SIZE = 2**16
_MOST_FRAMES = 2**20
_MOST_MM = 1e4
_MOST_COUNT = 10**6
_MOST_INTENSITY = 1e6


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


def _number(most: float) -> Callable[[Any], str]:
    """Return what tells a number; one beyond all that is plausible may be anything, a name too."""

    def told(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return ""
        if not math.isfinite(value):
            return ""
        if abs(value) > most:
            return _IMPLAUSIBLE
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return told


def _numbers(separator: str, most: float) -> Callable[[Any], str]:
    one = _number(most)

    def told(value: Any) -> str:
        parts = [one(part) for part in value] if isinstance(value, (list, tuple)) else []
        return separator.join(parts) if all(parts) else ""

    return told


def _several(most: float) -> Callable[[Any], str]:
    one = _number(most)
    return lambda value: one(value) if value != 1 else ""


def _bits(value: Any) -> str:
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        return ""
    allocated, stored = map(_number(_MOST_BITS), value[:2])
    return f"{stored} of {allocated}" if allocated and stored else ""


def _signed(value: Any) -> str:
    return {0: "unsigned", 1: "signed"}.get(value, "") if isinstance(value, int) else ""


def _photometric(value: Any) -> str:
    return value if isinstance(value, str) and value in _PHOTOMETRICS else ""


def _rescale(value: Any) -> str:
    told = _numbers(", ", _MOST_INTENSITY)(value)
    return "" if told == "1, 0" else told


_FACTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "columns": ("columns", _number(_MOST_SIZE)),
    "rows": ("rows", _number(_MOST_SIZE)),
    "num_frames": ("frames", _several(_MOST_FRAMES)),
    "shape": ("shape", _numbers(" × ", _MOST_SIZE)),
    "channels": ("channels", _several(_MOST_SIZE)),
    "num_channels": ("channels", _several(_MOST_SIZE)),
    "spacing_mm": ("spacing of rows and columns, mm", _numbers(" × ", _MOST_MM)),
    "thickness_mm": ("slice thickness, mm", _number(_MOST_MM)),
    "orientation": ("direction of rows and columns, LPS", _numbers(", ", 1.01)),
    "photometric": ("photometric interpretation", _photometric),
    "bits": ("bits stored", _bits),
    "signed": ("stored values", _signed),
    "rescale": ("rescale slope and intercept", _rescale),
    "temporal_position": ("temporal position", _number(_MOST_COUNT)),
    "b_value": ("b-value, s/mm²", _number(_MOST_COUNT)),
    "acquisition": ("acquisition", _number(_MOST_COUNT)),
}
