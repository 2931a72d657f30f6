"""Decoded scans in memory: one cache for a process and all workers that it forks.

The memory is anonymous and shared, so workers hold no copies. Where each scan will lie is fixed
before the first read; the pages are taken from the machine when a scan is first written to them.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from medssl.errors import MachineError
from medssl.scans.store import Entry

Array = npt.NDArray[Any]

_ALIGNMENT = 64
"""Bytes: a line of the processor's cache."""

Slot = tuple[str, str | None]
"""A scan's key, and the name of a mask or None for the image."""


class ScanCache:
    """Slots for as many scans as fit, first come first served in the order given.

    Two processes may decode the same scan at once; they write the same bytes.

    Args:
        entries: which scans, in the order in which they get a place.
        mask: name of the mask that is held beside each image.
        budget_bytes: memory for images and masks together.

    Raises:
        MachineError: the machine does not grant that much memory.
    """

    def __init__(self, entries: Sequence[Entry], mask: str | None, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._slots: dict[Slot, tuple[int, int, tuple[int, ...], type]] = {}
        self.num_bytes = 0
        for entry in entries:
            parts: list[tuple[Slot, tuple[int, ...], type]] = [
                ((entry.scan_key, None), (entry.channels, *entry.shape), np.float16)
            ]
            if mask is not None:
                parts.append(((entry.scan_key, mask), entry.shape, np.uint8))
            sizes = [_aligned(shape, kind) for _, shape, kind in parts]
            if self.num_bytes + sum(sizes) > budget_bytes:
                continue
            for (slot, shape, kind), size in zip(parts, sizes, strict=True):
                self._slots[slot] = (len(self._slots), self.num_bytes, shape, kind)
                self.num_bytes += size
        self._allocate()

    def __len__(self) -> int:
        return len(self._slots)

    def __getstate__(self) -> dict[str, Any]:
        left = {"_memory", "_filled", "_lock", "_views"}
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._allocate()

    @property
    def num_filled(self) -> int:
        """Images and masks that have been decoded so far, by any process."""
        return int(self._filled.sum())

    def get(self, scan_key: str, mask: str | None, decode: Callable[[], Array]) -> Array | None:
        """Return an image or mask, decoded where no process has done so; None if it has no place.

        Args:
            scan_key: which scan.
            mask: which mask, or None for the image.
            decode: returns the whole image, (C, *S) float16, or the whole mask, (*S) uint8.

        Returns:
            A view on the shared memory, not to be written to.
        """
        name = (scan_key, mask)
        if name in self._views:
            return self._views[name]
        if name not in self._slots:
            return None
        number, start, shape, kind = self._slots[name]
        count = int(np.prod(shape))
        whole: Array = np.frombuffer(self._memory, kind, count, start).reshape(shape)
        filled = self._filled[number]
        self._fence()
        if not filled:
            whole[...] = decode()
            self._fence()
            self._filled[number] = 1
        whole.flags.writeable = False
        self._views[name] = whole
        return whole

    def _allocate(self) -> None:
        try:
            self._memory = mmap.mmap(-1, max(self.num_bytes, 1))
            self._filled = np.frombuffer(mmap.mmap(-1, max(len(self._slots), 1)), np.uint8)
        except (OSError, ValueError):
            raise MachineError(
                f"{self.num_bytes / 1e9:.1f} GB of memory for decoded scans cannot be had. "
                "Lower training.cache_gb; scans that do not fit are read crop by crop."
            ) from None
        self._lock = Lock()
        self._views: dict[Slot, Array] = {}  # what this process has seen filled

    def _fence(self) -> None:
        """Keep bytes and flag in order also on processors that reorder memory (ARM).

        What comes before the first release stays before it, what comes after the second acquire
        stays after it.
        """
        for _ in range(2):
            with self._lock:
                pass


def _aligned(shape: Sequence[int], kind: type) -> int:
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT
