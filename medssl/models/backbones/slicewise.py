"""2D networks on volumes, slice by slice, with their ImageNet weights as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from medssl.config import ComponentConfig
from medssl.models.backbones._flat import FlatConfig, adapt_flat, build_flat, divisors_with_z
from medssl.models.backbones.base import AdaptedState, Backbone, ImagenetWeights, Stage

SLICES_AT_ONCE = 64
"""Slices that go through the network together where nothing is learnt, to bound the memory."""


class Config(ComponentConfig):
    """Which network.

    Attributes:
        backbone: the 2D network.
        pooling: how the slices' vectors become one for the volume: their mean, or the largest
            value of each feature, which lets a finding in few slices stand out.
    """

    name: Literal["slicewise"] = "slicewise"
    backbone: FlatConfig
    pooling: Literal["mean", "max"] = "mean"


class SlicewiseBackbone(Backbone):
    """A 2D network that sees each slice (X, Y) of a volume alone; its stages keep all slices.

    In training, all slices of a batch pass together, and a batch norm takes its statistics over
    them. Slices meet only in `pool` and in the head.
    """

    net: Backbone

    def __init__(self, config: Config, in_channels: int = 1) -> None:
        flat = build_flat(config.backbone, in_channels, config.name)
        super().__init__(
            config,
            in_channels=in_channels,
            spatial_dims=3,
            stages=tuple(
                Stage(stage.name, stage.channels, (*stage.stride, 1)) for stage in flat.stages
            ),
            input_mean=flat.input_mean,
            input_std=flat.input_std,
            divisor=divisors_with_z(flat),
            inside_channel=flat.inside_channel,
        )
        self.pooling = config.pooling
        self.net = flat

    def extract(self, x_BC: Tensor) -> list[Tensor]:
        """See `Backbone.extract`."""
        num_slices = x_BC.shape[-1]
        slices_BCXY = x_BC.movedim(-1, 1).flatten(0, 1)
        learning = self.training or torch.is_grad_enabled()
        # In parts only where that changes nothing: a batch norm in training sees all slices. Nor in
        # a captured program, which does not know how many there will be.
        whole = learning or torch.compiler.is_exporting()
        parts = [slices_BCXY] if whole else slices_BCXY.split(SLICES_AT_ONCE)
        found = [self.net.extract(part) for part in parts]
        return [
            torch.cat(stage).unflatten(0, (x_BC.shape[0], num_slices)).movedim(1, -1)
            for stage in zip(*found, strict=True)
        ]

    def pool(self, last_BC: Tensor) -> Tensor:
        """Return one vector a volume: each slice's global mean, then the mean or maximum of all."""
        slices_BCZ = last_BC.mean(dim=(2, 3))
        return slices_BCZ.mean(dim=2) if self.pooling == "mean" else slices_BCZ.amax(dim=2)

    @property
    def imagenet_weights(self) -> ImagenetWeights | None:
        """The published file of the 2D network."""
        return self.net.imagenet_weights

    def adapt_imagenet(self, file_state: Mapping[str, Tensor]) -> AdaptedState:
        """Adapt the file as the 2D network does."""
        config: Any = self.config
        return adapt_flat(config.backbone, self.in_channels, config.name, file_state)
