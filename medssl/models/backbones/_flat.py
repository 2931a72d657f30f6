"""The 2D backbone that a 3D family is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor

from medssl.config import ComponentConfig, component
from medssl.errors import ConfigError
from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import AdaptedState, Backbone

IN_3D = ("inflated", "slicewise")
"""The families that are made of a 2D backbone; none of them is one."""

PREFIX = "net."
"""What the 2D backbone's tensors are called in the 3D one, before their own names."""


def _check_dims(config: ComponentConfig) -> ComponentConfig:
    if getattr(config, "spatial_dims", 2) != 2:
        raise ValueError(
            f"{config.name} is 3D here, and a 2D network is wanted; set its spatial_dims to 2, or "
            "use it by itself"
        )
    return config


FlatConfig = Annotated[
    ComponentConfig, component(BACKBONES, without=IN_3D), AfterValidator(_check_dims)
]
"""The configuration of a 2D backbone."""


def build_flat(config: ComponentConfig, in_channels: int, family: str) -> Backbone:
    """Return a 2D backbone with random weights, drawn from the process's generator.

    Raises:
        ConfigError: it takes volumes.
    """
    flat = BACKBONES.build(config, in_channels=in_channels)
    if flat.spatial_dims != 2:
        raise ConfigError(
            f"backbone {family} is made of a 2D network, and {flat.describe()} takes volumes. "
            "Use it by itself, or choose a 2D backbone."
        )
    return flat


def adapt_flat(
    config: ComponentConfig, in_channels: int, family: str, file_state: Mapping[str, Tensor]
) -> AdaptedState:
    """Return an ImageNet file's tensors as the 2D backbone takes them, named by the 3D one's names.

    Raises:
        WeightsError: the file holds other tensors than the published ones.
    """
    with torch.random.fork_rng(devices=[]):  # weights are drawn that nobody uses
        flat = build_flat(config, in_channels, family)
    adapted = flat.adapt_imagenet(file_state)
    return AdaptedState(
        {f"{PREFIX}{name}": tensor for name, tensor in adapted.state.items()},
        head=adapted.head,
        adapted=tuple(
            # A word that stands for several tensors, such as their counters, stays as it is.
            (f"{PREFIX}{name}" if name in adapted.state else name, how)
            for name, how in adapted.adapted
        ),
    )


def divisors_with_z(flat: Backbone) -> tuple[int, ...]:
    """Return what input sizes are multiples of in 3D: as in 2D, and anything along Z."""
    return (*flat.divisors, 1)
