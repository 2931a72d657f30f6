"""Running statistics of a step with several micro batches: their mean, whoever computed them.

A batch norm updates its running statistics at every forward pass. Over the micro batches of a
step, in turns on one process or at once on several, each starts from the step's own statistics
here, and the step ends with the mean of what they found: so the number of processes changes
nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medssl.training.distributed import Ranks


class StepBuffers:
    """The buffers of a network, over the micro batches of one step.

    Counters (of batches seen) count steps.

    Args:
        network: whose buffers to watch.
        ranks: the processes.
        micro_batches: of a step, over all processes. With one there is nothing to do.
    """

    def __init__(self, network: nn.Module, ranks: Ranks, micro_batches: int) -> None:
        buffers = list(network.buffers()) if micro_batches > 1 else []
        self._buffers = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._counters = [buffer for buffer in buffers if not buffer.is_floating_point()]
        self._ranks, self._micro_batches = ranks, micro_batches
        self._before: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._counted: list[Tensor] = []

    def begin(self) -> None:
        """Note the statistics that a step starts from."""
        if self._buffers:
            self._before = [buffer.clone() for buffer in [*self._buffers, *self._counters]]
            self._sums = [torch.zeros_like(buffer) for buffer in self._buffers]

    def after_micro_batch(self) -> None:
        """Gather what a micro batch found, and go back to the step's start."""
        if self._buffers:
            torch._foreach_add_(self._sums, self._buffers)
            self._counted = [counter.clone() for counter in self._counters]
            torch._foreach_copy_([*self._buffers, *self._counters], self._before)

    def end(self) -> None:
        """Set the mean over all micro batches of all processes."""
        if self._buffers:
            flat = self._ranks.sum(torch.cat([each.flatten() for each in self._sums]))
            parts = (flat / self._micro_batches).split([each.numel() for each in self._sums])
            for buffer, part in zip(self._buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))
            for counter, counted in zip(self._counters, self._counted, strict=True):
                counter.copy_(counted)
