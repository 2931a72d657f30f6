"""Relative position: tell in which direction one tile lies, seen from another.

Source: Doersch, Gupta, Efros, "Unsupervised visual representation learning by context prediction",
ICCV 2015; in 3D, Taleb et al., "3D self-supervised methods for medical imaging", NeurIPS 2020.

Ways to the answer that do not lead through the anatomy, and what is done about them: lines that go
on from one tile into the next (a gap between the tiles), equal distances from tile to tile (a
random displacement of each), brightness that falls off towards one side, as with surface coils
(each tile is standardised), and padded borders (crops lie inside the scan). Tiles of air tell
nothing: their puzzles have no weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.errors import ConfigError
from medssl.models.backbones.base import Backbone
from medssl.models.heads import SiameseHead
from medssl.pretext._tiles import TilesConfig, cut_tiles, foreground_share, grid_cells, level_tiles
from medssl.pretext.base import (
    ClassificationTask,
    Panel,
    PretextBatch,
    air_level,
    answer_title,
    middle_slice,
)
from medssl.transforms.sampling import SampleRequest

_GRID = 3
"""Cells along each axis: one in the middle, and its neighbours on either side."""

_NUM_PANELS = 6


class Config(TilesConfig):
    """Configuration of the relative position task.

    Attributes:
        neighbours: of the middle tile, that take part in each image: ``all``, or a number of
            different ones drawn at random. Default: all 8 in 2D, 8 of 26 in 3D.
        both_directions: ask of each pair where the neighbour lies, seen from the middle, and where
            the middle lies, seen from the neighbour; otherwise the first question alone.
        hidden: units of the hidden layer of the head.
    """

    name: Literal["relative_position"] = "relative_position"
    neighbours: Literal["all"] | int | None = None
    both_directions: bool = True
    hidden: int = Field(default=512, ge=1)


def neighbour_directions(spatial_dims: int) -> Tensor:
    """Return the steps from a cell to its neighbours, (3**D - 1, D), each -1, 0 or +1.

    The opposite of direction ``d`` is the one as far from the end as ``d`` is from the beginning.
    """
    steps = [step for step in product((-1, 0, 1), repeat=spatial_dims) if any(step)]
    return torch.tensor(steps)


class RelativePosition(ClassificationTask):
    """Predict the direction from the first tile of a pair to the second.

    Each tile is embedded once and alone, and takes part in all its pairs by its embedding.
    """

    def __init__(self, config: Config, spatial_dims: int) -> None:
        super().__init__(config, spatial_dims)
        self.directions = neighbour_directions(spatial_dims)
        self.num_classes = len(self.directions)
        neighbours = config.neighbours
        if neighbours is None:
            neighbours = "all" if spatial_dims == 2 else 8
        self.neighbours = self.num_classes if neighbours == "all" else int(neighbours)
        if not 1 <= self.neighbours <= self.num_classes:
            raise ConfigError(
                f"pretext.neighbours: {self.neighbours} neighbours of the middle tile asked for; "
                f"in {spatial_dims}D it has {self.num_classes}. "
                f"Choose 1 to {self.num_classes}, or all."
            )
        self.chance_level = 1 / self.num_classes
        self.healthy_range = (2 * self.chance_level, 0.99)

    def request(self, base: SampleRequest) -> SampleRequest:
        """Ask for crops that hold the tiles, inside the scan: zeros would tell the direction."""
        self.config.sizes(base.crop_size, _GRID)
        return replace(base, allow_padding=False)

    def make_batch(self, images: Tensor, generator: torch.Generator) -> PretextBatch:
        """Cut tiles and pair them.

        Returns:
            inputs: (B * (1 + V), C, *tile), of each image the middle tile and V neighbours;
            target: (B * P,) for P pairs an image: V from the middle to a neighbour and, if asked
            for, V the other way; extras: ``pairs`` (B, P, 2), which of its image's tiles are the
            first and the second of each pair, and ``weight`` (B * P,).
        """
        num_images, device = len(images), images.device
        tile, gap, jitter = self.config.sizes(tuple(images.shape[2:]), _GRID)
        cells = grid_cells(_GRID, self.spatial_dims)
        tiles = cut_tiles(images, cells, _GRID, tile, gap, jitter, generator)

        labels = self._balanced_labels(num_images, device, generator)  # (B, V)
        # Cells and directions are in the same order, but that the middle is no direction.
        middle = self.num_classes // 2
        place = torch.cat(
            [labels.new_full((num_images, 1), middle), labels + (labels >= middle)], dim=1
        )
        tiles = tiles[torch.arange(num_images, device=device)[:, None], place]
        solid = (
            foreground_share(tiles, air_level(images)) >= self.config.min_foreground
        )  # (B, 1 + V)

        neighbour = torch.arange(1, 1 + self.neighbours, device=device)
        pairs = torch.stack([torch.zeros_like(neighbour), neighbour], dim=1)
        if self.config.both_directions:
            pairs = torch.cat([pairs, pairs.flip(1)])
            labels = torch.cat([labels, self._opposite(labels)], dim=1)
        return PretextBatch(
            inputs=level_tiles(tiles, self.config, generator).flatten(0, 1),
            target=labels.flatten(),
            task=self.name,
            extras={
                "pairs": pairs.expand(num_images, -1, -1),
                "weight": solid[:, pairs].all(dim=2).float().flatten(),
            },
        )

    def _opposite(self, labels: Tensor) -> Tensor:
        return self.num_classes - 1 - labels

    def _balanced_labels(
        self, num_images: int, device: torch.device, generator: torch.Generator
    ) -> Tensor:
        """Draw directions, (B, V): different ones for each image, all equally often in a batch.

        Equally often means to within one, and holds also for directions taken with their opposites.
        """
        count = num_images * self.neighbours
        # One of each two opposites comes first, then the others: whatever number of directions is
        # dealt out, their opposites make the numbers no less equal.
        lines = self.num_classes // 2
        # Each order is dealt out again and again until an image's share ends with it: with a fresh
        # one in the middle of an image, a direction could come twice.
        dealt = math.lcm(self.num_classes, self.neighbours)
        shape = (-(-count // dealt), lines)
        line = torch.rand(shape, device=device, generator=generator).argsort(1)
        turned = torch.rand(shape, device=device, generator=generator) < 0.5
        first = torch.where(turned, self._opposite(line), line)
        order = torch.cat([first, self._opposite(first)], dim=1)
        labels = order.repeat(1, dealt // self.num_classes).flatten()[:count]
        return labels.reshape(num_images, self.neighbours)

    def build_head(self, backbone: Backbone) -> nn.Module:
        return SiameseHead(backbone.embedding_channels, 2, self.num_classes, self.config.hidden)

    def forward(self, backbone: Backbone, head: nn.Module, batch: PretextBatch) -> Tensor:
        pairs = batch.extras["pairs"]  # (B, P, 2)
        embedded = backbone.embed(batch.inputs).unflatten(0, (len(pairs), -1))  # (B, 1 + V, D)
        image = torch.arange(len(pairs), device=pairs.device)[:, None, None]
        logits: Tensor = head(embedded[image, pairs].flatten(0, 1))
        return logits

    def class_names(self) -> Sequence[str]:
        """Return the directions as steps along the crop's axes.

        Not as words (right, anterior): planes have different axes, and augmentation may mirror
        them.
        """
        return [direction_name(step) for step in self.directions.tolist()]

    def panels(self, batch: PretextBatch, output: Tensor | None) -> list[list[Panel]]:
        names = self.class_names()
        answers = [None] * len(batch.target) if output is None else output.argmax(1).tolist()
        pairs = batch.extras["pairs"].cpu()
        tiles = batch.inputs.unflatten(0, (len(pairs), -1))
        # Evenly through the batch: different images, and both directions.
        shown = torch.linspace(0, len(batch.target) - 1, min(_NUM_PANELS, len(batch.target)))
        rows = []
        for item in shown.long().tolist():
            image, pair = divmod(item, pairs.shape[1])
            first, second = pairs[image, pair].tolist()
            title = answer_title(names, int(batch.target[item]), answers[item])
            if not batch.extras["weight"][item]:
                title += ", left out"
            rows.append(
                [
                    Panel(middle_slice(tiles[image, first]), "seen from here"),
                    Panel(middle_slice(tiles[image, second]), title),
                ]
            )
        return rows


def direction_name(step: Sequence[int]) -> str:
    """Return a direction as people write it: ``(-1, +1)``, zero without a sign."""
    return f"({', '.join(f'{part:+d}' if part else '0' for part in step)})"
