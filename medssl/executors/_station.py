"""What runs in a Ray worker: one guarded process beside it, so that no item can harm Ray."""

from __future__ import annotations

from collections.abc import Sequence

from medssl import __version__
from medssl.executors._crew import Crew
from medssl.executors._outcomes import pack_error
from medssl.executors.base import Guard


class Station:
    """A Ray actor that applies one packed function to chunks of packed items.

    The function never runs in the Ray worker itself but in a process of `LocalExecutor`'s kind:
    the same limits hold, it is as silent, and it ends with the Ray worker.
    """

    def __init__(self, function: bytes, guard: Guard | None) -> None:
        self._crew = Crew(function, 1, guard)

    def version(self) -> str:
        """Return the version of medssl where this runs; answered once it can begin."""
        return __version__

    def run(self, chunk: Sequence[bytes]) -> list[bytes]:
        """Return the packed outcomes of a chunk, in order."""
        outcomes: list[bytes] = []
        try:
            outcomes.extend(self._crew.map(chunk, chunk_size=len(chunk)))
        except Exception as error:  # noqa: BLE001  (the caller sees it)
            self._crew.close()
            outcomes.extend([pack_error(error)] * (len(chunk) - len(outcomes)))
        return outcomes
