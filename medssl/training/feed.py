"""Crops for the steps still to do, on the device."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch.utils.data import DataLoader

from medssl.training.interruption import leave_signals_to_the_trainer
from medssl.training.settings import TrainingConfig
from medssl.transforms.sampling import CropSampler, Sample, Share


def feed(
    sampler: CropSampler,
    start: int,
    stop: int,
    share: Share,
    config: TrainingConfig,
    device: torch.device,
) -> Generator[Sample, None, None]:
    """Yield the crops of the steps still to do, read by workers where configured."""
    loader: DataLoader[Sample] = DataLoader(
        sampler.as_dataset(start, stop, share),
        batch_size=None,
        shuffle=False,
        num_workers=config.num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_trainer,
    )
    for sample in loader:
        yield sample.to(device, non_blocking=True)
