from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from medssl.errors import WeightsError
from medssl.models.stems import (
    clear_inside,
    fold_rgb,
    grey_constant,
    input_constants,
    needs_inside,
    widen_stem,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
M, S = grey_constant(MEAN), grey_constant(STD)


def stem(kernel: int = 7) -> torch.Tensor:
    return torch.randn(8, 3, kernel, kernel, generator=torch.Generator().manual_seed(0))


def fold(weight: torch.Tensor, in_channels: int) -> tuple[torch.Tensor, str]:
    return fold_rgb(weight, MEAN, STD, in_channels, M, S, inside=in_channels != 3)


@settings(deadline=None, max_examples=40)
@given(
    in_channels=st.sampled_from([1, 2, 4, 5]),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 4),
    padding=st.integers(0, 3),
    size=st.tuples(st.integers(8, 20), st.integers(8, 20)),
)
def test_a_folded_stem_answers_grey_as_the_published_one_answers_its_copy(
    in_channels, kernel, stride, padding, size
):
    """Everywhere, the border with its padding of zeros included."""
    weight = stem(kernel).double()
    grey = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(1)).double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    rgb = (grey.expand(-1, 3, -1, -1) - mean) / std
    ours = ((grey - M) / S).expand(-1, in_channels, -1, -1)
    ours = torch.cat([ours, torch.ones_like(grey)], dim=1)
    folded, _ = fold(weight, in_channels)
    settings_ = {"stride": stride, "padding": padding}
    torch.testing.assert_close(
        functional.conv2d(ours, folded, **settings_),
        functional.conv2d(rgb, weight, **settings_),
        rtol=0,
        atol=1e-9,
    )


def test_three_channels_keep_the_files_own_weights():
    weight = stem()
    folded, how = fold(weight, 3)
    assert folded is weight
    assert how == ""


def test_what_was_done_is_told_in_words():
    assert fold(stem(), 1)[1] == (
        "R, G and B added, scaled to the grey normalisation; the offset of their means on the "
        "inside channel"
    )
    assert ", shared equally by 4 channels;" in fold(stem(), 4)[1]
    equal = (0.5,) * 3
    assert fold_rgb(stem(), equal, equal, 1, 0.5, 0.5, inside=False)[1] == "R, G and B added"


def test_channels_share_the_kernel_equally():
    one, _ = fold(stem(), 1)
    four, _ = fold(stem(), 4)
    assert four.shape == (8, 5, 7, 7)
    torch.testing.assert_close(four[:, :4], one[:, :1].expand(-1, 4, -1, -1) / 4)
    torch.testing.assert_close(four[:, 4], one[:, 1])


def test_the_type_of_the_weights_stays():
    assert fold(stem().half(), 1)[0].dtype == torch.float16


def test_equal_means_need_no_inside_channel():
    assert not needs_inside(1, (0.5, 0.5, 0.5))
    assert not needs_inside(3, MEAN)
    assert needs_inside(1, MEAN)
    assert needs_inside(4, MEAN)


def test_grey_images_are_normalised_by_the_means_of_the_constants():
    assert input_constants(3, MEAN, STD) == (MEAN, STD)
    assert input_constants(2, MEAN, STD) == ((M, M), (S, S))
    assert pytest.approx(0.449) == M
    assert pytest.approx(0.226) == S


def test_a_stem_of_other_channels_is_refused():
    with pytest.raises(WeightsError, match=r"no stem of three channels .*found shape \(8, 1, 7, 7"):
        fold(stem()[:, :1], 1)


def test_different_means_cannot_be_folded_without_the_inside_channel():
    with pytest.raises(ValueError, match="need the inside channel"):
        fold_rgb(stem(), MEAN, STD, 1, M, S, inside=False)


@pytest.mark.parametrize("in_channels", [1, 2, 4])
def test_a_widened_stem_is_like_the_one_it_replaces(in_channels):
    conv = nn.Conv2d(3, 64, 7, stride=(2, 1), padding=3)
    wide = widen_stem(conv, in_channels, inside=True)
    assert (wide.kernel_size, wide.stride, wide.padding) == ((7, 7), (2, 1), (3, 3))
    assert wide.weight.shape == (64, in_channels + 1, 7, 7)
    assert float(wide.weight[:, :-1].detach().std()) == pytest.approx(
        float(conv.weight.detach().std()), rel=0.1
    )
    assert not bool(wide.weight[:, -1].any())
    assert torch.equal(wide.bias, conv.bias)


def test_clearing_leaves_the_other_channels():
    weight = torch.ones(2, 3, 1, 1)
    clear_inside(weight)
    assert weight[:, :, 0, 0].tolist() == [[1, 1, 0], [1, 1, 0]]
