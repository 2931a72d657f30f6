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

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from medssl.config import ComponentConfig
from medssl.models.backbones.base import Backbone
from medssl.transforms.sampling import Sample, SampleRequest


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
        primary_metric: the metric by which people judge the task.
        higher_is_better: its direction.
        chance_level: the primary metric of a network that knows nothing; ``None`` where the task
            reports its trivial baseline as a metric of its own.
        healthy_range: where the primary metric lies, on validation patients, when training goes
            well; above it a shortcut is likely, below it the task is stuck.
    """

    primary_metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    chance_level: float | None
    healthy_range: tuple[float, float]

    def __init__(self, config: Any, spatial_dims: int) -> None:
        self.config: Any = config
        self.name: str = config.name
        self.spatial_dims = spatial_dims

    def request(self, base: SampleRequest) -> SampleRequest:
        """Return what the task needs of the sampler, starting from the configured crop."""
        return base

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

    @abstractmethod
    def metrics(self, output: Any, batch: PretextBatch) -> dict[str, Tensor]:
        """Return scalar metrics on the device: batch means, nothing that synchronises."""

    @abstractmethod
    def panels(self, batch: PretextBatch, output: Any) -> list[list[Panel]]:
        """Return rows of pictures that show a few puzzles of a batch and the answers given."""

    def batch_of(self, sample: Sample, generator: torch.Generator) -> PretextBatch:
        """Make puzzles from what the sampler read; pretext tasks see images alone."""
        return self.make_batch(sample.images, generator)


class PretextConfig(ComponentConfig):
    """Base of the configurations of pretext tasks."""


def middle_slice(image_CS: Tensor) -> Tensor:
    """Return the first channel of an image as 2D, cut through the middle of Z where it is 3D."""
    image = image_CS[0].detach().float().cpu()
    return image[..., image.shape[-1] // 2] if image.ndim == 3 else image
