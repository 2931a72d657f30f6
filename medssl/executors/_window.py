"""Answers in the order of the questions, with a bounded number of them open."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

AHEAD = 8
"""Chunks read ahead of the result that is waited for, per worker."""


@dataclass
class Job:
    """One packed item.

    Attributes:
        index: its place among the items.
        packed: the item.
        deaths: of workers that had it.
    """

    index: int
    packed: bytes
    deaths: int = 0


def in_order(
    items: Iterable[bytes],
    window: int,
    todo: deque[Job],
    done: dict[int, bytes],
    turn: Callable[[bool], None],
) -> Iterator[bytes]:
    """Yield the outcome of each item, in order.

    Args:
        items: read only when fewer than ``window`` of them are read and not yet answered.
        window: items.
        todo: where items are put, for ``turn`` to hand out.
        done: where ``turn`` puts outcomes, by the index of their item.
        turn: hands out and collects; waits for an outcome when it is given True.
    """
    source = iter(items)
    index = num_read = 0
    exhausted = False
    while True:
        while not exhausted and num_read < index + window:
            try:
                todo.append(Job(num_read, next(source)))
                num_read += 1
            except StopIteration:
                exhausted = True
        if exhausted and index == num_read:
            return
        turn(index not in done)
        if index in done:
            yield done.pop(index)
            index += 1
