"""Decoders: from the features of a backbone's stages back to the images' own grid."""

from __future__ import annotations

from typing import Literal, cast

import torch
from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetOutBlock
from torch import Tensor, nn
from torch.nn import functional

from medssl.errors import ConfigError
from medssl.models.backbones.base import Backbone

DEFAULT_CHANNELS = (256, 128, 64, 32, 16)
"""Feature maps of the levels, coarse to fine; a backbone of fewer stages uses the last ones."""

CHANNELS_PER_GROUP = 8


class UNetDecoder(nn.Module):
    """A U-Net's way up: enlarge, join the skip of the next finer stage, two convolutions.

    Every level is brought to the exact size of the next finer stage, whatever the strides, so the
    output has the size asked for, also where it is no multiple of a stride. Enlarging repeats the
    nearest voxel, whose gradient is deterministic on every device; the convolutions smooth it.

    Args:
        backbone: whose stages are decoded; only its declarations are used.
        out_channels: channels of the output.
        channels: feature maps of the levels, coarse to fine: one for every stage but the coarsest,
            and one for the image's own grid.
        norm: ``instance`` (each image and channel alone), ``group`` (groups of 8 channels), or
            ``batch``. The first two do not depend on the batch, nor differ in evaluation mode.

    Raises:
        ConfigError: ``channels`` has not one entry a level.
    """

    def __init__(
        self,
        backbone: Backbone,
        out_channels: int,
        channels: tuple[int, ...] | None = None,
        norm: Literal["instance", "group", "batch"] = "instance",
    ) -> None:
        super().__init__()
        dims = backbone.spatial_dims
        stages = backbone.stages
        levels = len(stages)
        widths = channels if channels is not None else _default_channels(levels)
        if len(widths) != levels:
            raise ConfigError(
                f"decoder channels: found {len(widths)} levels {widths}, wanted {levels} for "
                f"backbone {backbone.describe()}: one for each of its stages."
            )
        self.stages = stages
        below = stages[-1].channels
        blocks: list[nn.Module] = []
        skips = [*(stage.channels for stage in stages[-2::-1]), 0]  # the image's grid has no skip
        for width, skip in zip(widths, skips, strict=True):
            blocks.append(UnetBasicBlock(dims, below + skip, width, 3, 1, _norm(norm, width)))
            below = width
        self.blocks = nn.ModuleList(blocks)
        self.out = UnetOutBlock(dims, below, out_channels)

    def inner_state(self) -> dict[str, Tensor]:
        """Return the weights of all layers but the last, which belongs to what is drawn."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("out.")}

    def forward(self, features: list[Tensor], size: tuple[int, ...]) -> Tensor:
        """Return (B, out_channels, *size).

        Args:
            features: what the backbone returned, finest first.
            size: spatial size of the images.
        """
        x = features[-1]
        skips: list[Tensor | None] = [*features[-2::-1], None]
        for block, skip in zip(self.blocks, skips, strict=True):
            if skip is None:
                x = block(_enlarge(x, size))
            else:
                x = block(torch.cat([_enlarge(x, tuple(skip.shape[2:])), skip], dim=1))
        return cast("Tensor", self.out(x))


def decoder_in(head: nn.Module) -> UNetDecoder | None:
    """Return the decoder that a task's head is or holds: the first, or None where there is none."""
    return next((part for part in head.modules() if isinstance(part, UNetDecoder)), None)


def _enlarge(x: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return functional.interpolate(x, size=size, mode="nearest-exact")


def _default_channels(levels: int) -> tuple[int, ...]:
    extra = (DEFAULT_CHANNELS[0],) * max(0, levels - len(DEFAULT_CHANNELS))
    return (*extra, *DEFAULT_CHANNELS)[-levels:]


def _norm(norm: str, channels: int) -> tuple[str, dict[str, object]]:
    if norm == "group":
        return ("group", {"num_groups": max(1, channels // CHANNELS_PER_GROUP)})
    if norm == "instance":
        # One channel a group is the same, and takes the single voxel that a small crop may leave.
        return ("group", {"num_groups": channels})
    return (norm, {"affine": True})
