"""What counts as air, before and after augmentation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medssl.pretext.base import not_air
from medssl.transforms.augmentation import AugmentationConfig, augment


def half_air(seed: int = 0) -> torch.Tensor:
    """Return images (2, 1, 16, 16) whose first half along X is air and the rest tissue."""
    image = 0.4 + 0.5 * torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    image[:, :, :8] = 0
    return image


@given(seed=st.integers(0, 1000))
def test_augmentation_makes_no_tissue_of_air_and_no_air_of_tissue(seed):
    generator = torch.Generator().manual_seed(seed)
    images, _ = augment(half_air(), None, AugmentationConfig(noise_std=0), generator, ("X", "Y"))
    expected = half_air() > 0
    assert torch.equal(not_air(images), expected)


@pytest.mark.parametrize(("intensity", "is_tissue"), [(0.0, False), (0.1, False), (0.5, True)])
def test_an_image_of_one_intensity_is_air_or_tissue_throughout(intensity, is_tissue):
    assert (not_air(torch.full((1, 1, 4, 4), intensity)) == is_tissue).all()


def test_an_image_without_dark_voxels_has_no_air():
    assert not_air(half_air()[:, :, 8:]).all()


def test_a_voxel_that_is_bright_in_any_channel_is_not_air():
    images = torch.cat([half_air(), half_air().flip(2)], dim=1)
    assert not_air(images).shape == (2, 1, 16, 16)
    assert not_air(images).all()
