"""The backbone families, one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medssl.registry import Registry

if TYPE_CHECKING:
    from medssl.models.backbones.base import Backbone

BACKBONES: Registry[Backbone] = Registry("backbone", "medssl.models.backbones", "Backbone")
