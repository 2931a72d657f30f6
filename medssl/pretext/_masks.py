"""Holes: which voxels of an image are hidden, chosen on the device, always inside the body.

Sources: a centred block and a random region are the holes of Pathak et al., "Context encoders:
feature learning by inpainting", CVPR 2016; blocks at a high ratio those of He et al., "Masked
autoencoders are scalable vision learners", CVPR 2022.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from medssl.pretext.base import air_level, not_air

Holes = Literal["blocks", "centre", "region"]

BODY_CLOSING = 4
"""Half the width, in voxels, of dark gaps that still count as body: fluid, thin layers of air."""

_ROUNDING = 1e-5
"""What the mean of equal voxels may differ from them."""

_HALVINGS = 24
"""Steps of a bisection: as many as the digits of a float32."""


def dilate(mask: Tensor, radius: int) -> Tensor:
    """Return a mask (B, 1, *S) grown by a cube of ``radius`` voxels to every side, bool."""
    grown = mask
    for axis in range(2, mask.ndim):  # a cube is grown one axis after the other
        reach = 0
        while reach < radius:
            # What has grown by `reach`, moved by one more, has no gap: the reach doubles.
            step = min(reach + 1, radius - reach)
            rest = mask.shape[axis] - step
            before, grown = grown, grown.clone()
            if rest > 0:
                grown.narrow(axis, step, rest).logical_or_(before.narrow(axis, 0, rest))
                grown.narrow(axis, 0, rest).logical_or_(before.narrow(axis, step, rest))
            reach += step
    return grown


def body_mask(images: Tensor) -> Tensor:
    """Return where the body is, (B, 1, *S) bool, for images (B, C, *S) in [0, 1].

    The body is what is brighter than air in any channel, closed (grown, then shrunk) by
    `BODY_CLOSING` voxels, so that it contains all the foreground and narrow dark gaps within it.
    An image without any foreground counts as body throughout.
    """
    foreground = not_air(images)
    # What grows beyond the crop's border must be there to shrink back; beyond it lies no body.
    wide = functional.pad(foreground, [BODY_CLOSING] * 2 * (images.ndim - 2))
    body = ~dilate(~dilate(wide, BODY_CLOSING), BODY_CLOSING)
    for axis in range(2, images.ndim):
        body = body.narrow(axis, BODY_CLOSING, images.shape[axis])
    empty = ~foreground.flatten(1).any(1)
    return body | empty.reshape(-1, *[1] * (images.ndim - 1))


def hole_mask(
    images: Tensor, holes: Holes, ratio: float, block: int, generator: torch.Generator
) -> Tensor:
    """Choose the voxels to hide.

    Args:
        images: (B, C, *S) in [0, 1].
        holes: ``blocks``, ``centre`` or ``region``; see the functions of these names.
        ratio: share of the body, or of its blocks, that is hidden.
        block: side of a block, or scale of a region, voxels.
        generator: on the images' device.

    Returns:
        (B, 1, *S) bool, true where hidden: inside `body_mask`, at least one voxel an image.
    """
    if holes == "centre":
        return centre_mask(images, ratio)
    if holes == "region":
        return region_mask(images, block, ratio, generator)
    return block_mask(images, block, ratio, generator)


def block_mask(images: Tensor, block: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Hide random blocks of a grid, each where it lies in the body.

    Args:
        images: (B, C, X, Y[, Z]) in [0, 1].
        block: side of a block, voxels; cut to the image's along shorter axes.
        ratio: share of each image's foreground blocks (those whose mean is no air) that is
            hidden; at least one block.
        generator: on the images' device.

    Returns:
        (B, 1, X, Y[, Z]) bool, true where hidden. Air is hidden only where an image has no
        foreground at all: restoring it would teach nothing.
    """
    dims = images.ndim - 2
    pool = functional.avg_pool2d if dims == 2 else functional.avg_pool3d
    sides = [min(block, length) for length in images.shape[2:]]
    grey = images.mean(1, keepdim=True)
    level = pool(grey, sides, stride=sides, ceil_mode=True)
    body = body_mask(images)
    share = pool(body.float(), sides, stride=sides, ceil_mode=True).flatten(1)
    flat = (level >= air_level(grey).reshape(-1, *[1] * (level.ndim - 1)) - _ROUNDING).flatten(1)
    flat = flat & (share > 0)  # what is bright in the mean of the channels may be air in each
    count = (flat.sum(1, keepdim=True) * ratio).round().clamp(min=1)
    # Where every block is mostly air, the one that holds most of the body.
    flat = flat | (~flat.any(1, keepdim=True) & (share == share.amax(1, keepdim=True)))
    order = torch.rand(flat.shape, device=images.device, generator=generator) + flat
    rank = order.argsort(1, descending=True).argsort(1)
    hidden = (rank < count).reshape(level.shape)
    for axis, side in enumerate(sides, start=2):
        hidden = hidden.repeat_interleave(side, dim=axis).narrow(axis, 0, images.shape[axis])
    return hidden & body


def centre_mask(images: Tensor, ratio: float) -> Tensor:
    """Hide the part of one box that lies in the body.

    The box has the crop's proportions and the body's centre: the voxel of the body nearest to its
    centre of mass. It is the largest that hides no more than ``ratio`` of the body, but always its
    middle voxel.

    Args:
        images: (B, C, *S) in [0, 1].
        ratio: share of the body's voxels.

    Returns:
        (B, 1, *S) bool, true where hidden.
    """
    body = body_mask(images)
    sizes = images.shape[2:]
    axes = [torch.arange(float(side), device=images.device) for side in sizes]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)  # (D, voxels)
    inside = body.flatten(2)  # (B, 1, voxels)
    centre = (places * inside).sum(2) / inside.sum(2)  # (B, D)
    squared = (places - centre[..., None]).square().sum(1).masked_fill(~inside[:, 0], torch.inf)
    middle = places[:, squared.argmin(1)].T  # (B, D)
    steps = (places - middle[..., None]).abs().unbind(1)
    distance = torch.stack([step / side for step, side in zip(steps, sizes, strict=True)]).amax(0)
    return _highest(-distance.reshape(body.shape), body, ratio)


def region_mask(images: Tensor, block: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Hide a region of random, smooth shape: where a random field of low frequency is highest.

    Args:
        images: (B, C, *S) in [0, 1].
        block: distance between the nodes of the field, voxels: the larger, the fewer and wider
            the lobes of the region.
        ratio: share of the body's voxels that is hidden.
        generator: on the images' device.

    Returns:
        (B, 1, *S) bool, true where hidden.
    """
    nodes = [max(3, side // block + 1) for side in images.shape[2:]]
    field = torch.randn((len(images), 1, *nodes), device=images.device, generator=generator)
    mode = "bilinear" if len(nodes) == 2 else "trilinear"
    smooth = functional.interpolate(field, size=images.shape[2:], mode=mode, align_corners=True)
    return _highest(smooth, body_mask(images), ratio)


def _highest(score: Tensor, body: Tensor, ratio: float) -> Tensor:
    """Return the voxels of the body with the highest scores, (B, 1, *S) bool.

    As many as fit into the wanted share without splitting equal scores, and always the highest.
    The threshold is found by halving, which is cheaper than sorting every voxel.
    """
    axes = tuple(range(1, score.ndim))
    wanted = body.sum(axes, keepdim=True) * ratio
    top = score.masked_fill(~body, -torch.inf).amax(axes, keepdim=True)
    low, high = score.masked_fill(~body, torch.inf).amin(axes, keepdim=True), top
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        too_many = ((score > middle) & body).sum(axes, keepdim=True) > wanted
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return body & ((score > high) | (score == top))
