"""The protocols (how an init's worth is measured on a downstream task), one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medssl.registry import Registry

if TYPE_CHECKING:
    from medssl.evaluation.protocols.base import Protocol

PROTOCOLS: Registry[Protocol] = Registry("protocol", "medssl.evaluation.protocols", "Protocol")
