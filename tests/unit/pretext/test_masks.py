"""Holes: they lie in the body, hide the wanted share of it, and have the shape of their name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor
from torch.nn import functional

from medssl.pretext._masks import BODY_CLOSING, block_mask, body_mask, dilate, hole_mask
from medssl.pretext.base import not_air

HOLES = ["blocks", "centre", "region"]
every_kind = pytest.mark.parametrize("holes", HOLES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def scans(draw: DrawFn) -> Tensor:
    """Return images (2, C, *S) in [0, 1] of tissue, faint or bright, and air; air alone as well."""
    dims, channels = draw(st.sampled_from([2, 3])), draw(st.integers(1, 2))
    sides = [draw(st.integers(2, 9 if dims == 3 else 24)) for _ in range(dims)]
    noise = generator(draw(st.integers(0, 999)))
    tissue = torch.rand(2, channels, *sides, generator=noise) < draw(st.sampled_from([0, 0.02, 1]))
    bright = draw(st.sampled_from([0.06, 0.5, 1.0]))
    return bright * torch.rand(2, channels, *sides, generator=noise) * tissue


@settings(max_examples=60)
@given(
    images=scans(),
    holes=st.sampled_from(HOLES),
    ratio=st.floats(0.05, 0.95),
    block=st.integers(2, 8),
    seed=st.integers(0, 99),
)
def test_a_hole_is_never_outside_the_body_nor_empty(images, holes, ratio, block, seed):
    hidden = hole_mask(images, holes, ratio, block, generator(seed))
    assert hidden.shape == (2, 1, *images.shape[2:])
    assert hidden.dtype == torch.bool
    assert not (hidden & ~body_mask(images)).any()
    assert hidden.flatten(1).any(1).all()


@settings(max_examples=60)
@given(
    images=scans(),
    holes=st.sampled_from(["centre", "region"]),
    ratio=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
)
def test_no_more_of_the_body_is_hidden_than_wanted(images, holes, ratio, seed):
    hidden = hole_mask(images, holes, ratio, 4, generator(seed)).flatten(1).sum(1)
    body = body_mask(images).flatten(1).sum(1)
    assert (hidden <= (body * ratio).clamp(min=1)).all()


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(40, 30), (18, 14, 16)])
def test_the_wanted_share_of_the_body_is_hidden_by_a_region(shape, ratio):
    hidden = hole_mask(torch.full((4, 1, *shape), 0.5), "region", ratio, 6, generator())
    share = hidden.flatten(1).float().mean(1)
    assert torch.allclose(share, torch.full_like(share, ratio), atol=0.01)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_the_wanted_share_is_hidden_by_a_box_up_to_one_of_its_shells(ratio):
    hidden = hole_mask(torch.full((1, 1, 65, 65), 0.5), "centre", ratio, 8, generator())
    side = int(hidden[0, 0, 32].sum())
    assert side**2 <= ratio * 65**2 < (side + 2) ** 2
    assert int(hidden.sum()) == side**2


@pytest.mark.parametrize("ratio", [0.75, 0.9])
def test_blocks_hide_a_high_share_of_the_body(ratio):
    hidden = hole_mask(torch.full((2, 1, 64, 64), 0.5), "blocks", ratio, 4, generator())
    assert hidden.float().mean().item() == pytest.approx(ratio, abs=0.005)


@every_kind
def test_holes_are_the_same_for_the_same_generator(holes):
    images = torch.rand(3, 1, 20, 20, generator=generator(1))
    first, second = (hole_mask(images, holes, 0.4, 4, generator(3)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("holes", ["blocks", "region"])
def test_images_of_a_batch_get_holes_of_their_own(holes):
    hidden = hole_mask(torch.full((8, 1, 32, 32), 0.5), holes, 0.5, 4, generator())
    assert len({tuple(mask.flatten().tolist()) for mask in hidden}) == 8


@every_kind
def test_the_hole_of_an_image_does_not_depend_on_the_others(holes):
    images = torch.rand(3, 1, 20, 20, generator=generator(1))
    changed = torch.cat([images[:2], torch.zeros(1, 1, 20, 20)])
    together = [hole_mask(batch, holes, 0.4, 4, generator(3))[:2] for batch in (images, changed)]
    assert torch.equal(*together)


def test_the_centred_hole_lies_where_the_body_does():
    images = torch.zeros(1, 1, 40, 40)
    images[..., 20:, 24:] = 0.8
    hidden = hole_mask(images, "centre", 0.25, 8, generator())[0, 0]
    places = hidden.nonzero().float()
    assert places.mean(0).tolist() == pytest.approx([29.5, 31.5], abs=0.6)
    low, high = places.long().amin(0), places.long().amax(0) + 1
    assert hidden[low[0] : high[0], low[1] : high[1]].all()  # a whole box


def test_the_centred_hole_of_a_ring_lies_on_the_ring():
    axis = torch.arange(41.0) - 20
    radius = (axis[:, None] ** 2 + axis**2).sqrt()
    ring = ((radius > 14) & (radius < 19)).float()[None, None]
    hidden = hole_mask(ring, "centre", 0.2, 8, generator())
    assert hidden.any()
    assert (radius[hidden[0, 0]] > 12).all()


@pytest.mark.parametrize("shape", [(48, 48), (24, 24, 24)])
def test_a_region_is_smooth(shape):
    """Few hidden voxels have a visible neighbour; of single voxels drawn at random, most do."""
    hidden = hole_mask(torch.full((4, 1, *shape), 0.5), "region", 0.5, 8, generator())
    border = dilate(~hidden, 1) & hidden
    assert border.sum() / hidden.sum() < 0.5


def test_a_finer_field_gives_a_region_of_more_lobes():
    images = torch.full((8, 1, 64, 64), 0.5)
    fine, coarse = (hole_mask(images, "region", 0.5, block, generator()) for block in (4, 16))
    assert (dilate(fine, 1) & ~fine).sum() > 2 * (dilate(coarse, 1) & ~coarse).sum()


def test_where_every_block_is_mostly_air_the_one_with_most_of_the_body_is_hidden():
    images = torch.zeros(1, 1, 32, 32)
    images[..., 17, 20] = 0.9
    images[..., 2, 2] = images[..., 2, 3] = 0.2
    hidden = hole_mask(images, "blocks", 0.5, 8, generator())
    assert hidden.nonzero()[:, 2:].tolist() == [[2, 2], [2, 3]]


@settings(max_examples=40)
@given(
    sides=st.lists(st.integers(1, 11), min_size=2, max_size=3),
    radius=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_growing_a_mask_is_the_maximum_over_a_cube(sides, radius, seed):
    mask = torch.rand(2, 1, *sides, generator=generator(seed)) < 0.1
    before = mask.clone()
    grown = dilate(mask, radius)
    padded = functional.pad(mask.float(), [radius] * 2 * len(sides))
    pool = functional.max_pool2d if len(sides) == 2 else functional.max_pool3d
    assert torch.equal(grown, pool(padded, 2 * radius + 1, stride=1) > 0)
    assert torch.equal(mask, before)


@settings(max_examples=40)
@given(images=scans())
def test_the_body_holds_all_the_foreground(images):
    foreground = not_air(images)
    assert body_mask(images)[foreground].all()


def test_narrow_dark_gaps_belong_to_the_body_and_wide_ones_do_not():
    images = torch.full((1, 1, 9, 60), 0.5)
    images[..., 10 : 10 + 2 * BODY_CLOSING] = 0
    images[..., 30 : 30 + 2 * BODY_CLOSING + 2] = 0
    body = body_mask(images)[0, 0]
    assert body[:, :30].all()
    assert not body[:, 30 : 30 + 2 * BODY_CLOSING + 2].any()


def test_air_around_the_body_does_not_belong_to_it():
    images = torch.zeros(1, 1, 30, 30)
    images[..., 8:22, 8:22] = 0.5
    assert torch.equal(body_mask(images), images > 0)


def test_an_image_without_foreground_counts_as_body():
    images = torch.stack([torch.zeros(1, 12, 12), torch.eye(12)[None]])
    body = body_mask(images)
    assert body[0].all()
    assert not body[1].all()


def test_blocks_of_air_are_not_hidden_however_many_are_wanted():
    images = torch.zeros(1, 1, 8, 8)
    images[..., :4, :] = 1.0
    hidden = block_mask(images, 4, 1.0, generator())
    assert hidden[..., :4, :].all()
    assert not hidden[..., 4:, :].any()
