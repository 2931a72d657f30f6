"""What a pretext task is: it makes puzzles from unlabelled images, and scores the answers.

One file a task. A task sees a batch of augmented images on the device and returns the puzzle
(`PretextTask.make_batch`): the label is drawn last, after every augmentation, because a flip after
a rotation would swap 90 and 270 degrees.

The contract carries several views an image and siamese networks: ``inputs`` may hold any number
of views, and a task that needs more than one pass (jigsaw: encode the tiles once, then permute
their embeddings; relative position: embed both patches, then concatenate) overrides `forward`.
A task that trains several heads at once keeps them in an ``nn.ModuleDict`` and swaps the head by
`PretextBatch.task`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.config import ComponentConfig
from medssl.errors import ConfigError
from medssl.models.backbones.base import Backbone
from medssl.transforms.sampling import Sample, SampleRequest

AIR_SHARE = 0.1
"""Part of an image's range of intensities, from its darkest voxel, that counts as air.

Relative, because augmentation may brighten the air of an image by more than any fixed level.
"""

AIR_CEILING = 0.15
"""Intensity, of the prepared range [0, 1], that no air reaches: 0.05 as it is prepared, and 0.1 by
which augmentation brightens at most by default."""


@dataclass(frozen=True)
class PretextBatch:
    """One batch of puzzles, on the device.

    Attributes:
        inputs: what the backbone sees, (N, C, X, Y[, Z]); N is the number of images times the
            number of views of each.
        target: what is to be predicted; its first axis need not be N (several permutations of one
            encoded image, for example).
        extras: anything else that `forward`, `loss` or `metrics` of the same task needs.
        task: the name of the task that made it; multi-task training swaps the head by it.
    """

    inputs: Tensor
    target: Tensor
    task: str
    extras: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """One picture for people: a 2D image in [0, 1] and what it shows."""

    image_XY: Tensor
    title: str


class PretextTask(ABC):
    """Base of every pretext task.

    Args:
        config: the member's own ``Config``.
        spatial_dims: 2 or 3.

    Attributes:
        supported_dims: numbers of spatial dimensions the task exists in.
        min_sequences: fewest co-registered sequences of a scan that it can work with.
        draws: whether its head is a decoder, which draws images: voxel tasks may start from it.
        primary_metric: the metric by which people judge the task.
        higher_is_better: its direction.
        chance_level: the primary metric of a network that knows nothing; ``None`` where the task
            reports its trivial baseline as a metric of its own.
        trivial_metric: that metric's name, in the units of the primary metric; ``None`` where there
            is a chance level.
        baseline_metrics: those of `baselines` that are in the units of the primary metric.
        healthy_range: where the primary metric lies, on validation patients, when training goes
            well; above it a shortcut is likely, below it the task is stuck.
    """

    supported_dims: ClassVar[tuple[int, ...]] = (2, 3)
    min_sequences: ClassVar[int] = 1
    draws: bool = False
    primary_metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    trivial_metric: ClassVar[str | None] = None
    baseline_metrics: ClassVar[tuple[str, ...]] = ()
    chance_level: float | None
    healthy_range: tuple[float, float]

    def __init__(self, config: Any, spatial_dims: int) -> None:
        if spatial_dims not in self.supported_dims:
            wanted = " or ".join(f"{dims}D" for dims in self.supported_dims)
            raise ConfigError(
                f"pretext: {config.name} takes {wanted} crops, found {spatial_dims}D. "
                "Give sampling.crop_size that many numbers, or choose another task."
            )
        self.config: Any = config
        self.name: str = config.name
        self.spatial_dims = spatial_dims

    def request(self, base: SampleRequest) -> SampleRequest:
        """Return what the task needs of the sampler, starting from the configured crop."""
        return base

    def in_channels(self, request: SampleRequest) -> int:
        """Return the channels of the images that the backbone sees.

        Fewer than the request's, where the task takes them apart (slices, sequences).
        """
        return request.in_channels

    def contract(self) -> dict[str, Any]:
        """Return further fields of the checkpoint's contract: the hash of a permutation set."""
        return {}

    @abstractmethod
    def make_batch(self, images: Tensor, generator: torch.Generator) -> PretextBatch:
        """Make puzzles from images (B, C, X, Y[, Z]) in [0, 1]; never edits them in place.

        The same generator state gives the same puzzles.
        """

    @abstractmethod
    def build_head(self, backbone: Backbone) -> nn.Module:
        """Return the task's own layers for a backbone."""

    def forward(self, backbone: Backbone, head: nn.Module, batch: PretextBatch) -> Any:
        """Return the head's output for a batch; by default the head on the last stage, pooled."""
        return head(backbone.embed(batch.inputs))

    @abstractmethod
    def loss(self, output: Any, batch: PretextBatch) -> Tensor:
        """Return the scalar loss."""

    def loss_of_guessing(self, batch: PretextBatch) -> Tensor | float:
        """Return the loss of an answer that needs no network: the unit of `multi`'s balance."""
        if self.chance_level is None:
            raise NotImplementedError(f"pretext task {self.name}: loss_of_guessing")
        return -math.log(self.chance_level)

    @abstractmethod
    def metrics(self, output: Any, batch: PretextBatch) -> dict[str, Tensor]:
        """Return scalar metrics on the device: batch means, nothing that synchronises."""

    @abstractmethod
    def panels(self, batch: PretextBatch, output: Any | None) -> list[list[Panel]]:
        """Return rows of pictures that show a few puzzles of a batch.

        Args:
            batch: the puzzles.
            output: what the network answered; ``None``: the puzzles with their labels alone.
        """

    def batch_of(self, sample: Sample, generator: torch.Generator) -> PretextBatch:
        """Make puzzles from what the sampler read; pretext tasks see images alone."""
        return self.make_batch(sample.images, generator)

    def puzzles(self, sample: Sample, generator: torch.Generator) -> list[PretextBatch]:
        """Return the puzzles to validate on: one batch of each kind that the task makes."""
        return [self.batch_of(sample, generator)]

    def baselines(self, batch: PretextBatch) -> dict[str, float]:
        """Return how well answers do that need no network, as metrics of their own.

        Asked once a run, on the fixed validation puzzles; it may work on the host and take seconds.
        """
        return {}

    def parts(self) -> Mapping[str, PretextTask]:
        """Return the tasks whose metrics this one reports, by the prefix of their names."""
        return {"": self}

    def diagnostics(self, network: nn.Module, batches: list[PretextBatch]) -> dict[str, Tensor]:
        """Return numbers about the training itself, on one image batch's validation puzzles.

        Asked at each validation, with gradients enabled.
        """
        return {}

    def confusion(self, output: Any, batch: PretextBatch) -> Tensor | None:
        """Return how often each class was answered with each, (true, answered), on the device.

        ``None`` for tasks that do not classify, or among more than `MOST_CONFUSED` classes.
        """
        return None

    def class_names(self) -> Sequence[str]:
        """Return what people call the classes, in order; empty for tasks that do not classify."""
        return ()


MOST_CONFUSED = 1000
"""Classes up to which a confusion matrix is kept: its size grows with their square."""


class ClassificationTask(PretextTask):
    """Base of the tasks whose puzzle is a choice of one class.

    A puzzle that cannot be solved (a tile of air) is left out by a weight of zero in
    ``batch.extras["weight"]``, (N,) float: shapes stay fixed, and nothing synchronises.

    Attributes:
        num_classes: set by the member.
    """

    primary_metric = "accuracy"
    higher_is_better = True
    num_classes: int

    def loss(self, output: Tensor, batch: PretextBatch) -> Tensor:
        weight = batch.extras.get("weight")
        if weight is None:
            return functional.cross_entropy(output.float(), batch.target)
        each = functional.cross_entropy(output.float(), batch.target, reduction="none")
        return (each * weight).sum() / weight.sum().clamp(min=1)

    def metrics(self, output: Tensor, batch: PretextBatch) -> dict[str, Tensor]:
        right = (output.detach().argmax(1) == batch.target).float()
        weight = batch.extras.get("weight")
        if weight is None:
            return {"accuracy": right.mean()}
        # A batch without a puzzle that counts gives 0 / 0 = NaN, which is passed over.
        accuracy = (right * weight).sum() / weight.sum()
        return {"accuracy": accuracy, "rejection_rate": 1 - weight.mean()}

    def confusion(self, output: Tensor, batch: PretextBatch) -> Tensor | None:
        if self.num_classes > MOST_CONFUSED:
            return None
        weight = batch.extras.get("weight", torch.ones_like(batch.target, dtype=torch.float32))
        true = functional.one_hot(batch.target, self.num_classes).float() * weight[:, None]
        answered = functional.one_hot(output.detach().argmax(1), self.num_classes).float()
        return true.T @ answered

    def class_names(self) -> Sequence[str]:
        return [str(number) for number in range(self.num_classes)]


class PretextConfig(ComponentConfig):
    """Base of the configurations of pretext tasks."""


def air_level(images: Tensor) -> Tensor:
    """Return the intensity, (B, C), from which a voxel of an image's channel is not air.

    Air is the darkest part of an image's range, where that is dark enough to be air at all.

    Args:
        images: (B, C, *S).
    """
    flat = images.flatten(2)
    low, high = flat.amin(2), flat.amax(2)
    level = (low + AIR_SHARE * (high - low)).clamp(max=AIR_CEILING)
    return torch.where(high > low, level, AIR_CEILING)


def not_air(images: Tensor) -> Tensor:
    """Return where any channel of images (B, C, *S) is not air, (B, 1, *S) bool."""
    level = air_level(images).reshape(*images.shape[:2], *[1] * (images.ndim - 2))
    return (images >= level).any(1, keepdim=True)


def answer_title(names: Sequence[str], label: int, answer: int | None) -> str:
    """Return a panel's title: the puzzle's class and, if there is an answer, what it was."""
    return names[label] if answer is None else f"{names[label]}, answer {names[answer]}"


def middle_slice(image_CS: Tensor) -> Tensor:
    """Return the first channel of an image as 2D, cut through the middle of Z where it is 3D."""
    image = image_CS[0].detach().float().cpu()
    return image[..., image.shape[-1] // 2] if image.ndim == 3 else image
