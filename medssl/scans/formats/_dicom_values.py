"""Values out of a DICOM data set, as plain Python.

Short ASCII texts and numbers, which nearly all are, are converted here from the bytes that pydicom
found; everything else, and whatever is out of the ordinary, is left to pydicom, ten times slower.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag

_TEXT_VRS = {"CS", "UI", "SH", "LO", "AE", "AS", "IS", "DS"}
_NUMBERS = {
    (vr, little): struct.Struct(("<" if little else ">") + form)
    for vr, form in (("US", "H"), ("SS", "h"), ("UL", "L"), ("SL", "l"), ("FL", "f"), ("FD", "d"))
    for little in (True, False)
}
_TAGS: dict[str, tuple[BaseTag, str]] = {}


def tag_of(keyword: str) -> BaseTag:
    """Return the tag of a keyword of the standard."""
    return _entry(keyword)[0]


def _entry(keyword: str) -> tuple[BaseTag, str]:
    known = _TAGS.get(keyword)
    if known is None:
        number = tag_for_keyword(keyword)
        if number is None:
            raise KeyError(keyword)
        known = _TAGS[keyword] = (BaseTag(number), dictionary_VR(number))
    return known


def value_of(dataset: Any, keyword: str) -> Any:
    """Return a value: None, a text, a number, a list of these, or what pydicom makes of it."""
    tag, usual_vr = _entry(keyword)
    element = dataset.get_item(tag)
    if element is None:
        return None
    if isinstance(element, RawDataElement) and isinstance(element.value, bytes):
        content, vr = element.value, element.VR or usual_vr
        if vr in _TEXT_VRS and content.isascii() and b"\x1b" not in content:
            parts = content.decode("ascii").strip(" \x00").split("\\")
            return parts[0] if len(parts) == 1 else parts
        form = _NUMBERS.get((vr, element.is_little_endian))
        if form is not None and len(content) == form.size:
            return form.unpack(content)[0]
    return dataset.get(keyword)


def text(dataset: Any, keyword: str) -> str:
    """Return a value as text without outer blanks; "" when absent."""
    value = value_of(dataset, keyword)
    if value is None:
        return ""
    if hasattr(value, "__iter__") and not isinstance(value, (str, bytes)):
        return "\\".join(map(str, value))
    return str(value).strip()


def words(dataset: Any, keyword: str) -> list[str]:
    """Return the words of a value in capitals."""
    value: Any = value_of(dataset, keyword) or []
    values = [value] if isinstance(value, str) else list(value)
    return [str(part).strip().upper() for part in values]


def number(dataset: Any, keyword: str, default: float) -> float:
    """Return a value as a number, which may be NaN; raise ValueError when it is none."""
    value = value_of(dataset, keyword)
    return default if value is None or value == "" else float(value)


def integer(dataset: Any, keyword: str, default: int) -> int:
    """Return a value as a whole number; raise ValueError when it is none."""
    value = value_of(dataset, keyword)
    if value is None or value == "":
        return default
    found = float(value)
    if not found.is_integer():
        raise ValueError(keyword)
    return int(found)


def numbers(dataset: Any, keyword: str, count: int) -> list[float] | None:
    """Return exactly so many numbers, or None when the value is absent or of another length."""
    value = value_of(dataset, keyword)
    if value is None or isinstance(value, (str, int, float)) or len(value) != count:
        return None
    if any(part == "" or part is None for part in value):
        return None
    return [float(part) for part in value]


def plain(dataset: Any, keyword: str) -> float | None:
    """Return a finite number, or None."""
    value = value_of(dataset, keyword)
    try:
        found = float(value) if value is not None and value != "" else None
    except (TypeError, ValueError):
        return None
    return found if found is not None and math.isfinite(found) else None


def items(dataset: Any, keyword: str) -> list[Any]:
    """Return the items of a sequence; none when it is absent or no sequence."""
    value: Any = dataset.get(keyword) if dataset is not None else None
    return list(value) if hasattr(value, "__iter__") and not isinstance(value, (str, bytes)) else []


def item(dataset: Any, keyword: str) -> Any:
    """Return the first item of a sequence, or None."""
    found = items(dataset, keyword)
    return found[0] if found else None


def finite_or(value: float, default: float) -> float:
    """Return the value, or the default when it is not finite."""
    return value if math.isfinite(value) else default
