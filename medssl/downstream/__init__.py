"""The downstream tasks, one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medssl.registry import Registry

if TYPE_CHECKING:
    from medssl.downstream.base import DownstreamTask

DOWNSTREAM_TASKS: Registry[DownstreamTask] = Registry(
    "downstream task", "medssl.downstream", "DownstreamTask"
)
