"""Validation of a pretext task: the same puzzles every time, from patients it never trains on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from medssl.pretext.base import PretextBatch, PretextTask
from medssl.randomness import torch_generator
from medssl.training.devices import autocast
from medssl.training.meter import Meter
from medssl.training.settings import TrainingConfig
from medssl.transforms.sampling import CropSampler

BASELINE_VOXELS = 2**20
"""Of images after which no more of them are given to answers that need no network."""


@dataclass(frozen=True)
class Scores:
    """What one validation found.

    Attributes:
        metrics: means over the puzzles, with the prefixes of `PretextTask.parts`.
        confusions: for each part that classifies, by its prefix, how often each class was answered
            with each: (true, answered).
    """

    metrics: dict[str, float]
    confusions: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ValidationPuzzles:
    """Puzzles that are a function of the seed alone.

    Attributes:
        task: makes and scores them.
        sampler: of validation patients.
        num_batches: batches of images.
        training: batch size and precision.
        seed: of the puzzles.
        device: where to compute.
    """

    task: PretextTask
    sampler: CropSampler
    num_batches: int
    training: TrainingConfig
    seed: int
    device: torch.device

    def batches(self, number: int) -> list[PretextBatch]:
        """Return the puzzles made of batch ``number`` of the images, one of each kind."""
        sample = self.sampler.batch(number, self.training.global_batch_size).to(self.device)
        generator = torch_generator(self.seed, "validation puzzle", number, device=self.device)
        return self.task.puzzles(sample, generator)

    def score(self, network: nn.Module) -> Scores:
        """Return metrics, confusion matrices, and what the task says of the training itself."""
        meter = Meter()
        sums: dict[str, Tensor] = {}
        for batch, output in self._answers(network):
            meter.add({"loss": self.task.loss(output, batch), **self.task.metrics(output, batch)})
            confusion = self.task.confusion(output, batch)
            if confusion is not None:
                sums[batch.task] = sums.get(batch.task, torch.zeros_like(confusion)) + confusion
        meter.add(self.task.diagnostics(network, self.batches(0)))
        prefixes = {part.name: prefix for prefix, part in self.task.parts().items()}
        return Scores(meter.read(), {prefixes[name]: sums[name].cpu() for name in sums})

    def baselines(self) -> dict[str, float]:
        """Return how well answers do that need no network; means over batches.

        Asked of every batch, or, as some of these answers are slow, of the first ones up to
        `BASELINE_VOXELS` of images.
        """
        meter, seen = Meter(), 0
        for number in range(self.num_batches):
            for batch in self.batches(number):
                found = self.task.baselines(batch)
                meter.add({name: torch.tensor(value) for name, value in found.items()})
                seen += batch.inputs.numel()
            if seen >= BASELINE_VOXELS:
                break
        return meter.read()

    def examples(self, network: nn.Module) -> list[tuple[PretextBatch, Any]]:
        """Return puzzles of the first batch of images, with answers, for pictures."""
        network.eval()
        with torch.no_grad(), autocast(self.training, self.device):
            return [(batch, network(batch)) for batch in self.batches(0)]

    def _answers(self, network: nn.Module) -> Iterator[tuple[PretextBatch, Any]]:
        network.eval()
        for number in range(self.num_batches):
            for batch in self.batches(number):
                with torch.no_grad(), autocast(self.training, self.device):
                    output = network(batch)
                with torch.no_grad():  # scores are taken in float32
                    yield batch, output
