"""The pretext tasks, one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medssl.registry import Registry

if TYPE_CHECKING:
    from medssl.pretext.base import PretextTask

PRETEXT_TASKS: Registry[PretextTask] = Registry("pretext task", "medssl.pretext", "PretextTask")
