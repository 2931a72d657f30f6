"""The first convolution of a grey network, written for three channels and their normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor


def spread_grey(
    kernel: Tensor,
    offset: Tensor | None,
    *,
    grey_mean: float,
    grey_std: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Return the stem that answers a grey image, copied to all channels, as the grey stem does.

    The grey stem sees ``u = (g - M) / S`` through the kernel K, and the constant 1, where it has a
    channel that says where the image is, through O. The other library hands channel c
    ``(g - m_c) / s_c = a_c u + b_c`` with ``a_c = S / s_c`` and ``b_c = (M - m_c) / s_c``. So
    ``sum_c w_c a_c = K`` and ``sum_c w_c b_c = O`` make both answers equal everywhere: both pad
    with zeros after normalising. Of the many such w the one with the least norm is taken.

    Args:
        kernel: K, shape (O, 1, *k).
        offset: O, of the same shape; None: zero.
        grey_mean: M.
        grey_std: S.
        mean: m_c, one a channel.
        std: s_c, one a channel.

    Returns:
        w, shape (O, C, *k), of the type of ``kernel``.

    Raises:
        ValueError: there is an offset, and all channels are normalised alike up to scale, so that
            no w can express it.
    """
    m, s = (torch.tensor(list(values), dtype=torch.float64) for values in (mean, std))
    rows = torch.stack([grey_std / s, (grey_mean - m) / s])  # (2, C): a and b
    wanted = torch.zeros(2, kernel.numel(), dtype=torch.float64)
    wanted[0] = kernel.double().flatten()
    if offset is not None:
        wanted[1] = offset.double().flatten()
    weights = torch.linalg.pinv(rows) @ wanted
    if not torch.allclose(rows @ weights, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max())):
        raise ValueError("no three-channel stem equals this one: all channels are normalised alike")
    spread = cast("Tensor", weights).view(len(m), *kernel.shape).movedim(0, 1).squeeze(2)
    return spread.to(kernel.dtype).contiguous()
