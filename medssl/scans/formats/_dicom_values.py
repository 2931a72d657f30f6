"""Values out of a DICOM data set, as plain Python."""

from __future__ import annotations

import math
from typing import Any


def text(dataset: Any, keyword: str) -> str:
    """Return a value as text without outer blanks; "" when absent."""
    value = dataset.get(keyword)
    return "" if value is None else str(value).strip()


def image_type(dataset: Any) -> list[str]:
    """Return the words of ImageType in capitals."""
    value = dataset.get("ImageType") or []
    values = [value] if isinstance(value, str) else list(value)
    return [str(part).strip().upper() for part in values]


def number(dataset: Any, keyword: str, default: float) -> float:
    """Return a value as a number, which may be NaN; raise ValueError when it is none."""
    value = dataset.get(keyword)
    return default if value is None or value == "" else float(value)


def numbers(dataset: Any, keyword: str, count: int) -> list[float] | None:
    """Return exactly so many numbers, or None when the value is absent or of another length."""
    value = dataset.get(keyword)
    if value is None or value == "" or isinstance(value, (str, float)) or len(value) != count:
        return None
    return [float(part) for part in value]


def plain(dataset: Any, keyword: str) -> float | None:
    """Return a finite number, or None."""
    value = dataset.get(keyword)
    if value is None or value == "" or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def finite_or(value: float, default: float) -> float:
    """Return the value, or the default when it is not finite."""
    return value if math.isfinite(value) else default
