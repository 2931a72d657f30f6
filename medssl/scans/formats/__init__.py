"""The scan formats, one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medssl.registry import Registry

if TYPE_CHECKING:
    from medssl.scans.formats.base import ScanFormat

FORMATS: Registry[ScanFormat] = Registry("scan format", "medssl.scans.formats", "ScanFormat")
