"""Inpainting: restore blocks that were cut out of the image.

Source: Pathak et al., "Context encoders: feature learning by inpainting", CVPR 2016; random blocks
at a high ratio with the loss on hidden voxels alone follow He et al., "Masked autoencoders are
scalable vision learners", CVPR 2022.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.models.backbones.base import Backbone
from medssl.models.decoders import UNetDecoder
from medssl.pretext.base import (
    FOREGROUND_LEVEL,
    Panel,
    PretextBatch,
    PretextConfig,
    PretextTask,
    middle_slice,
)

_NUM_PANELS = 3


class Config(PretextConfig):
    """Configuration of the inpainting task.

    Attributes:
        ratio: share of the foreground's blocks that is hidden.
        block: side of a block, voxels.
        fill: what the network sees in the holes: the mean of what is visible, or noise of the
            same mean and deviation.
        criterion: ``l1`` or ``l2``, on hidden voxels alone.
    """

    name: Literal["inpainting"] = "inpainting"
    ratio: float = Field(default=0.5, gt=0, lt=1)
    block: int = Field(default=8, ge=2)
    fill: Literal["mean", "noise"] = "mean"
    criterion: Literal["l1", "l2"] = "l1"


def block_mask(images: Tensor, block: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Choose the voxels to hide.

    Args:
        images: (B, C, X, Y[, Z]) in [0, 1].
        block: side of a block, voxels.
        ratio: share of each image's foreground blocks that is hidden; at least one block.
        generator: on the images' device.

    Returns:
        (B, 1, X, Y[, Z]) bool, true where hidden. Air is hidden only where an image has no
        foreground at all: restoring it would teach nothing.
    """
    dims = images.ndim - 2
    pool = nn.functional.avg_pool2d if dims == 2 else nn.functional.avg_pool3d
    level = pool(images.mean(1, keepdim=True), block, stride=block, ceil_mode=True)
    flat = (level > FOREGROUND_LEVEL).flatten(1)
    count = (flat.sum(1, keepdim=True) * ratio).round().clamp(min=1)
    order = torch.rand(flat.shape, device=images.device, generator=generator) + flat
    rank = order.argsort(1, descending=True).argsort(1)
    hidden = (rank < count).reshape(level.shape)
    for axis in range(2, images.ndim):
        hidden = hidden.repeat_interleave(block, dim=axis).narrow(axis, 0, images.shape[axis])
    return hidden


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each item's values where its mask is true, (B,)."""
    mask = mask.expand_as(values)
    total = (values * mask).flatten(1).sum(1)
    return total / mask.flatten(1).sum(1).clamp(min=1)


class Inpainting(PretextTask):
    """Restore the hidden voxels."""

    primary_metric = "masked_l1"
    higher_is_better = False
    trivial_metric = "mean_fill_l1"

    def __init__(self, config: Config, spatial_dims: int) -> None:
        super().__init__(config, spatial_dims)
        # The trivial answer is reported beside it, as the metric mean_fill_l1.
        self.chance_level = None
        self.healthy_range = (0.0, 0.1)

    def make_batch(self, images: Tensor, generator: torch.Generator) -> PretextBatch:
        hidden = block_mask(images, self.config.block, self.config.ratio, generator)
        shape = (-1, *[1] * (images.ndim - 1))
        mean = masked_mean(images, ~hidden).reshape(shape)
        if self.config.fill == "noise":
            deviation = masked_mean((images - mean) ** 2, ~hidden).sqrt().reshape(shape)
            noise = torch.empty_like(images).normal_(generator=generator)
            fill = (mean + deviation * noise).clamp(0, 1)
        else:
            fill = mean.expand_as(images)
        return PretextBatch(
            inputs=torch.where(hidden, fill, images),
            target=images,
            task=self.name,
            extras={"hidden": hidden, "mean": mean},
        )

    def build_head(self, backbone: Backbone) -> nn.Module:
        return UNetDecoder(backbone, out_channels=backbone.in_channels)

    def forward(self, backbone: Backbone, head: nn.Module, batch: PretextBatch) -> Any:
        return head(backbone(batch.inputs), tuple(batch.inputs.shape[2:]))

    def loss(self, output: Tensor, batch: PretextBatch) -> Tensor:
        error = output.float() - batch.target
        error = error.abs() if self.config.criterion == "l1" else error**2
        return masked_mean(error, batch.extras["hidden"]).mean()

    def metrics(self, output: Tensor, batch: PretextBatch) -> dict[str, Tensor]:
        hidden = batch.extras["hidden"]
        error = output.detach().float() - batch.target
        squared = masked_mean(error**2, hidden)
        trivial = (batch.extras["mean"] - batch.target).abs()
        return {
            "masked_l1": masked_mean(error.abs(), hidden).mean(),
            "masked_psnr": (-10 * torch.log10(squared.clamp(min=1e-10))).mean(),
            "mean_fill_l1": masked_mean(trivial, hidden).mean(),
        }

    def panels(self, batch: PretextBatch, output: Tensor | None) -> list[list[Panel]]:
        rows = []
        for item in range(min(_NUM_PANELS, len(batch.target))):
            image, puzzle = batch.target[item], batch.inputs[item]
            row = [Panel(middle_slice(image), "image"), Panel(middle_slice(puzzle), "puzzle")]
            if output is not None:
                restored = output[item].float().clamp(0, 1)
                restored = torch.where(batch.extras["hidden"][item], restored, image)
                row.append(Panel(middle_slice(restored), "restored"))
            rows.append(row)
        return rows
