"""What became of one item, packed for the way from a worker to the caller."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from medssl.errors import MachineError
from medssl.executors.base import Loss

Item = TypeVar("Item")
Result = TypeVar("Result")

_REMEDIES: dict[Loss, str] = {
    "too_slow": "one item took longer than the time it is allowed, so its worker process was "
    "ended. Start the same command again with more time for an item.",
    "out_of_memory": "one item needed more memory than it is allowed or than the machine has. "
    "Free memory, allow more for an item, or give fewer workers (num_workers), and start the same "
    "command again: it resumes.",
    "died": "a worker process died, most often for lack of memory. Free memory or give fewer "
    "workers (num_workers), and start the same command again: it resumes.",
}


def pack_result(value: object) -> bytes:
    """Pack what the function returned."""
    return pickle.dumps(("result", value), pickle.HIGHEST_PROTOCOL)


def pack_loss(loss: Loss) -> bytes:
    """Pack how an item was lost."""
    return pickle.dumps((loss, None), pickle.HIGHEST_PROTOCOL)


def pack_error(error: BaseException) -> bytes:
    """Pack what the function raised, with a note of the lines of code it passed through.

    An exception that does not survive packing becomes a `RuntimeError` that names its type.
    """
    lines = "".join(traceback.format_tb(error.__traceback__))
    error.add_note(f"In a worker process:\n{lines}")
    try:
        packed = pickle.dumps(("error", error), pickle.HIGHEST_PROTOCOL)
        pickle.loads(packed)  # noqa: S301  (our own bytes)
    except Exception:  # noqa: BLE001  (an exception class may fail in any way when rebuilt)
        told = RuntimeError(
            f"a worker process raised {type(error).__name__}, which cannot be sent to this one. "
            "Set num_workers: 0 to see it where it is raised."
        )
        told.add_note(f"In a worker process:\n{lines}")
        packed = pickle.dumps(("error", told), pickle.HIGHEST_PROTOCOL)
    return packed


def settle(item: Item, packed: bytes, lost: Callable[[Item, Loss], Result] | None) -> Result:
    """Turn a packed outcome into what `Executor.map` gives for the item.

    Raises:
        MachineError: the item was lost, and ``lost`` is absent.
        Exception: whatever the function raised.
    """
    kind, value = pickle.loads(packed)  # noqa: S301  (from our own worker)
    if kind == "result":
        result: Result = value
        return result
    if kind == "error":
        raise value
    return settle_loss(item, kind, lost)


def settle_loss(item: Item, loss: Loss, lost: Callable[[Item, Loss], Result] | None) -> Result:
    """Return the result of a lost item, or say what to do about it."""
    if lost is None:
        raise MachineError(_REMEDIES[loss]) from None
    return lost(item, loss)


def unpack_function(packed: bytes) -> Callable[[Any], Any]:
    """Return the function that a worker was given."""
    function: Callable[[Any], Any] = pickle.loads(packed)  # noqa: S301  (from our own parent)
    return function
