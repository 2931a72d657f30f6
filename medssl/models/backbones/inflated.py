"""Inflated networks: 2D convolutional networks turned into 3D ones, with their ImageNet weights.

Source: Carreira & Zisserman, Quo vadis, action recognition?, CVPR 2017, section 2.4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from medssl.config import ComponentConfig
from medssl.models.backbones._flat import (
    FlatConfig,
    adapt_flat,
    build_flat,
    divisors_with_z,
)
from medssl.models.backbones.base import AdaptedState, Backbone, ImagenetWeights, Stage
from medssl.models.inflation import (
    check_law,
    inflate,
    inflate_state,
    num_draws,
    random_state,
)

_FOLLOW_THE_LAW: set[tuple[str, int]] = set()
"""Configurations, with their image channels, that this process has checked."""


class Config(ComponentConfig):
    """Which network, and what becomes of it along Z.

    The last ``log2(z_downsampling)`` halvings of X and Y halve Z too; the earlier ones leave it.
    Choose it such that voxels are about cubic once Z begins to shrink: the 2D network's own stride
    (32, as a rule), divided by slice spacing over in-plane spacing, to the nearest power of 2. For
    1 x 1 x 1 mm that is 32, the default; for 0.5 x 0.5 x 5 mm, 32 / 10, it is 4; for slices that
    have little to do with one another, 1.

    Attributes:
        backbone: the 2D network.
        z_kernel: slices that a kernel covers, at most: a 3 x 3 or 7 x 7 kernel covers so many, a
            1 x 1 kernel one. Odd.
        z_downsampling: input slices a slice of the last stage; unset: as in X and Y.
        spread: where ImageNet's kernels go: ``mean``: an equal part into each slice; ``centre``:
            into the middle slice, so that training starts from a network that sees slices singly.
            Random weights are the same for both.
    """

    name: Literal["inflated"] = "inflated"
    backbone: FlatConfig
    z_kernel: int = Field(default=3, ge=1, le=7)
    z_downsampling: int | None = Field(default=None, ge=1)
    spread: Literal["mean", "centre"] = "mean"

    @field_validator("z_kernel")
    @classmethod
    def _is_odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd, as a kernel has a middle slice")
        return value


class InflatedBackbone(Backbone):
    """A 2D network's stages in 3D, with its normalisation; Z is the last axis.

    The architecture does not depend on the init. Random weights are fresh 3D ones, drawn by the 2D
    network's own scheme with the fan of 3D kernels (see `medssl.models.inflation.random_state`),
    and not 2D draws spread over the slices: these would start blind to every change along Z.

    The inflation law is checked on a tiny volume when a process builds a configuration for the
    first time. What breaks it is code, not the weights' values, so once is enough; the check draws
    nothing from the process's generator.
    """

    net: Backbone

    def __init__(self, config: Config, in_channels: int = 1) -> None:
        flat = build_flat(config.backbone, in_channels, config.name)
        name = f"backbone {flat.describe()}"
        image_BCXY = _image(flat)
        net, strides = inflate(
            flat,
            image_BCXY,
            _extract,
            name=name,
            z_kernel=config.z_kernel,
            z_downsampling=config.z_downsampling,
            spread=config.spread,
        )
        checked = (config.model_dump_json(), in_channels)
        if checked not in _FOLLOW_THE_LAW:
            check_law(flat, net, image_BCXY, _extract, name=name, spread=config.spread)
            _FOLLOW_THE_LAW.add(checked)
        draws = [flat.state_dict()]
        for _ in range(1, num_draws(flat, net)):
            draws.append(build_flat(config.backbone, in_channels, config.name).state_dict())
        net.load_state_dict(random_state(draws, net.state_dict()))
        super().__init__(
            config,
            in_channels=in_channels,
            spatial_dims=3,
            stages=tuple(
                Stage(stage.name, stage.channels, (*stage.stride, strides.along_z[stage.stride[0]]))
                for stage in flat.stages
            ),
            input_mean=flat.input_mean,
            input_std=flat.input_std,
            divisor=divisors_with_z(flat),
            inside_channel=flat.inside_channel,
        )
        self.net = net

    def extract(self, x_BC: Tensor) -> list[Tensor]:
        """See `Backbone.extract`."""
        return self.net.extract(x_BC)

    @property
    def imagenet_weights(self) -> ImagenetWeights | None:
        """The published file of the 2D network."""
        return self.net.imagenet_weights

    def adapt_imagenet(self, file_state: Mapping[str, Tensor]) -> AdaptedState:
        """Adapt the file as the 2D network does, then inflate every kernel."""
        config: Any = self.config
        flat = adapt_flat(config.backbone, self.in_channels, config.name, file_state)
        state, inflated = inflate_state(flat.state, self.state_dict(), config.spread)
        how = dict(flat.adapted)
        for name, words in inflated.items():
            how[name] = f"{how[name]}; {words}" if name in how else words
        return AdaptedState(state, head=flat.head, adapted=tuple(how.items()))


def _extract(net: Backbone, images: Tensor) -> Sequence[Tensor]:
    return net.extract(images)


def _image(flat: Backbone) -> Tensor:
    """Return the smallest image that the whole 2D network fits on, once along X, twice along Y."""
    side = math.lcm(*flat.divisors, *(stage.stride[0] for stage in flat.stages))
    channels = flat.in_channels + int(flat.inside_channel)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, channels, side, 2 * side, generator=generator)
