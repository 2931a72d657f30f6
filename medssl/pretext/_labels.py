"""Labels of a batch: every class equally often, different ones for each image."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def deal_labels(
    num_images: int,
    labels_per_image: int,
    num_classes: int,
    device: torch.device,
    generator: torch.Generator,
) -> Tensor:
    """Draw labels, (num_images, labels_per_image): different ones for each image.

    Every class comes up equally often in a batch, to within one.

    Args:
        num_images: images in the batch.
        labels_per_image: puzzles of each; at most ``num_classes``.
        num_classes: classes.
        device: where the labels are wanted.
        generator: on that device.
    """
    count = num_images * labels_per_image
    # Each order of the classes is dealt out again and again until an image's share ends with it:
    # with a fresh one in the middle of an image, a class could come twice.
    dealt = math.lcm(num_classes, labels_per_image)
    shape = (-(-count // dealt), num_classes)
    order = torch.rand(shape, device=device, generator=generator).argsort(1)
    labels = order.repeat(1, dealt // num_classes).reshape(-1)[:count]
    return labels.reshape(num_images, labels_per_image)
