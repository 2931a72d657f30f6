"""What an executor does: apply a function to many items, in order, and survive bad ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from medssl.config import ComponentConfig

Item = TypeVar("Item")
Result = TypeVar("Result")

Loss = Literal["too_slow", "out_of_memory", "died"]
"""How the worker that had an item was lost: over its time, over its memory, or in a crash."""


@dataclass(frozen=True)
class Guard:
    """What one item may cost its worker before the worker is ended.

    Attributes:
        seconds: for one item; more ends it as ``too_slow``.
        megabytes: that the worker's memory may grow beyond what it holds at its start; more ends
            the item as ``out_of_memory``. None: no limit.
    """

    seconds: float
    megabytes: int | None = None


class Executor(ABC):
    """Runs plain, picklable work somewhere."""

    def __init__(self, config: ComponentConfig) -> None:
        self.config = config

    @abstractmethod
    def map(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        lost: Callable[[Item, Loss], Result] | None = None,
        guard: Guard | None = None,
        chunk_size: int = 1,
    ) -> Iterator[Result]:
        """Yield ``function(item)`` for every item, in the order of the items.

        Args:
            function: picklable; its exceptions reach the caller.
            items: picklable; read as they are needed, so that a stream of any length takes no more
                memory than what is in flight.
            lost: gives the result of an item that cost its worker more than the guard allows, or
                whose worker died (crashed in a decoder, killed for memory). It costs no other item
                its result. Without it such a loss is a `MachineError`.
            guard: what one item may cost; None: no limit.
            chunk_size: items sent to a worker at once.

        Raises:
            MachineError: workers cannot be started, or one was lost and ``lost`` is absent.
        """
