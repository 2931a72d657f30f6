"""Scores of restored images inside their holes, and a classical fill to compare with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

SSIM_WINDOW = 7
"""Side of the box, voxels, within which SSIM compares two images: scikit-image's default."""

_C1, _C2 = 0.01**2, 0.03**2
"""Constants of SSIM for images in [0, 1]; Wang et al. 2004, section III.B."""

_LEAST_SQUARE = 1e-10
"""Least squared error: a perfect answer has a peak signal-to-noise ratio of 100 dB."""

SOLVED_WHOLE = 2**15
"""Most voxels of a volume that is filled in one piece: 32 x 32 x 32 with half of it hidden takes
about 1.5 s, and the time grows with the square. Larger ones are filled slice by slice."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each item's values where its mask is true, (B,).

    A mask of numbers weighs the values; zero, where nothing is masked.
    """
    mask = mask.expand_as(values)
    total = (values * mask).flatten(1).sum(1)
    return total / mask.flatten(1).sum(1).clamp(min=1)


def masked_psnr(image: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio inside the mask, dB, for a peak of 1, (B,)."""
    squared = masked_mean((image - target) ** 2, mask)
    return -10 * torch.log10(squared.clamp(min=_LEAST_SQUARE))


def masked_ssim(image: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the mean, over the mask, of the structural similarity around each voxel, (B,).

    The windows of voxels near the mask's border look beyond it: give an image that is there what
    people would see, the original.
    """
    return masked_mean(ssim_map(image, target), mask)


def ssim_map(first: Tensor, second: Tensor) -> Tensor:
    """Return the structural similarity around every voxel, of the same shape, at most 1.

    Windows are boxes of `SSIM_WINDOW` voxels, cut off at the image's border; narrower along axes
    that are shorter.

    Args:
        first: (B, C, *S) float32 in [0, 1].
        second: of the same shape.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to
    structural similarity", IEEE Transactions on Image Processing 13, 2004, equation 13.
    """
    mean_1, mean_2 = _box_mean(first), _box_mean(second)
    # Rounding can take a variance below zero.
    variance_1 = (_box_mean(first * first) - mean_1**2).clamp(min=0)
    variance_2 = (_box_mean(second * second) - mean_2**2).clamp(min=0)
    covariance = _box_mean(first * second) - mean_1 * mean_2
    luminance = (2 * mean_1 * mean_2 + _C1) / (mean_1**2 + mean_2**2 + _C1)
    return luminance * (2 * covariance + _C2) / (variance_1 + variance_2 + _C2)


def _box_mean(values: Tensor) -> Tensor:
    dims = values.ndim - 2
    pool = functional.avg_pool2d if dims == 2 else functional.avg_pool3d
    for axis in range(dims):  # a box is averaged one axis after the other
        length = values.shape[2 + axis]
        side = min(SSIM_WINDOW, length - (length + 1) % 2)  # odd, and no longer than the image
        along = [side if other == axis else 1 for other in range(dims)]
        padding = [width // 2 for width in along]
        values = pool(values, along, stride=1, padding=padding, count_include_pad=False)
    return values


def biharmonic_fill(image: Tensor, hidden: Tensor, mean: float) -> Tensor:
    """Fill the holes of one image smoothly from what surrounds them, on the host.

    Volumes of more than `SOLVED_WHOLE` voxels are filled slice by slice across Z; a slice of which
    nothing is visible gets the mean.

    Args:
        image: (C, *S) in [0, 1]; what is hidden is not looked at.
        hidden: (*S) bool.
        mean: of what is visible.

    Returns:
        (C, *S) float32, equal to the image where it is visible.

    Source: Damelin, Hoang, "On surface completion and image inpainting by biharmonic functions",
    International Journal of Mathematics and Mathematical Sciences, 2018 (scikit-image).
    """
    if hidden.ndim == 3 and hidden.numel() > SOLVED_WHOLE:
        slices = zip(image.unbind(-1), hidden.unbind(-1), strict=True)
        return torch.stack([biharmonic_fill(*pair, mean) for pair in slices], dim=-1)
    from skimage.restoration import inpaint_biharmonic

    mask_S = np.ascontiguousarray(hidden.cpu().numpy())
    shown = np.ascontiguousarray(torch.where(hidden, mean, image.float()).cpu().numpy())
    if mask_S.all() or not mask_S.any():
        return torch.from_numpy(shown)
    filled = inpaint_biharmonic(shown, mask_S, channel_axis=0)
    return torch.from_numpy(np.where(mask_S, filled, shown).astype(np.float32))
