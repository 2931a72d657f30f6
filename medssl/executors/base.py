"""What an executor does: apply a function to many items, in order, and survive bad ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from medssl.config import ComponentConfig

Item = TypeVar("Item")
Result = TypeVar("Result")


class Executor(ABC):
    """Runs plain, picklable work somewhere."""

    def __init__(self, config: ComponentConfig) -> None:
        self.config = config

    @abstractmethod
    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        lost: Callable[[Item], Result] | None = None,
        chunk_size: int | None = None,
    ) -> Iterator[Result]:
        """Yield ``function(item)`` for every item, in the order of the items.

        Args:
            function: picklable; its exceptions reach the caller.
            items: picklable.
            lost: gives the result of an item whose worker process died (killed for memory, crashed
                in a decoder). Without it such a death is a `MachineError`.
            chunk_size: items sent to a worker at once; chosen from their number when absent.

        Raises:
            MachineError: worker processes cannot be started, or one died and ``lost`` is absent.
        """
