"""The formats in which pretrained weights leave medssl, one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medssl.registry import Registry

if TYPE_CHECKING:
    from medssl.models.export.base import Export

EXPORTS: Registry[Export] = Registry("export format", "medssl.models.export", "Export")
