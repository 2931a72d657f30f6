"""The executors (where work runs), one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medssl.registry import Registry

if TYPE_CHECKING:
    from medssl.executors.base import Executor

EXECUTORS: Registry[Executor] = Registry("executor", "medssl.executors", "Executor")
