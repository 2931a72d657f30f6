"""The residual networks of MONAI, in 3D (or 2D), without their classifier.

Source: Hara et al., Can spatiotemporal 3D CNNs retrace the history of 2D CNNs and ImageNet?,
CVPR 2018, as implemented by MONAI.
"""

from __future__ import annotations

from typing import Literal

from monai.networks.nets.resnet import ResNet
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from medssl.config import ComponentConfig
from medssl.models.backbones.base import Backbone, Stage

BLOCKS: dict[int, tuple[str, list[int]]] = {
    10: ("basic", [1, 1, 1, 1]),
    18: ("basic", [2, 2, 2, 2]),
    34: ("basic", [3, 4, 6, 3]),
    50: ("bottleneck", [3, 4, 6, 3]),
}
EXPANSION = {"basic": 1, "bottleneck": 4}

INPUT_MEAN, INPUT_STD = 0.5, 0.5
"""Brings images in [0, 1] to [-1, 1]."""


class Config(ComponentConfig):
    """Which residual network.

    Attributes:
        variant: the kind of network.
        depth: number of layers.
        spatial_dims: 2 or 3.
        base_channels: feature maps of the stem; the layers have 1, 2, 4 and 8 times as many.
        stem_stride: 2 halves the image at once, as in 2D; 1 keeps small structures, at eight times
            the cost of the stem in 3D. All later strides follow.
        shortcut: how a block that halves the resolution passes its input on: ``B`` through a
            1 x 1 convolution, ``A`` as it is, every second voxel, with channels of zeros added
            (MedicalNet's networks of depth 18 and 34).
    """

    name: Literal["monai"] = "monai"
    variant: Literal["resnet"] = "resnet"
    depth: Literal[10, 18, 34, 50] = 18
    spatial_dims: Literal[2, 3] = 3
    base_channels: int = Field(default=64, ge=4, le=256)
    stem_stride: Literal[1, 2] = 2
    shortcut: Literal["A", "B"] = "B"


class _ResNet(ResNet):
    """MONAI's network, whose shortcut of type A passes gradients on; MONAI's detaches it."""

    def _downsample_basic_block(
        self, x: Tensor, planes: int, stride: int, spatial_dims: int = 3
    ) -> Tensor:
        every = (slice(None, None, stride),) * spatial_dims
        taken = x[(slice(None), slice(None), *every)]
        added = planes - taken.shape[1]
        return functional.pad(taken, (0, 0) * spatial_dims + (0, added))


class MonaiBackbone(Backbone):
    """A residual network in five stages: its stem and its four layers.

    No ImageNet weights exist for it.
    """

    def __init__(self, config: Config, in_channels: int = 1) -> None:
        block, layers = BLOCKS[config.depth]
        widths = [config.base_channels * factor for factor in (1, 2, 4, 8)]
        net = _ResNet(
            block,
            layers,
            widths,
            spatial_dims=config.spatial_dims,
            n_input_channels=in_channels,
            conv1_t_stride=config.stem_stride,
            shortcut_type=config.shortcut,
            feed_forward=False,
            bias_downsample=False,  # a batch norm follows, which takes any bias away
        )
        channels = [config.base_channels, *(width * EXPANSION[block] for width in widths)]
        names = ("stem", "layer1", "layer2", "layer3", "layer4")
        super().__init__(
            config,
            in_channels=in_channels,
            spatial_dims=config.spatial_dims,
            stages=tuple(
                Stage(name, width, (config.stem_stride * 2**depth,) * config.spatial_dims)
                for depth, (name, width) in enumerate(zip(names, channels, strict=True))
            ),
            input_mean=(INPUT_MEAN,) * in_channels,
            input_std=(INPUT_STD,) * in_channels,
        )
        self.net = net

    def extract(self, x_BC: Tensor) -> list[Tensor]:
        """See `Backbone.extract`."""
        net = self.net
        x = net.act(net.bn1(net.conv1(x_BC)))
        features = [x]
        x = net.maxpool(x)
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            features.append(x)
        return features
