"""A batch of crops, and which of a step's batches one process computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from medssl.errors import ConfigError, MachineError


@dataclass
class Sample:
    """A batch of crops.

    Attributes:
        images: (B, C, *S) float32 in [0, 1].
        masks: (B, *S) int64, or None when the request names no mask.
        scan_keys: the scan of each crop.
        rejected: crops thrown away for too little foreground while this batch was made.
        step: number of the batch in its stream; of the optimiser's step, where one process
            computes the batch in several micro batches.
        part: number of the micro batch within the step.
        spacing_mm: of each crop, along its spatial axes.
    """

    images: Tensor
    masks: Tensor | None
    scan_keys: list[str] = field(default_factory=list)
    rejected: int = 0
    step: int = 0
    part: int = 0
    spacing_mm: list[tuple[float, ...]] = field(default_factory=list)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Sample:
        """Return the batch on a device."""
        masks = self.masks
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            masks=None if masks is None else masks.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Sample:
        """Return the batch in page-locked memory; DataLoader calls this."""
        masks = None if self.masks is None else self.masks.pin_memory()
        return replace(self, images=self.images.pin_memory(), masks=masks)

    def share_memory(self) -> Sample:
        """Return the batch in memory that other processes can map: how a worker hands it over.

        Raises:
            MachineError: there is not enough shared memory.
        """
        try:
            for tensor in (self.images, self.masks):
                if tensor is not None:
                    tensor.share_memory_()
        except (OSError, RuntimeError):
            raise MachineError(
                f"a batch of {self.images.nbytes / 1e6:.1f} MB finds no place in shared memory "
                "(/dev/shm), where workers leave it. Lower training.num_workers or "
                "training.prefetch_factor, or give a container more (docker run --shm-size)."
            ) from None
        return self


@dataclass(frozen=True)
class Share:
    """Which part of every global batch one process computes.

    The global batch of a step is ``num_micro_batches`` micro batches of one size; rank r of n
    computes numbers r, r + n, r + 2n, ...

    Attributes:
        global_batch_size: crops of one step, over all processes.
        num_micro_batches: over all processes.
        rank: which process this is.
        num_ranks: how many there are.

    Raises:
        ConfigError: the numbers do not divide, so that processes would have unequal work.
    """

    global_batch_size: int
    num_micro_batches: int = 1
    rank: int = 0
    num_ranks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise ConfigError(f"there is no rank {self.rank} among {self.num_ranks} processes.")
        if self.num_micro_batches < 1 or self.global_batch_size % self.num_micro_batches:
            raise ConfigError(
                f"training.global_batch_size: {self.global_batch_size} images do not divide into "
                f"{self.num_micro_batches} equal micro batches. "
                f"Take a multiple of {self.num_micro_batches}."
            )
        if self.num_micro_batches % self.num_ranks:
            raise ConfigError(
                f"{self.num_micro_batches} micro batches do not divide among {self.num_ranks} "
                f"processes. Take a multiple of {self.num_ranks}."
            )

    @property
    def micro_batch_size(self) -> int:
        """Crops of one micro batch."""
        return self.global_batch_size // self.num_micro_batches

    @property
    def parts(self) -> range:
        """Numbers of the micro batches that this process computes in each step."""
        return range(self.rank, self.num_micro_batches, self.num_ranks)


class Batches(Dataset[Sample]):
    """The micro batches that one process computes in some steps, in order.

    Args:
        batch: makes batch number n of some size.
        start: first step.
        stop: the step after the last.
        share: which micro batches.
    """

    def __init__(
        self, batch: Callable[[int, int], Sample], start: int, stop: int, share: Share
    ) -> None:
        self.batch, self.start, self.stop, self.share = batch, start, stop, share

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * len(self.share.parts)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        steps, number = divmod(index, len(self.share.parts))
        step, part = self.start + steps, self.share.parts[number]
        micro_batch = step * self.share.num_micro_batches + part
        return replace(self.batch(micro_batch, self.share.micro_batch_size), step=step, part=part)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))
