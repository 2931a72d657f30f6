"""Slice order: tell whether three slices come in their order, or the middle one from elsewhere.

Source: Misra, Zitnick, Hebert, "Shuffle and learn: unsupervised learning using temporal order
verification", ECCV 2016. In medical scans, slices along the plane's normal take the place of a
video's frames; frames of a cine serve as they are.

Of each image five slices a, b, c, d, e are embedded, each alone and once, and make eight puzzles:

    ordered     a b c, c d e    and backwards  c b a, e d c
    shuffled    a d c, c b e    and backwards  c d a, e b c

As in the source, a shuffled triplet has the ends of an ordered one and a slice from outside them
in the middle, so that the ends together do not tell the answer. Beyond the source, each slice comes
equally often into each place of ordered and of shuffled triplets, so that no slice alone tells it
either: with one fixed pair of ends, slices near the ends of the body would be in the middle of
shuffled triplets more often.

What remains is how alike the slices are, voxel by voxel. So each is displaced at random (as Lee et
al., "Unsupervised representation learning by sorting sequences", ICCV 2017), and two rules that
look at likeness or at the body's area alone are reported beside the network
(`SliceOrder.baselines`). Neighbouring slices of a resampled scan share voxels and noise, which no
displacement removes: keep ``step`` times the spacing above the thickness of the slices as they were
acquired. A cine must not run through a whole cycle within the five frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.errors import ConfigError
from medssl.models.backbones.base import Backbone
from medssl.models.heads import SiameseHead
from medssl.pretext._tiles import (
    MIN_TILE,
    LevelsConfig,
    cut_tiles,
    foreground_share,
    grid_cells,
    level_tiles,
)
from medssl.pretext.base import (
    ClassificationTask,
    Panel,
    PretextBatch,
    air_level,
    answer_title,
    middle_slice,
)
from medssl.transforms.sampling import SampleRequest

TRIPLETS = (
    (0, 1, 2), (2, 3, 4), (2, 1, 0), (4, 3, 2),
    (0, 3, 2), (2, 1, 4), (2, 3, 0), (4, 1, 2),
)  # fmt: skip
"""The puzzles of an image by the places of their slices: four ordered, then four shuffled."""

LABELS = (1, 1, 1, 1, 0, 0, 0, 0)

_NUM_SLICES = 5
_NUM_PANELS = 6


class Config(LevelsConfig):
    """Configuration of the slice order task.

    Attributes:
        step: distance between the slices of an ordered triplet, in slices or frames; the five
            slices of an image span four steps.
        jitter: largest displacement of a slice against the others, voxels; the backbone sees slices
            smaller than the crop by as much. Default: an eighth of the crop's shorter side.
        hidden: units of the hidden layer of the head.
        min_foreground, standardise, intensity_jitter: of each of the five slices; an image's
            puzzles count all or none.
    """

    name: Literal["slice_order"] = "slice_order"
    step: int = Field(default=2, ge=1)
    jitter: int | None = Field(default=None, ge=0)
    hidden: int = Field(default=512, ge=1)

    def displacement(self, crop_size: tuple[int, ...]) -> int:
        """Return the largest displacement of a slice, in voxels, for a crop.

        Raises:
            ConfigError: it leaves too little of the crop.
        """
        jitter = min(crop_size) // 8 if self.jitter is None else self.jitter
        if min(crop_size) - jitter < MIN_TILE:
            raise ConfigError(
                f"sampling.crop_size: {list(crop_size)} does not hold slices of at least "
                f"{MIN_TILE} voxels a side with a jitter of {jitter}. Take a larger crop, or a "
                "smaller pretext.jitter."
            )
        return jitter


class SliceOrder(ClassificationTask):
    """Predict whether the second of three slices lies between the others."""

    supported_dims: ClassVar[tuple[int, ...]] = (2,)
    baseline_metrics = ("area_rule_accuracy", "difference_rule_accuracy")
    num_classes = 2

    def __init__(self, config: Config, spatial_dims: int) -> None:
        super().__init__(config, spatial_dims)
        self.num_neighbours = 2 * config.step
        self.triplets, self.labels = torch.tensor(TRIPLETS), torch.tensor(LABELS)
        self.chance_level = 1 / self.num_classes
        self.healthy_range = (0.6, 0.99)

    def request(self, base: SampleRequest) -> SampleRequest:
        """Ask for the slices on either side.

        Raises:
            ConfigError: no plane to stack slices across, neighbours asked for by others, or a crop
                too small for the displacement.
        """
        self.config.displacement(base.crop_size)
        if base.plane is None:
            raise ConfigError(
                "sampling.plane: slice_order compares slices of 3D scans, or frames of cines, and "
                "no plane is given. Choose sagittal, coronal or axial (cines: axial)."
            )
        if base.num_neighbours:
            raise ConfigError(
                "num_neighbours: slice_order shows the backbone single slices, found a request for "
                f"{base.num_neighbours} neighbours on each side. Set it to 0."
            )
        return replace(base, num_neighbours=self.num_neighbours, repeat_slices=False)

    def in_channels(self, request: SampleRequest) -> int:
        """Return the channels of a single slice: its sequences."""
        return request.num_sequences

    def make_batch(self, images: Tensor, generator: torch.Generator) -> PretextBatch:
        """Take five slices of each image, and make its eight puzzles.

        Args:
            images: (B, C * (4 * step + 1), X, Y): of each sequence the neighbouring slices.
            generator: on the images' device.

        Returns:
            inputs: (B * 5, C, X - jitter, Y - jitter); target: (B * 8,), 1 where ordered;
            extras: ``triplets`` (B, 8, 3), which of its image's slices each puzzle holds;
            ``weight`` (B * 8,); ``foreground`` (B, 5), the share of each slice that is not air.
        """
        depth = 2 * self.num_neighbours + 1
        if images.shape[1] % depth:
            raise ConfigError(
                f"slice_order takes {depth} neighbouring slices of each sequence as channels, "
                f"found images of shape {tuple(images.shape)}. Sample them by the task's request."
            )
        num_images, device = len(images), images.device
        # The channels run through the slices first, then through the sequences.
        slices = images.unflatten(1, (-1, depth))[:, :, :: self.config.step].transpose(1, 2)
        slices = self._displaced(slices.flatten(0, 1), generator).unflatten(0, (num_images, -1))
        level = air_level(slices.transpose(1, 2).flatten(2))  # of each sequence's slices together
        foreground = foreground_share(slices, level)
        solid = foreground >= self.config.min_foreground  # (B, 5)
        # All puzzles of an image count, or none: where an organ ends, only one of the two kinds
        # could be left.
        weight = solid.all(dim=1, keepdim=True).float().expand(-1, len(TRIPLETS))
        triplets = self.triplets.to(device, non_blocking=True)
        return PretextBatch(
            inputs=level_tiles(slices, self.config, generator).flatten(0, 1),
            target=self.labels.to(device, non_blocking=True).repeat(num_images),
            task=self.name,
            extras={
                "triplets": triplets.expand(num_images, -1, -1),
                "weight": weight.flatten(),
                "foreground": foreground,
            },
        )

    def _displaced(self, slices: Tensor, generator: torch.Generator) -> Tensor:
        """Cut from slices (N, C, X, Y) parts that lie elsewhere in each."""
        size = tuple(slices.shape[2:])
        jitter = self.config.displacement(size)
        part = tuple(side - jitter for side in size)
        return cut_tiles(slices, grid_cells(1, 2), 1, part, 0, jitter, generator).squeeze(1)

    def build_head(self, backbone: Backbone) -> nn.Module:
        return SiameseHead(backbone.embedding_channels, 3, self.num_classes, self.config.hidden)

    def forward(self, backbone: Backbone, head: nn.Module, batch: PretextBatch) -> Tensor:
        triplets = batch.extras["triplets"]  # (B, 8, 3)
        embedded = backbone.embed(batch.inputs).unflatten(0, (-1, _NUM_SLICES))  # (B, 5, D)
        image = torch.arange(len(triplets), device=triplets.device)[:, None, None]
        logits: Tensor = head(embedded[image, triplets].flatten(0, 1))
        return logits

    def baselines(self, batch: PretextBatch) -> dict[str, float]:
        """Return how often two rules are right that look at no anatomy.

        ``area_rule_accuracy``: ordered where the middle slice has no more foreground than one end
        and no less than the other. ``difference_rule_accuracy``: ordered where the ends differ more
        from each other, voxel by voxel, than the middle slice from either.

        Empty where no puzzle of the batch counts.
        """
        weight = batch.extras["weight"].double().cpu()
        if not weight.any():
            return {}
        triplets, area = batch.extras["triplets"].cpu(), batch.extras["foreground"].cpu()
        slices = batch.inputs.float().cpu().unflatten(0, (-1, _NUM_SLICES)).flatten(2)
        difference = torch.cdist(slices, slices)  # (B, 5, 5)
        image = torch.arange(len(triplets))[:, None]
        first, middle, last = triplets.unbind(2)  # each (B, 8)
        area_first, area_middle, area_last = (area[image, x] for x in (first, middle, last))
        ends = difference[image, first, last]
        rules = {
            "area_rule_accuracy": (area_first - area_middle) * (area_middle - area_last) >= 0,
            "difference_rule_accuracy": (ends > difference[image, first, middle])
            & (ends > difference[image, middle, last]),
        }
        ordered = batch.target.cpu() == 1
        return {
            name: float(((rule.flatten() == ordered) * weight).sum() / weight.sum())
            for name, rule in rules.items()
        }

    def class_names(self) -> Sequence[str]:
        return ("shuffled", "ordered")

    def panels(self, batch: PretextBatch, output: Tensor | None) -> list[list[Panel]]:
        names = self.class_names()
        answers = [None] * len(batch.target) if output is None else output.argmax(1).tolist()
        triplets = batch.extras["triplets"].cpu()
        slices = batch.inputs.unflatten(0, (-1, _NUM_SLICES))
        # Evenly through the batch: different images, and both kinds of puzzles.
        shown = torch.linspace(0, len(batch.target) - 1, min(_NUM_PANELS, len(batch.target)))
        rows = []
        for item in shown.long().tolist():
            image, puzzle = divmod(item, len(TRIPLETS))
            title = answer_title(names, int(batch.target[item]), answers[item])
            if not batch.extras["weight"][item]:
                title += ", left out"
            places = triplets[image, puzzle].tolist()
            titles = ("first", title, "last")
            rows.append(
                [
                    Panel(middle_slice(slices[image, place]), text)
                    for place, text in zip(places, titles, strict=True)
                ]
            )
        return rows
