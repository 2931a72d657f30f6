"""One optimiser step: from crops on the device to new weights, and nothing that waits for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from medssl.randomness import derive_seed, torch_generator
from medssl.training.buffers import StepBuffers
from medssl.training.devices import autocast, seeded_layers
from medssl.training.distributed import Ranks, parallel
from medssl.training.meter import Meter
from medssl.training.network import Objective
from medssl.training.optimization import set_learning_rates
from medssl.training.settings import TrainingConfig
from medssl.training.state import TrainingState
from medssl.transforms.augmentation import AugmentationConfig, augment
from medssl.transforms.sampling import Sample


@dataclass(frozen=True)
class Used:
    """What is remembered of a micro batch once its crops are gone.

    Attributes:
        step: number of the step, from 0.
        part: of which micro batch.
        scan_keys: the scan of each crop.
        rejected: crops thrown away for too little foreground.
    """

    step: int
    part: int
    scan_keys: list[str]
    rejected: int


class Step:
    """Moves a training state by one step at a time.

    Everything random is a function of the seed, the step and the number of the micro batch.

    Args:
        state: what moves.
        objective: makes the batch, scores the output.
        config: batch, precision, rates.
        seed: of augmentation, puzzles and dropout.
        device: where the state lives.
        augmentation: what to vary before the label is drawn.
        axes: the RAS axis of each spatial dimension of the crops.
        ranks: the processes that share each step.
    """

    def __init__(
        self,
        state: TrainingState,
        objective: Objective,
        config: TrainingConfig,
        *,
        seed: int,
        device: torch.device,
        augmentation: AugmentationConfig,
        axes: tuple[str, ...],
        ranks: Ranks,
    ) -> None:
        self.meter = Meter(ranks)
        self._state, self._objective, self._config = state, objective, config
        self._seed, self._device = seed, device
        self._augmentation, self._axes = augmentation, axes
        self._own_micro_batches = state.micro_batches // ranks.size
        self._network = parallel(state.network, ranks)
        self._buffers = StepBuffers(state.network, ranks, state.micro_batches)

    def update(self, samples: Iterator[Sample]) -> tuple[list[Used], float]:
        """Make one step; return what it used and the learning rate."""
        state, config = self._state, self._config
        rate = set_learning_rates(state.optimizer, state.step, config.steps, config)
        state.network.train()
        state.optimizer.zero_grad(set_to_none=True)
        self._buffers.begin()
        used = []
        for left in reversed(range(self._own_micro_batches)):
            with record_function("medssl: wait for data"):
                sample = next(samples)
            used.append(Used(sample.step, sample.part, sample.scan_keys, sample.rejected))
            with self._gathering(left):
                self.backward(sample)
            self._buffers.after_micro_batch()
        self._buffers.end()
        with record_function("medssl: optimizer"):
            if config.gradient_clip:
                state.scaler.unscale_(state.optimizer)
                nn.utils.clip_grad_norm_(state.network.parameters(), config.gradient_clip)
            state.scaler.step(state.optimizer)
            state.scaler.update()
            if state.average is not None:
                state.average.update_parameters(state.network)
        state.step += 1
        return used, rate

    def batch(self, sample: Sample) -> Any:
        """Augment crops and make the batch of them; the label is drawn last."""
        part = (sample.part,) if sample.part else ()
        generator = torch_generator(self._seed, "step", sample.step, *part, device=self._device)
        with record_function("medssl: augmentation"):
            images, masks = augment(
                sample.images, sample.masks, self._augmentation, generator, self._axes
            )
        with record_function("medssl: puzzle"):
            return self._objective.batch_of(replace(sample, images=images, masks=masks), generator)

    def backward(self, sample: Sample) -> None:
        """Add a micro batch's gradients to those of the step."""
        batch = self.batch(sample)
        layers = derive_seed(self._seed, "layers", sample.step, sample.part)
        with seeded_layers(layers, self._device):
            with record_function("medssl: forward"), autocast(self._config, self._device):
                output = self._network(batch)
                loss = self._objective.loss(output, batch)
            with record_function("medssl: backward"):
                self._state.scaler.scale(loss / self._own_micro_batches).backward()
        self.meter.add({"loss": loss, **self._objective.metrics(output, batch)})

    def _gathering(self, left: int) -> AbstractContextManager[None]:
        """Keep gradients to this process until the last of its micro batches."""
        if left and isinstance(self._network, DistributedDataParallel):
            holding: AbstractContextManager[None] = self._network.no_sync()
            return holding
        return nullcontext()
