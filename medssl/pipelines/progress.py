"""How a pipeline tells how far it is; the command line shows it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives how far a stage is."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Report ``done`` of ``total`` (0: not known) of a stage; ``note``: the latest figures."""


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Report nothing."""
