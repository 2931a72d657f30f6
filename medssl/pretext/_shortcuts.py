"""Shortcuts: what a network could answer a pretext task from without a look at the anatomy.

A shortcut-only probe is the task itself, trained on inputs that hold nothing but the shortcut: what
it reaches, the task could be solved by. The list is of what pretext tasks on natural and medical
images were found to be solved by: edges that go on from tile to tile and borders (Doersch et al.,
ICCV 2015), low-level statistics of tiles (Noroozi and Favaro, ECCV 2016), and, in medical images,
the silhouette of the body and the coarse layout of organs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.models.backbones.base import Backbone
from medssl.pretext.base import PretextBatch, PretextTask, air_level
from medssl.transforms.sampling import Sample

BLANK = 0.5
"""What a border-only view shows elsewhere: the middle of the range, as of a standardised tile."""

BORDER_SHARE = 8
"""A border strip is one eighth of a side: about what padding, blur or a cut-off edge reach."""

THUMBNAIL = 8
"""Side of a thumbnail, voxels; at most half a view's side, or it would be the view itself."""


def border(views: Tensor) -> Tensor:
    """Return views of which only a strip along the border is left; the rest is `BLANK`.

    Args:
        views: (N, C, *S); the strip is ``max(1, side // 8)`` voxels wide along each axis.
    """
    inside = torch.ones(views.shape[2:], dtype=torch.bool, device=views.device)
    for axis, side in enumerate(views.shape[2:]):
        width = strip_width(side)
        place = torch.arange(side, device=views.device)
        shape = [1] * (views.ndim - 2)
        shape[axis] = side
        inside = inside & ((place >= width) & (place < side - width)).reshape(shape)
    return torch.where(inside, torch.full_like(views, BLANK), views)


def strip_width(side: int) -> int:
    """Return the width of the border strip of a view, voxels."""
    return max(1, side // BORDER_SHARE)


def silhouette(images: Tensor) -> Tensor:
    """Return 1 where a channel of images (N, C, *S) in [0, 1] is not air, and 0 elsewhere.

    Each channel has its own, as channels may be slices or sequences that a task takes apart. Taken
    of images before the puzzle is made: a standardised tile no longer tells what is air.
    """
    level = air_level(images).reshape(*images.shape[:2], *[1] * (images.ndim - 2))
    return (images >= level).to(images.dtype)


def mean_deviation(views: Tensor) -> Tensor:
    """Return views (N, C, *S) whose first half along X is the view's mean, the rest its deviation.

    Each channel has its own; a view of one voxel along X is all deviation.
    """
    axes = tuple(range(2, views.ndim))
    values = views.float()
    mean = values.mean(axes, keepdim=True)
    deviation = (values - mean).square().mean(axes, keepdim=True).sqrt()
    side = views.shape[2]
    place = torch.arange(side, device=views.device).reshape(-1, *[1] * (views.ndim - 3))
    return torch.where(place < side // 2, mean, deviation).to(views.dtype).expand_as(views)


def thumbnail(views: Tensor) -> Tensor:
    """Return views (N, C, *S) averaged to 8 voxels a side and enlarged again without smoothing.

    A side of fewer than 16 voxels is halved.
    """
    pool: Any = functional.adaptive_avg_pool2d
    if views.ndim == 5:
        pool = functional.adaptive_avg_pool3d
    small = pool(views.float(), thumbnail_size(tuple(views.shape[2:])))
    return functional.interpolate(small, size=views.shape[2:], mode="nearest").to(views.dtype)


def thumbnail_size(sides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the size of the thumbnail of a view, voxels."""
    return tuple(max(1, min(THUMBNAIL, side // 2)) for side in sides)


@dataclass(frozen=True)
class Shortcut:
    """One way to see less of a puzzle.

    Attributes:
        name: in tables.
        shown: what is left, in words, for a view of some sides.
        of_images: what is done to images before the puzzle is made of them.
        of_views: what is done to the views that the puzzle gives the network.
    """

    name: str
    shown: Callable[[tuple[int, ...]], str]
    of_images: Callable[[Tensor], Tensor] | None = None
    of_views: Callable[[Tensor], Tensor] | None = None


def _border_shown(sides: tuple[int, ...]) -> str:
    inner = math.prod(max(0, side - 2 * strip_width(side)) for side in sides)
    share = 1 - inner / math.prod(sides)
    widths = sorted({strip_width(side) for side in sides})
    wide = " or ".join(map(str, widths))
    return f"the outer {wide} voxel{'s' * (widths != [1])}, {share:.0%} of a view"


def _thumbnail_shown(sides: tuple[int, ...]) -> str:
    small, whole = (" x ".join(map(str, size)) for size in (thumbnail_size(sides), sides))
    return f"{small} averages of {whole} voxels"


EVERYTHING = Shortcut("everything", lambda _: "the puzzle as it is")
BORDER = Shortcut("border", _border_shown, of_views=border)
BODY_MASK = Shortcut("body_mask", lambda _: "where there is no air", of_images=silhouette)
MEAN_DEVIATION = Shortcut(
    "mean_deviation", lambda _: "mean and deviation of a view", of_views=mean_deviation
)
THUMBNAIL_ONLY = Shortcut("thumbnail", _thumbnail_shown, of_views=thumbnail)


class ShortcutOnly:
    """A pretext task of whose puzzles the network sees a shortcut alone; an Objective to the loop.

    Labels, heads, loss and scores are the task's own.

    Args:
        task: the task.
        shortcut: what is left of its inputs.
    """

    def __init__(self, task: PretextTask, shortcut: Shortcut) -> None:
        self.task = task
        self.shortcut = shortcut
        self.name = task.name

    def batch_of(self, sample: Sample, generator: torch.Generator) -> PretextBatch:
        """Make puzzles and take from them all but the shortcut."""
        return self._seen(self.task.batch_of(self._shown(sample), generator))

    def puzzles(self, sample: Sample, generator: torch.Generator) -> list[PretextBatch]:
        """Return the puzzles to validate on, with the shortcut alone left of them."""
        return [self._seen(batch) for batch in self.task.puzzles(self._shown(sample), generator)]

    def build_head(self, backbone: Backbone) -> nn.Module:
        """Return the task's own head."""
        return self.task.build_head(backbone)

    def forward(self, backbone: Backbone, head: nn.Module, batch: PretextBatch) -> Any:
        """Return what the task's own forward does."""
        return self.task.forward(backbone, head, batch)

    def loss(self, output: Any, batch: PretextBatch) -> Tensor:
        """Return the task's own loss."""
        return self.task.loss(output, batch)

    def metrics(self, output: Any, batch: PretextBatch) -> dict[str, Tensor]:
        """Return the task's own metrics."""
        return self.task.metrics(output, batch)

    def _shown(self, sample: Sample) -> Sample:
        change = self.shortcut.of_images
        return sample if change is None else replace(sample, images=change(sample.images))

    def _seen(self, batch: PretextBatch) -> PretextBatch:
        change = self.shortcut.of_views
        return batch if change is None else replace(batch, inputs=change(batch.inputs))
