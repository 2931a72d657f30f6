"""Stems: the first convolution of a network made for colour photographs, given grey images.

Published weights see three channels, each with a mean and a standard deviation of its own. For an
image of any other number of channels, the weights are folded so that the network answers a grey
image exactly as the published network answers its copy in R, G and B.

A filter ``w_c`` over channel ``c`` of a grey image ``g`` computes, with the published constants
``m_c, s_c`` and the grey ones ``M, S`` of the backbone::

    w_c (g - m_c) / s_c  =  w_c S / s_c * (g - M) / S  +  w_c (M - m_c) / s_c

so the filters of the three channels are added, each scaled by ``S / s_c``, and the second term,
constant inside the image, is carried by one more input channel that is 1 inside the image and 0 in
any padding (see `medssl.models.backbones.base.Backbone`, ``inside_channel``). A network pads its
normalised input with zeros, which are zero in both; so the two agree at the border, too. Where all
means are equal the second term is zero, and no such channel is needed.

The rules by number of image channels ``C``, for ``K`` the added kernel:

- 3: the images are taken as the file's own three channels; its weights stay bit by bit.
- 1: the kernel is ``K``.
- 2, 4 or more: every channel gets ``K / C``, so channels that are all equal count as one grey
  image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medssl.errors import WeightsError

RGB = 3
"""Channels of the images that published weights were made with."""


def grey_constant(values: tuple[float, ...]) -> float:
    """Return the mean of the channels' means or standard deviations."""
    return sum(values) / len(values)


def needs_inside(in_channels: int, mean: tuple[float, ...]) -> bool:
    """Tell whether a grey stem needs the channel that is 1 inside the image.

    Args:
        in_channels: channels of the images.
        mean: the published means, one a channel.
    """
    return in_channels != RGB and len(set(mean)) > 1


def input_constants(
    in_channels: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation that normalise images, one value a channel.

    Args:
        in_channels: channels of the images.
        mean: the published means, one a channel.
        std: the published standard deviations, one a channel.
    """
    if in_channels == RGB:
        return mean, std
    return (grey_constant(mean),) * in_channels, (grey_constant(std),) * in_channels


def fold_rgb(
    weight: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    in_channels: int,
    grey_mean: float,
    grey_std: float,
    inside: bool,
) -> tuple[Tensor, str]:
    """Fold the filters of R, G and B into those of an image of other channels.

    Args:
        weight: of the published stem, shape (O, 3, *kernel).
        mean: the published means of R, G and B, for images in [0, 1].
        std: the published standard deviations.
        in_channels: channels of the images, ``C``.
        grey_mean: subtracted from every channel of the images.
        grey_std: divides every channel of the images.
        inside: whether the network is given one more channel, the last: 1 inside the image.

    Returns:
        The weight, shape (O, C, *kernel) or, with ``inside``, (O, C + 1, *kernel), of the type it
        came in; and in words what was done, empty for three channels.

    Raises:
        WeightsError: the weight is not one of three channels.
        ValueError: the means differ from the grey one, and there is no inside channel.
    """
    if weight.ndim < 3 or weight.shape[1] != RGB:
        raise WeightsError(
            f"no stem of three channels to fold into a grey one: found shape "
            f"{tuple(weight.shape)}, wanted (O, 3, …). Use the published file, or images of three "
            "channels."
        )
    if in_channels == RGB:
        return weight, ""
    if not inside and any(m != grey_mean for m in mean):
        raise ValueError("means that differ between channels need the inside channel")
    by_channel = (1, RGB, *([1] * (weight.ndim - 2)))
    exact = weight.double()
    m, s = (torch.tensor(values, dtype=torch.float64).view(by_channel) for values in (mean, std))
    kernel = (exact * (grey_std / s)).sum(dim=1, keepdim=True) / in_channels
    parts = [kernel] * in_channels
    how = "R, G and B added"
    if any(value != grey_std for value in std):
        how += ", scaled to the grey normalisation"
    if in_channels > 1:
        how += f", shared equally by {in_channels} channels"
    if inside:
        parts.append((exact * ((grey_mean - m) / s)).sum(dim=1, keepdim=True))
        how += "; the offset of their means on the inside channel"
    return torch.cat(parts, dim=1).to(weight.dtype), how


def widen_stem(conv: nn.Conv2d, in_channels: int, inside: bool) -> nn.Conv2d:
    """Return a convolution like a stem of three channels, for images of other channels.

    Its weights are drawn with the spread of the stem's own; those of the inside channel are zero,
    so that a network at random starts without an opinion on borders.

    Args:
        conv: the stem as its library made it.
        in_channels: channels of the images.
        inside: add the inside channel, the last.
    """
    wide = nn.Conv2d(
        in_channels + inside,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
    with torch.no_grad():
        wide.weight.normal_(std=float(conv.weight.std()))
        if wide.bias is not None and conv.bias is not None:
            wide.bias.copy_(conv.bias)
    if inside:
        clear_inside(wide.weight)
    return wide


def clear_inside(weight: Tensor) -> None:
    """Set a stem's weights for the inside channel, the last, to zero, in place."""
    with torch.no_grad():
        weight[:, -1].zero_()
