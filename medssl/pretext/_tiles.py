"""Tiles: patches cut from the cells of a grid over the image, one a cell, on the device.

Source of grid, gap and jitter: Doersch, Gupta, Efros, "Unsupervised visual representation learning
by context prediction", ICCV 2015. Standardising each tile alone: Kolesnikov, Zhai, Beyer,
"Revisiting self-supervised visual representation learning", CVPR 2019 (section 3.2).
"""

from __future__ import annotations

from itertools import product

import torch
from pydantic import Field, model_validator
from torch import Tensor

from medssl.errors import ConfigError
from medssl.pretext.base import PretextConfig

MIN_TILE = 4
"""Smallest side of a tile, voxels: less shows no structure."""

DEVIATION_FLOOR = 0.02
"""Least deviation, of the prepared range [0, 1], that a tile is divided by: in a tile of air or
fluid, anything less would blow noise up to the contrast of anatomy."""

_SPREAD = 1 / 6
"""A standardised tile is shown as 0.5 + z / 6: three deviations to each side fill [0, 1]."""


class LevelsConfig(PretextConfig):
    """What tasks that show several parts of a scan, each alone, have in common.

    Attributes:
        min_foreground: least share of a part that must not be air for its puzzle to count.
        standardise: give every part the same mean and deviation, so that these cannot tell where
            it lies.
        intensity_jitter: largest random change of a part's brightness and contrast, for
            intensities with a meaning of their own (CT), where parts are not standardised.
    """

    min_foreground: float = Field(default=0.1, ge=0, le=1)
    standardise: bool = True
    intensity_jitter: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> LevelsConfig:
        if self.standardise and self.intensity_jitter:
            raise ValueError(
                f"intensity_jitter {self.intensity_jitter} has no effect on parts that are "
                "standardised; set standardise: false with it"
            )
        return self


class TilesConfig(LevelsConfig):
    """What tasks that cut tiles have in common.

    Attributes:
        tile: side of a tile, voxels; by default what gap and jitter leave of a cell.
        gap: least distance between the tiles of neighbouring cells, voxels: edges that go on from
            one tile into the next would tell the answer. Default: an eighth of a cell.
        jitter: largest displacement of a tile within its cell, voxels. Default: an eighth of a
            cell.
    """

    tile: int | None = Field(default=None, ge=MIN_TILE)
    gap: int | None = Field(default=None, ge=0)
    jitter: int | None = Field(default=None, ge=0)

    def sizes(self, crop_size: tuple[int, ...], grid: int) -> tuple[tuple[int, ...], int, int]:
        """Return the tile's size, the gap and the jitter, in voxels, for a crop.

        Raises:
            ConfigError: they do not fit into a cell.
        """
        cell = tuple(size // grid for size in crop_size)
        eighth = min(cell) // 8
        gap = eighth if self.gap is None else self.gap
        jitter = eighth if self.jitter is None else self.jitter
        if self.tile is None:
            tile = tuple(side - gap - jitter for side in cell)
        else:
            tile = (self.tile,) * len(cell)
        if min(tile) < MIN_TILE or any(
            part + gap + jitter > side for part, side in zip(tile, cell, strict=True)
        ):
            raise ConfigError(
                f"sampling.crop_size: {list(crop_size)} gives {grid} cells an axis of "
                f"{list(cell)} voxels, which do not hold tiles of {list(tile)} with a gap of "
                f"{gap} and a jitter of {jitter} (smallest tile: {MIN_TILE}). Take a larger crop, "
                "or a smaller pretext.tile, gap or jitter."
            )
        return tile, gap, jitter


def grid_cells(grid: int, dims: int) -> Tensor:
    """Return the cells of a grid by their places, (grid**dims, dims), the last axis fastest."""
    return torch.tensor(list(product(range(grid), repeat=dims)))


def cut_tiles(
    images: Tensor,
    cells: Tensor,
    grid: int,
    tile: tuple[int, ...],
    gap: int,
    jitter: int,
    generator: torch.Generator,
) -> Tensor:
    """Cut a tile from each of some cells, displaced at random, without padding.

    Args:
        images: (B, C, *S).
        cells: (T, D) places in the grid, from 0 to grid - 1 along each axis; on the host.
        grid: cells along each axis; voxels left over by the division lie evenly on both sides.
        tile: the tile's size along each axis.
        gap: least distance between tiles of neighbouring cells.
        jitter: largest displacement; also what is left of a cell beside tile and gap.
        generator: on the images' device.

    Returns:
        (B, T, C, *tile).
    """
    num_images, dims, device = len(images), images.ndim - 2, images.device
    # Sizes are known on the host: what is made of them there is copied without waiting.
    size = torch.tensor(images.shape[2:])
    cell = size // grid
    first = (size - cell * grid + gap) // 2 + cells * cell  # (T, D): half a gap on either side
    first = first.to(device, non_blocking=True)
    room = (cell - torch.tensor(tile) - gap).clamp(max=jitter).to(device, non_blocking=True)
    share = torch.rand((num_images, len(cells), dims), device=device, generator=generator)
    start = first + (share * (room + 1)).floor().long().minimum(room)  # (B, T, D)
    return cut_parts(images, start, tile)


def cut_parts(images: Tensor, start: Tensor, size: tuple[int, ...]) -> Tensor:
    """Cut parts of a given size out of each image, (B, T, C, *size).

    Args:
        images: (B, C, *S).
        start: (B, T, D) long, first voxel of each part; parts lie inside the image.
        size: of the parts.
    """
    dims = images.ndim - 2
    index = torch.zeros((*start.shape[:2], *[1] * dims), dtype=torch.long, device=images.device)
    for axis, side in enumerate(size):
        shape = [side if other == axis else 1 for other in range(dims)]
        steps = torch.arange(side, device=images.device).reshape(shape)
        place = start[..., axis].reshape(*start.shape[:2], *[1] * dims) + steps
        index = index * images.shape[2 + axis] + place
    flat = images.flatten(2)  # (B, C, voxels)
    wanted = index.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    parts = flat.gather(2, wanted).reshape(*images.shape[:2], start.shape[1], *size)
    return parts.transpose(1, 2)


def foreground_share(tiles: Tensor, level: Tensor) -> Tensor:
    """Return the share of each tile's voxels that are not air in any channel, (B, T).

    Args:
        tiles: (B, T, C, *tile), not levelled yet.
        level: `air_level` of the images they were cut from: (B, C), or (B, T, C) where an image's
            tiles are from several.
    """
    if level.ndim == 2:
        level = level[:, None]
    bright = tiles >= level.reshape(*level.shape, *[1] * (tiles.ndim - 3))
    return bright.any(dim=2).flatten(2).float().mean(2)


def level_tiles(tiles: Tensor, config: LevelsConfig, generator: torch.Generator) -> Tensor:
    """Return tiles whose brightness and contrast tell less of where they lie, in [0, 1].

    Args:
        tiles: (B, T, C, *tile) in [0, 1].
        config: whether to standardise, or how far to vary.
        generator: on the tiles' device.
    """
    axes = tuple(range(3, tiles.ndim))
    mean = tiles.mean(axes, keepdim=True)
    if config.standardise:
        deviation = (tiles - mean).square().mean(axes, keepdim=True).sqrt()
        return (0.5 + _SPREAD * (tiles - mean) / deviation.clamp(min=DEVIATION_FLOOR)).clamp(0, 1)
    if config.intensity_jitter:
        shape = (*tiles.shape[:2], *[1] * (tiles.ndim - 2))
        brightness, contrast = (
            config.intensity_jitter
            * (2 * torch.rand(shape, device=tiles.device, generator=generator) - 1)
            for _ in range(2)
        )
        return (mean + (tiles - mean) * (1 + contrast) + brightness).clamp(0, 1)
    return tiles
