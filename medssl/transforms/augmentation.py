"""Augmentation: on the device, on whole batches, with its own parameters for each sample.

Runs before a pretext task makes its labels (label last), and moves masks together with images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from medssl.config import Config

Axis = Literal["X", "Y", "Z"]


class AugmentationConfig(Config):
    """How far images may be changed; zero or an empty list switches a change off.

    Attributes:
        flip_axes: RAS voxel axes mirrored with probability one half; an axis that a 2D plane does
            not hold is passed over.
        brightness: largest amount added, in the units of images in [0, 1].
        contrast: largest relative change of the distance from the sample's mean.
        gamma: largest absolute logarithm of the exponent: 0.1 means exponents from 0.90 to 1.11.
        noise_std: largest standard deviation of Gaussian noise; drawn uniformly from zero.
    """

    flip_axes: tuple[Axis, ...] = ()
    brightness: float = Field(0.1, ge=0, le=1)
    contrast: float = Field(0.1, ge=0, lt=1)
    gamma: float = Field(0.1, ge=0, le=2)
    noise_std: float = Field(0.02, ge=0, le=1)


def augment(
    images_BCS: Tensor,
    masks_BS: Tensor | None,
    config: AugmentationConfig,
    generator: torch.Generator,
    axes: Sequence[str],
) -> tuple[Tensor, Tensor | None]:
    """Return changed copies of a batch.

    Args:
        images_BCS: (B, C, *S) floating point in [0, 1]; stays in [0, 1].
        masks_BS: (B, *S) or None; flipped like the images, otherwise unchanged.
        config: how far to go.
        generator: on the images' device.
        axes: the RAS axis of each spatial dimension, for example ``("Y", "Z")`` for sagittal.

    Returns:
        Images and masks; the inputs are not edited.

    Raises:
        ValueError: the number of axes differs from the number of spatial dimensions.
    """
    if len(axes) != images_BCS.ndim - 2:
        raise ValueError(f"{len(axes)} axes for {images_BCS.ndim - 2} spatial dimensions")
    images, masks = _flip(images_BCS, masks_BS, config.flip_axes, generator, axes)
    if config.gamma > 0:
        exponent = _uniform(images, generator).mul(config.gamma).exp()
        images = images.clamp(0, 1) ** exponent
    if config.contrast > 0:
        mean = images.mean(dim=tuple(range(1, images.ndim)), keepdim=True)
        factor = 1 + config.contrast * _uniform(images, generator)
        images = mean + (images - mean) * factor
    if config.brightness > 0:
        images = images + config.brightness * _uniform(images, generator)
    if config.noise_std > 0:
        # A level for each channel: were it that of the sample, two sequences would be known by it
        # to belong together (`correspondence`).
        level_BC = torch.rand(
            images.shape[:2], generator=generator, device=images.device, dtype=images.dtype
        )
        std = config.noise_std * level_BC.reshape(*level_BC.shape, *(1,) * (images.ndim - 2))
        noise = torch.randn(
            images.shape, generator=generator, device=images.device, dtype=images.dtype
        )
        images = images + std * noise
    return images.clamp(0, 1), masks


def _flip(
    images_BCS: Tensor,
    masks_BS: Tensor | None,
    flip_axes: Sequence[str],
    generator: torch.Generator,
    axes: Sequence[str],
) -> tuple[Tensor, Tensor | None]:
    images, masks = images_BCS, masks_BS
    for position, axis in enumerate(axes):
        if axis not in flip_axes:
            continue
        turn_B = torch.rand(len(images), generator=generator, device=images.device) < 0.5
        images = torch.where(_like(turn_B, images), images.flip(2 + position), images)
        if masks is not None:
            masks = torch.where(_like(turn_B, masks), masks.flip(1 + position), masks)
    return images, masks


def _like(values_B: Tensor, target: Tensor) -> Tensor:
    return values_B.reshape(-1, *(1,) * (target.ndim - 1))


def _uniform(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return one number from [-1, 1) for each sample, shaped to multiply the batch."""
    values_B = torch.rand(
        len(images), generator=generator, device=images.device, dtype=images.dtype
    )
    return _like(values_B * 2 - 1, images)
