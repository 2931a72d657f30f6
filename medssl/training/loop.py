"""The one training loop. Pretext and downstream tasks are both an `Objective` to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.errors import ConfigError, DivergedError, MachineError
from medssl.models.backbones.base import Backbone
from medssl.models.build import seeded_construction
from medssl.randomness import torch_generator
from medssl.training.feed import FeedConfig, feed
from medssl.training.optimization import OptimizationConfig, build_optimizer, set_learning_rates
from medssl.training.state import TrainingState
from medssl.transforms.augmentation import AugmentationConfig, augment
from medssl.transforms.sampling import CropSampler, Sample, Share

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

_REMEDY = (
    "The last saved state is good. "
    "Lower training.learning_rate, raise warmup_steps, or use precision bf16 or fp32."
)


class Objective(Protocol):
    """What the loop needs of a task, pretext or downstream: batch → output → loss, metrics."""

    name: str

    def batch_of(self, sample: Sample, generator: torch.Generator) -> Any: ...

    def build_head(self, backbone: Backbone) -> nn.Module: ...

    def forward(self, backbone: Backbone, head: nn.Module, batch: Any) -> Any: ...

    def loss(self, output: Any, batch: Any) -> Tensor: ...

    def metrics(self, output: Any, batch: Any) -> dict[str, Tensor]: ...


class TrainingConfig(OptimizationConfig, FeedConfig):
    """How long and on what to train.

    Attributes:
        steps: number of optimiser steps.
        global_batch_size: images a step, over all devices together.
        precision: ``fp32``, ``bf16`` or ``fp16`` (with a scaled loss).
        num_workers: processes that read crops; 0 reads in the training process.
        log_every: steps between two lines of the journal; also how often values are checked.
        validate_every: steps between two validations; 0 for the last step alone.
        checkpoint_every: steps between two training states; 0 for the last step alone.
    """

    steps: int = Field(gt=0)
    global_batch_size: int = Field(default=32, gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    num_workers: int = Field(default=0, ge=0)
    log_every: int = Field(default=10, gt=0)
    validate_every: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=0, ge=0)


class Network(nn.Module):
    """A backbone and the head of one objective."""

    def __init__(self, backbone: Backbone, objective: Objective) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = objective.build_head(backbone)
        self._forward = objective.forward

    def forward(self, batch: Any) -> Any:
        return self._forward(self.backbone, self.head, batch)


class Meter:
    """Means of loss and metrics, gathered on the device and read rarely."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the values of one step; nothing is copied to the host.

        A metric that a batch leaves undefined (NaN: no labelled class in it) is passed over. The
        loss never is.
        """
        for name, value in values.items():
            number = value.detach().float()
            counted = torch.ones_like(number) if name == "loss" else (~number.isnan()).float()
            number = torch.where(counted > 0, number, 0)
            self._sums[name] = self._sums.get(name, torch.zeros_like(number)) + number
            self._counts[name] = self._counts.get(name, torch.zeros_like(number)) + counted

    def read(self) -> dict[str, float]:
        """Return the means since the last reading: the one place that waits for the device."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values()))
        counts = torch.stack(list(self._counts.values()))
        means = dict(zip(self._sums, (sums / counts).tolist(), strict=True))
        self._sums, self._counts = {}, {}
        return means


def select_device(name: str) -> torch.device:
    """Return the device that a config names; ``auto`` is the GPU where there is one.

    Raises:
        ConfigError: the name is not a device's.
        MachineError: the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is no device. Use auto, cpu or cuda.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            f"device: {name} is asked for, and torch sees no GPU on this machine. "
            "Set device=auto, or run medssl doctor to see why."
        )
    return device


def build_network(backbone: Backbone, objective: Objective, seed: int) -> Network:
    """Return backbone and head; the head's starting weights are a function of the seed."""
    with seeded_construction(seed, "head"):
        return Network(backbone, objective)


def start_state(network: Network, config: TrainingConfig, device: torch.device) -> TrainingState:
    """Return the state before the first step, on the device."""
    network.to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    return TrainingState(network, build_optimizer(network, config), scaler)


def autocast(config: TrainingConfig, device: torch.device) -> torch.autocast:
    """Return the autocast context of the configured precision."""
    dtype = _DTYPES.get(config.precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def right_gradients(config: TrainingConfig, device: torch.device) -> Iterator[None]:
    """Train without oneDNN where its gradients are wrong: convolutions in bfloat16 on a CPU.

    Measured with torch 2.14.1: weight gradients of 3 x 3 convolutions over one or two voxels (small
    tiles) were wrong or NaN in 39 of 40 tries, other ones each time, and right without oneDNN and
    in float32 (tests/unit/training/test_loop.py).
    """
    if device.type != "cpu" or config.precision == "fp32":
        yield
        return
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before, _fp32_precision=None)


def train(
    state: TrainingState,
    objective: Objective,
    sampler: CropSampler,
    config: TrainingConfig,
    *,
    seed: int,
    device: torch.device,
    augmentation: AugmentationConfig,
    log: Callable[[int, dict[str, float]], None],
    validate: Callable[[int], dict[str, float]] | None = None,
    save: Callable[[], None] | None = None,
) -> None:
    """Train from ``state.step`` to ``config.steps``.

    Args:
        state: what moves; a loaded one goes on bitwise as if it had not stopped (same device).
        objective: makes the batch, scores the output.
        sampler: reads crops; a function of the step alone.
        config: steps, batch, precision, rates.
        seed: of augmentation and puzzles.
        device: where `state` lives.
        augmentation: what to vary before the label is drawn.
        log: receives the steps done, and means since the last call.
        validate: called at ``validate_every`` and after the last step; its metrics are logged.
        save: called at ``checkpoint_every`` and after the last step, always with finite weights.

    Raises:
        DivergedError: the loss or a weight is not finite; the last saved state is still good.
    """
    with right_gradients(config, device):
        _train(state, objective, sampler, config, seed, device, augmentation, log, validate, save)


def _train(
    state: TrainingState,
    objective: Objective,
    sampler: CropSampler,
    config: TrainingConfig,
    seed: int,
    device: torch.device,
    augmentation: AugmentationConfig,
    log: Callable[[int, dict[str, float]], None],
    validate: Callable[[int], dict[str, float]] | None,
    save: Callable[[], None] | None,
) -> None:
    meter = Meter()
    tried = rejected = 0
    share = Share(config.global_batch_size)
    for read in feed(sampler, state.step, config.steps, share, config, device):
        step = state.step
        rate = set_learning_rates(state.optimizer, step, config.steps, config)
        state.network.train()
        generator = torch_generator(seed, "step", step, device=device)
        images, masks = augment(
            read.images, read.masks, augmentation, generator, sampler.request.axes
        )
        sample = replace(read, images=images, masks=masks)
        batch = objective.batch_of(sample, generator)  # the label is drawn last
        with autocast(config, device):
            output = state.network(batch)
            loss = objective.loss(output, batch)
        state.optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(loss).backward()
        if config.gradient_clip:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.network.parameters(), config.gradient_clip)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        meter.add({"loss": loss, **objective.metrics(output, batch)})
        tried, rejected = tried + len(read.images) + read.rejected, rejected + read.rejected
        state.step = step + 1

        last = state.step == config.steps
        validating = validate is not None and (last or _due(state.step, config.validate_every))
        saving = save is not None and (last or _due(state.step, config.checkpoint_every))
        if last or validating or saving or _due(state.step, config.log_every):
            means = _finite(meter.read(), state.step)
            means["rejected_crops"] = rejected / tried
            tried = rejected = 0
            log(state.step, {"lr": rate, **{f"train/{k}": v for k, v in means.items()}})
        if last or saving:
            _check_weights(state)
        if validating and validate is not None:
            log(state.step, {f"val/{k}": v for k, v in validate(state.step).items()})
        if saving and save is not None:
            save()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _finite(means: dict[str, float], step: int) -> dict[str, float]:
    if not math.isfinite(means.get("loss", 0.0)):
        raise DivergedError(f"the loss is not finite in the steps up to {step}. {_REMEDY}")
    return means


def _check_weights(state: TrainingState) -> None:
    """Refuse weights that the last update broke, which the loss before it cannot tell."""
    tensors = [value for value in state.network.state_dict().values() if value.is_floating_point()]
    if not bool(torch.stack([value.isfinite().all() for value in tensors]).all()):
        raise DivergedError(
            f"weights of the network are not finite after step {state.step}. {_REMEDY}"
        )
