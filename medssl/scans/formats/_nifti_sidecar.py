"""The JSON file that converters write beside a NIfTI file: modality, patient, scanner and site.

Source: BIDS specification, "Metadata fields"; dcm2niix writes the same names.
"""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl.scans.identity import Salt, name_of_scanner, name_of_site

SUFFIX = ".json"
_IMAGE_SUFFIXES = (".nii.gz", ".nii")
_MAX_BYTES = 2**20  # real ones take kilobytes
_MODALITIES = frozenset(
    {
        "BI", "CR", "CT", "DX", "ECHO", "IO", "IVOCT", "IVUS", "MG", "MR", "NM", "OCT", "OP",
        "OPT", "PT", "PX", "RF", "RG", "US", "XA", "XC",
    }
)  # fmt: skip
_MAX_ID_LENGTH = 1024  # DICOM allows 64 characters


@dataclass(frozen=True)
class Sidecar:
    """What was taken from a sidecar; keys only.

    Attributes:
        modality: a DICOM modality, or "".
        patient_key: or "".
        scanner_key, site_key: or "".
        digest: salted, of the whole file; "" when there is none.
        readable: whether it could be read, or is absent.
    """

    modality: str = ""
    patient_key: str = ""
    scanner_key: str = ""
    site_key: str = ""
    digest: str = ""
    readable: bool = True


def _sidecar_of(path: Path) -> Path | None:
    """Return where the sidecar of an image would be; None where its name has no known ending."""
    lower = path.name.lower()
    for suffix in _IMAGE_SUFFIXES:
        if lower.endswith(suffix):
            return path.with_name(path.name[: -len(suffix)] + SUFFIX)
    return None


def belongs_to_image(path: Path) -> bool:
    """Say whether a JSON file lies beside an image of its name."""
    stem = path.name[: -len(SUFFIX)]
    endings = (*_IMAGE_SUFFIXES, *(suffix.upper() for suffix in _IMAGE_SUFFIXES))
    return any(_is_regular(path.with_name(stem + ending)) for ending in endings)


def read_sidecar(path: Path, salt: Salt) -> Sidecar:
    """Read the sidecar of an image, whatever state it is in.

    Args:
        path: of the image.
        salt: turns the patient's name into a key.
    """
    beside = _sidecar_of(path)
    if beside is None or not _is_regular(beside):
        return Sidecar()
    try:
        with beside.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError:
        return Sidecar(readable=False)
    digest = salt.key("file", hashlib.sha256(content).hexdigest())
    if len(content) > _MAX_BYTES:
        return Sidecar(digest=digest, readable=False)
    try:
        values: Any = json.loads(content)
    except (ValueError, RecursionError):  # wrong encoding, wrong syntax, or nested without end
        return Sidecar(digest=digest, readable=False)
    if not isinstance(values, dict):
        return Sidecar(digest=digest, readable=False)
    modality = _text(values.get("Modality")).upper()
    patient = _text(values.get("PatientID"))
    scanner = name_of_scanner(
        _text(values.get("Manufacturer")), _text(values.get("ManufacturersModelName"))
    )
    site = name_of_site(_text(values.get("InstitutionName")))
    return Sidecar(
        modality=modality if modality in _MODALITIES else "",
        patient_key=salt.key("patient", patient) if patient else "",
        scanner_key=salt.key("file", scanner) if scanner else "",
        site_key=salt.key("file", site) if site else "",
        digest=digest,
    )


def _text(value: Any) -> str:
    """Return a name that may have been written as a number; anything else is no name."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return ""
    text = str(value).strip()
    return text if len(text) <= _MAX_ID_LENGTH else ""


def _is_regular(path: Path) -> bool:
    """Say whether there is a file that can be read without waiting for anybody."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:  # absent, a link to itself, or a name too long to exist
        return False
