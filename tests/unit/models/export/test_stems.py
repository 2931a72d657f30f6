from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from medssl.models.export._stems import spread_grey

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = 0.449, 0.226


@given(seed=st.integers(0, 100), inside=st.booleans())
def test_three_channels_of_grey_answer_as_the_grey_stem_up_to_the_border(
    seed: int, inside: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(4, 1, 7, 7, generator=generator, dtype=torch.float64)
    offset = torch.randn(4, 1, 7, 7, generator=generator, dtype=torch.float64) if inside else None
    image = torch.rand(2, 1, 11, 9, generator=generator, dtype=torch.float64)
    grey = functional.conv2d((image - GREY_MEAN) / GREY_STD, kernel, stride=2, padding=3)
    if offset is not None:
        grey += functional.conv2d(torch.ones_like(image), offset, stride=2, padding=3)
    spread = spread_grey(kernel, offset, grey_mean=GREY_MEAN, grey_std=GREY_STD, mean=MEAN, std=STD)
    by_channel = (1, 3, 1, 1)
    colours = (image - torch.tensor(MEAN, dtype=torch.float64).view(by_channel)) / torch.tensor(
        STD, dtype=torch.float64
    ).view(by_channel)
    torch.testing.assert_close(functional.conv2d(colours, spread, stride=2, padding=3), grey)


def test_an_offset_that_equal_channels_cannot_express_is_refused() -> None:
    kernel = torch.ones(1, 1, 3, 3)
    with pytest.raises(ValueError, match="all channels are normalised alike"):
        spread_grey(
            kernel, kernel, grey_mean=0.5, grey_std=0.5, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        )
