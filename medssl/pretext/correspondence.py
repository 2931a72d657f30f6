"""Correspondence: do two co-registered sequences show the same place of the same patient?

Two things recorded together belong together: the idea is that of sound and picture in Arandjelovic,
Zisserman, "Look, listen and learn", ICCV 2017. Here it is two sequences of one study (T1, T2,
FLAIR, ...), which share the anatomy but not the contrast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.errors import ConfigError
from medssl.models.backbones.base import Backbone
from medssl.models.heads import SiameseHead
from medssl.pretext._tiles import MIN_TILE, LevelsConfig, cut_parts, foreground_share, level_tiles
from medssl.pretext.base import (
    ClassificationTask,
    Panel,
    PretextBatch,
    air_level,
    answer_title,
    middle_slice,
)
from medssl.transforms.sampling import Sample, SampleRequest

_NUM_PANELS = 3


class Config(LevelsConfig):
    """Configuration of the correspondence task.

    Attributes:
        negatives: what a pair that does not belong together is made of: ``other_place`` of the
            same image, the same part of an image of ``other_patient`` (another scan of the batch;
            where the batch holds one scan alone, another place), or ``both`` at random.
        view: side of a view, as a share of the crop's. All views of all pairs are cut alike.
        min_foreground, standardise, intensity_jitter: of each view.
        hidden: units of the hidden layer of the head.
    """

    name: Literal["correspondence"] = "correspondence"
    negatives: Literal["other_patient", "other_place", "both"] = "both"
    view: float = Field(default=0.5, gt=0, lt=1)
    hidden: int = Field(default=512, ge=1)


def cut_views(images: Tensor, start: Tensor, size: tuple[int, ...]) -> Tensor:
    """Cut one part of a given size, (N, C, *size), from voxel ``start`` (N, D) of each image."""
    return cut_parts(images, start[:, None], size).squeeze(1)


def other_places(start: Tensor, room: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw other places for views, (N, D), each as likely as any where the first ones are so.

    Every axis is moved cyclically by any amount; one of those with room, drawn for each view, by
    at least a third of its room, so that no two views nearly agree.

    Args:
        start: (N, D) the first places, from 0 to ``room`` along each axis.
        room: voxels that a view can be moved along each axis; at least one axis has some.
        generator: on the device of ``start``.
    """
    device = start.device
    share, weight = torch.rand((2, *start.shape), device=device, generator=generator)
    places = (torch.tensor(room) + 1).to(device, non_blocking=True)
    # The axis of the largest random number among those with room.
    axes = torch.arange(len(room), device=device)
    far = ((weight + 1) * (places > 1)).argmax(1, keepdim=True) == axes
    least = torch.where(far, ((places + 2) // 3).minimum(places // 2), 0)
    choices = torch.where(far, places - 2 * least + 1, places)
    shift = least + (share * choices).floor().long().minimum(choices - 1)
    moved: Tensor = (start + shift) % places
    return moved


class Correspondence(ClassificationTask):
    """Tell pairs of sequences of one place from pairs of different places or patients.

    The backbone sees one sequence at a time. A pair of different patients takes two images of the
    batch. An epoch visits each scan once, so these are of different scans, except where a batch
    spans two epochs or a patient has several scans; even then, the two crops rarely agree.
    """

    min_sequences = 2
    num_classes = 2

    def __init__(self, config: Config, spatial_dims: int) -> None:
        super().__init__(config, spatial_dims)
        self.chance_level = 0.5
        self.healthy_range = (0.6, 0.99)

    def request(self, base: SampleRequest) -> SampleRequest:
        """Ask for crops that lie inside the scan: a padded border tells where a view lies."""
        if base.num_sequences < self.min_sequences:
            raise ConfigError(
                f"sampling.num_sequences: correspondence needs {self.min_sequences} co-registered "
                f"sequences or more, found {base.num_sequences}. Set it to what the scans have, or "
                "choose another task."
            )
        if base.num_neighbours:
            raise ConfigError(
                f"correspondence takes slices without neighbours, found num_neighbours "
                f"{base.num_neighbours}. Set it to 0, or choose another task."
            )
        size = self._size(base.crop_size)
        if min(size) < MIN_TILE or size == base.crop_size:
            raise ConfigError(
                f"sampling.crop_size: {list(base.crop_size)} gives views of {list(size)} voxels "
                f"(pretext.view: {self.config.view:g}); each side must have {MIN_TILE} or more, "
                "and one be smaller than the crop. Take a larger crop, or another pretext.view."
            )
        return replace(base, allow_padding=False)

    def in_channels(self, request: SampleRequest) -> int:
        return 1

    def _size(self, crop_size: Sequence[int]) -> tuple[int, ...]:
        return tuple(max(1, round(side * self.config.view)) for side in crop_size)

    def batch_of(self, sample: Sample, generator: torch.Generator) -> PretextBatch:
        if not sample.scan_keys:
            return self.make_batch(sample.images, generator)
        numbers = {key: number for number, key in enumerate(dict.fromkeys(sample.scan_keys))}
        scans = torch.tensor([numbers[key] for key in sample.scan_keys])
        scans = scans.to(sample.images.device, non_blocking=True)
        return self._puzzles(sample.images, scans, generator)

    def make_batch(self, images: Tensor, generator: torch.Generator) -> PretextBatch:
        """Make puzzles of images that are each of another scan; see `batch_of`."""
        scans = torch.arange(len(images), device=images.device)
        return self._puzzles(images, scans, generator)

    def _puzzles(self, images: Tensor, scans: Tensor, generator: torch.Generator) -> PretextBatch:
        """Make one puzzle of each image; half of them, to within one, belong together.

        Args:
            images: (B, C, *S).
            scans: (B,) the same number for images of the same scan, which are no strangers.
            generator: on the images' device.

        Raises:
            ConfigError: the images have one channel.
        """
        num_images, num_sequences = images.shape[:2]
        if num_sequences < self.min_sequences:
            raise ConfigError(
                f"correspondence compares {self.min_sequences} sequences, found images of "
                f"{num_sequences} channel. Set sampling.num_sequences to what the scans have."
            )
        device = images.device
        order = torch.rand(num_images, device=device, generator=generator).argsort()
        odd = torch.randint(2, (1,), device=device, generator=generator)
        same = (order + odd) % 2  # (B,) the label: 1, they belong together

        first = torch.randint(num_sequences, (num_images,), device=device, generator=generator)
        step = torch.randint(1, num_sequences, (num_images,), device=device, generator=generator)
        sequences = torch.stack([first, (first + step) % num_sequences], dim=1)  # (B, 2)

        size = self._size(images.shape[2:])
        room = tuple(side - part for side, part in zip(images.shape[2:], size, strict=True))
        share = torch.rand((num_images, len(room)), device=device, generator=generator)
        limit = torch.tensor(room).to(device, non_blocking=True)
        start = (share * (limit + 1)).floor().long().minimum(limit)

        # What each image's pair would be if it did not belong together.
        own = torch.arange(num_images, device=device)
        foreign = torch.zeros_like(own, dtype=torch.bool)
        stranger = own
        if num_images > 1 and self.config.negatives != "other_place":
            foreign = ~foreign
            if self.config.negatives == "both":
                foreign = torch.rand(num_images, device=device, generator=generator) < 0.5
            shift = torch.randint(1, num_images, (1,), device=device, generator=generator)
            other = (own + shift) % num_images
            foreign = foreign & (scans != scans[other])
            stranger = torch.where(foreign, other, own)
        elsewhere = torch.where(foreign[:, None], start, other_places(start, room, generator))

        # One channel each: (B, 1, *size).
        anchor = cut_views(images[own, sequences[:, 0]][:, None], start, size)
        together = cut_views(images[own, sequences[:, 1]][:, None], start, size)
        apart = cut_views(images[stranger, sequences[:, 1]][:, None], elsewhere, size)
        belongs = same.bool().reshape(-1, *[1] * (images.ndim - 1))
        views = torch.stack([anchor, torch.where(belongs, together, apart)], dim=1)
        # Both possible pairs must hold enough, so that what counts is as balanced as the labels.
        level = air_level(images)  # (B, C)
        levels = torch.stack(
            [
                level[own, sequences[:, 0]],
                level[own, sequences[:, 1]],
                level[stranger, sequences[:, 1]],
            ],
            dim=1,
        )
        share = foreground_share(torch.stack([anchor, together, apart], dim=1), levels[..., None])
        extras = {
            "weight": (share >= self.config.min_foreground).all(1).float(),
            "sequences": sequences,
            "images": torch.stack([own, torch.where(same.bool(), own, stranger)], dim=1),
            "start": torch.stack([start, torch.where(same[:, None].bool(), start, elsewhere)], 1),
        }
        views = level_tiles(views, self.config, generator)
        return PretextBatch(views.flatten(0, 1), same, self.name, extras)

    def build_head(self, backbone: Backbone) -> nn.Module:
        return SiameseHead(backbone.embedding_channels, 2, self.num_classes, self.config.hidden)

    def forward(self, backbone: Backbone, head: nn.Module, batch: PretextBatch) -> Tensor:
        embedded = backbone.embed(batch.inputs).unflatten(0, (-1, 2))  # (B, 2, D)
        logits: Tensor = head(embedded)
        return logits

    def class_names(self) -> Sequence[str]:
        return ("different", "same")

    def panels(self, batch: PretextBatch, output: Tensor | None) -> list[list[Panel]]:
        names = self.class_names()
        answers = [None] * len(batch.target) if output is None else output.argmax(1).tolist()
        views = batch.inputs.unflatten(0, (-1, 2))
        rows = []
        for item in range(min(_NUM_PANELS, len(batch.target))):
            first, second = batch.extras["sequences"][item].tolist()
            answer = answer_title(names, int(batch.target[item]), answers[item])
            rows.append(
                [
                    Panel(middle_slice(views[item, 0]), f"sequence {first}"),
                    Panel(middle_slice(views[item, 1]), f"sequence {second}: {answer}"),
                ]
            )
        return rows
