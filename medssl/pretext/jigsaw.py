"""Jigsaw: tell by which of a set of permutations the tiles of an image were shuffled.

Source: Noroozi, Favaro, "Unsupervised learning of visual representations by solving jigsaw
puzzles", ECCV 2016; in 3D, Taleb et al., "3D self-supervised methods for medical imaging", NeurIPS
2020. Encoding each tile once and shuffling the embeddings, several times an image: Kolesnikov,
Zhai, Beyer, "Revisiting self-supervised visual representation learning", CVPR 2019 (section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.errors import ConfigError
from medssl.models.backbones.base import Backbone
from medssl.models.heads import SiameseHead
from medssl.pretext._labels import deal_labels
from medssl.pretext._permutations import PermutationKind, largest_set, permutation_set
from medssl.pretext._tiles import (
    TilesConfig,
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

_NUM_PANELS = 3

_DEFAULT_SIZES = {4: 24, 8: 24, 9: 100, 27: 100}
"""Permutations by the number of tiles: 100 is the easiest set of the literature; 2x2 tiles have no
more than 24 permutations, and 2x2x2 tiles of small crops show too little for many more."""

_LINE = 1
"""Width of the lines between the tiles of a picture, voxels."""

_TILES_IN_NAME = 9
"""Tiles that the name of a class tells: all of them, but for 3x3x3."""

_TILE_NUMBERS = "0123456789abcdefghijklmnopq"
"""One character a tile, so that names stay short."""


class Config(TilesConfig):
    """Configuration of the jigsaw task.

    Attributes:
        grid: tiles along each axis. Default: 3 in 2D, 2 in 3D.
        permutations: how the set is made. ``greedy_max_min``, of any size; ``agl``, all as far
            apart as can be, but two tiles tell them apart; ``pgl``, the same with three tiles, for
            3x3 alone.
        num_permutations: size of the set, and the difficulty of the task; the literature goes to
            10 000. Default: 100 (24 for 2x2 and 2x2x2), or all that the kind has.
        permutation_seed: which of many equally good sets; not the study's seed, so that all runs
            of a study solve the same puzzles.
        permutations_per_image: puzzles made from each image, all different. Default: 8, or all
            where there are fewer.
        max_air_tiles: tiles of an image that may be air before its puzzles no longer count.
            Air tiles look alike, so there must be fewer of them than places at which the nearest
            two permutations differ.
        hidden: units of the hidden layer of the head.
        encode_once: encode each tile once and shuffle the embeddings. Otherwise the tiles are
            shuffled and encoded for each puzzle anew: the same answers at several times the cost,
            to measure against.
    """

    name: Literal["jigsaw"] = "jigsaw"
    grid: Literal[2, 3] | None = None
    permutations: PermutationKind = "greedy_max_min"
    num_permutations: int | None = Field(default=None, ge=2, le=10_000)
    permutation_seed: int = Field(default=0, ge=0)
    permutations_per_image: int | None = Field(default=None, ge=1)
    max_air_tiles: int = Field(default=1, ge=0)
    hidden: int = Field(default=512, ge=1)
    encode_once: bool = True


def shuffle(tiles: Tensor, order: Tensor) -> Tensor:
    """Shuffle the tiles of each image, or what stands for them, by several permutations.

    Args:
        tiles: (B, T, *), any number of further axes.
        order: (B, P, T) long: place t of puzzle p shows tile ``order[b, p, t]``.

    Returns:
        (B, P, T, *). The gradient is deterministic on every device.
    """
    image = torch.arange(len(tiles), device=tiles.device)[:, None, None]
    return tiles[image, order]


def mosaic(tiles_TCS: Tensor, grid: int) -> Tensor:
    """Lay tiles out in their places as one picture with white lines between them.

    Args:
        tiles_TCS: (T, C, *tile), the last axis of the grid fastest.
        grid: tiles along each axis.

    Returns:
        (X, Y) on the CPU, the first channel. Of 3D tiles the middle slice is shown; the layers of
        the grid along Z lie side by side along Y, a double line between them.
    """
    pictures = torch.stack([middle_slice(tile) for tile in tiles_TCS])
    dims = tiles_TCS.ndim - 2
    places = pictures.reshape(*[grid] * dims, *pictures.shape[1:])
    layers = places.unbind(2) if dims == 3 else (places,)
    lined = []
    for layer in layers:
        framed = nn.functional.pad(layer, (0, _LINE, 0, _LINE), value=1.0)
        lined.append(framed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1))
    apart = [nn.functional.pad(layer, (0, _LINE), value=1.0) for layer in lined]
    return torch.cat(apart, dim=1)[:-_LINE, : -2 * _LINE]


class Jigsaw(ClassificationTask):
    """Predict the permutation by which the tiles were shuffled.

    Attributes:
        permutation_set: the classes, with their distances and hash.
    """

    def __init__(self, config: Config, spatial_dims: int) -> None:
        super().__init__(config, spatial_dims)
        self.grid: int = config.grid or (3 if spatial_dims == 2 else 2)
        self.num_tiles = self.grid**spatial_dims
        limit = largest_set(config.permutations, self.num_tiles)
        self.num_classes = config.num_permutations or min(_DEFAULT_SIZES[self.num_tiles], limit)
        self.permutation_set = permutation_set(
            config.permutations, self.num_tiles, self.num_classes, config.permutation_seed
        )
        if config.max_air_tiles >= self.permutation_set.min_hamming:
            raise ConfigError(
                f"pretext.max_air_tiles: with {config.max_air_tiles} tiles of air, which look "
                "alike, some puzzles have two answers: two permutations of the set differ at "
                f"{self.permutation_set.min_hamming} places only. Allow fewer tiles of air, or "
                "take a smaller pretext.num_permutations."
            )
        self.puzzles_per_image: int = config.permutations_per_image or min(8, self.num_classes)
        if self.puzzles_per_image > self.num_classes:
            raise ConfigError(
                f"pretext.permutations_per_image: {self.puzzles_per_image} different permutations "
                f"of an image asked for; the set has {self.num_classes}. "
                f"Choose 1 to {self.num_classes}."
            )
        self.chance_level = 1 / self.num_classes
        # Stuck below five times chance; where there are few permutations, below half way to all.
        low = min(5 * self.chance_level, (1 + self.chance_level) / 2)
        self.healthy_range = (low, 0.99)

    def request(self, base: SampleRequest) -> SampleRequest:
        """Ask for crops inside the scan that the grid fits into.

        A padded border would tell a tile's place without a look at the anatomy.
        """
        self.config.sizes(base.crop_size, self.grid)
        return replace(base, allow_padding=False)

    def contract(self) -> dict[str, Any]:
        made = self.permutation_set
        return {
            "permutation_set_hash": made.hash,
            "permutation_set": {
                "name": made.name,
                "size": len(made.permutations),
                "min_hamming": made.min_hamming,
                "mean_hamming": made.mean_hamming,
            },
        }

    def make_batch(self, images: Tensor, generator: torch.Generator) -> PretextBatch:
        config = self.config
        tile, gap, jitter = config.sizes(tuple(images.shape[2:]), self.grid)
        cells = grid_cells(self.grid, self.spatial_dims)
        tiles = cut_tiles(images, cells, self.grid, tile, gap, jitter, generator)
        air = foreground_share(tiles, air_level(images)) < config.min_foreground
        solvable = (air.sum(1) <= config.max_air_tiles).float()
        tiles = level_tiles(tiles, config, generator)
        labels = deal_labels(
            len(images), self.puzzles_per_image, self.num_classes, images.device, generator
        )
        permutations = self.permutation_set.permutations.to(images.device, non_blocking=True)
        order = permutations[labels]  # (B, P, T)
        inputs = tiles.flatten(0, 1) if config.encode_once else shuffle(tiles, order).flatten(0, 2)
        return PretextBatch(
            inputs=inputs,
            target=labels.flatten(),
            task=self.name,
            extras={
                "order": order,
                "shown": images[:_NUM_PANELS].clone(),  # for panels; not all, to save memory
                "weight": solvable.repeat_interleave(self.puzzles_per_image),
            },
        )

    def build_head(self, backbone: Backbone) -> nn.Module:
        return SiameseHead(
            backbone.embedding_channels, self.num_tiles, self.num_classes, self.config.hidden
        )

    def forward(self, backbone: Backbone, head: nn.Module, batch: PretextBatch) -> Any:
        order = batch.extras["order"]
        embedded = backbone.embed(batch.inputs)
        if self.config.encode_once:
            tiles_BTC = embedded.reshape(len(order), self.num_tiles, -1)
            shuffled_BPTC = shuffle(tiles_BTC, order)
        else:
            shuffled_BPTC = embedded.reshape(*order.shape, -1)
        return head(shuffled_BPTC.flatten(0, 1))

    def class_names(self) -> Sequence[str]:
        """Return the classes by number and by the tiles, in order, that the places show."""
        names = []
        for number, row in enumerate(self.permutation_set.permutations.tolist()):
            shown = "".join(_TILE_NUMBERS[tile] for tile in row[:_TILES_IN_NAME])
            names.append(f"{number}: {shown}{'…' if len(row) > _TILES_IN_NAME else ''}")
        return names

    def panels(self, batch: PretextBatch, output: Tensor | None) -> list[list[Panel]]:
        names = self.class_names()
        images = batch.extras["shown"]
        answers = [None] * len(batch.target) if output is None else output.argmax(1).tolist()
        rows = []
        for image in range(len(images)):
            puzzle = image * self.puzzles_per_image  # the first of the image
            title = answer_title(names, int(batch.target[puzzle]), answers[puzzle])
            if not batch.extras["weight"][puzzle]:
                title += " (does not count: too many tiles of air)"
            rows.append(
                [
                    Panel(image_XY=middle_slice(images[image]), title="image"),
                    Panel(
                        image_XY=mosaic(self._first_puzzle(batch, image), self.grid), title=title
                    ),
                ]
            )
        return rows

    def _first_puzzle(self, batch: PretextBatch, image: int) -> Tensor:
        """Return the tiles of an image's first puzzle by the places they lie in, (T, C, *tile)."""
        order = batch.extras["order"]
        if self.config.encode_once:
            tiles = batch.inputs.reshape(len(order), self.num_tiles, *batch.inputs.shape[1:])
            return tiles[image, order[image, 0]]
        return batch.inputs.reshape(*order.shape, *batch.inputs.shape[1:])[image, 0]
