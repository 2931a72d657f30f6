"""The inits (a backbone's starting weights), one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medssl.registry import Registry

if TYPE_CHECKING:
    from medssl.models.inits.base import Init

INITS: Registry[Init] = Registry("init", "medssl.models.inits", "Init")
