"""Means of loss and metrics, gathered on the device and read rarely."""

from __future__ import annotations

import torch
from torch import Tensor

from medssl.training.distributed import Ranks


class Meter:
    """Means of loss and metrics, over all processes.

    Args:
        ranks: the processes; every one must read at the same steps.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks()
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._losses: list[Tensor] = []

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the values of one batch; nothing is copied to the host.

        A metric that a batch leaves undefined (NaN: no labelled class in it) is passed over. The
        loss never is.
        """
        for name, value in values.items():
            number = value.detach().float()
            if name == "loss":
                self._losses.append(number)
            counted = torch.ones_like(number) if name == "loss" else (~number.isnan()).float()
            number = torch.where(counted > 0, number, 0)
            self._sums[name] = self._sums.get(name, torch.zeros_like(number)) + number
            self._counts[name] = self._counts.get(name, torch.zeros_like(number)) + counted

    def read(self) -> dict[str, float]:
        """Return the means since the last reading: the one place that waits for the device."""
        self._losses = []
        if not self._sums:
            return {}
        both = torch.stack([*self._sums.values(), *self._counts.values()])
        sums, counts = self._ranks.sum(both).chunk(2)
        means = dict(zip(self._sums, (sums / counts).tolist(), strict=True))
        self._sums, self._counts = {}, {}
        return means

    def finite(self) -> list[bool]:
        """Return of each loss since the last reading, in this process, whether it is finite."""
        if not self._losses:
            return []
        found: list[bool] = torch.stack(self._losses).isfinite().tolist()
        return found
