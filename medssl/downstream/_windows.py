"""Answers for whole volumes from a network that was trained on crops of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor

from medssl.downstream.base import DownstreamBatch

OVERLAP = 0.5
"""Part of each side that neighbouring windows share."""

_WINDOWS_AT_ONCE = 4


def in_windows(
    network: Callable[[DownstreamBatch], Tensor], images: Tensor, crop_size: tuple[int, ...]
) -> Tensor:
    """Return the answers for images (B, C, X, Y[, Z]), as many voxels as they have.

    Volumes larger than the crop are answered in overlapping windows of its size, whose answers are
    averaged with Gaussian weights: a window knows least at its border. Slices stay whole: memory is
    no reason to cut them, and the network has seen their extent in other slices.
    """
    if images.ndim == 4 or tuple(images.shape[2:]) == tuple(crop_size):
        return network(DownstreamBatch(images, images))
    from monai.inferers.utils import sliding_window_inference

    answers = sliding_window_inference(
        images,
        roi_size=crop_size,
        sw_batch_size=_WINDOWS_AT_ONCE,
        predictor=lambda windows: network(DownstreamBatch(windows, windows)),
        overlap=OVERLAP,
        mode="gaussian",
    )
    return cast("Tensor", answers)
