"""Shortcuts keep exactly what they say, and leave labels and scores to the task."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medssl.pretext._shortcuts import (
    BLANK,
    BODY_MASK,
    BORDER,
    EVERYTHING,
    MEAN_DEVIATION,
    THUMBNAIL_ONLY,
    ShortcutOnly,
    border,
    mean_deviation,
    silhouette,
    strip_width,
    thumbnail,
    thumbnail_size,
)
from medssl.training.network import build_network
from medssl.transforms.sampling import Sample
from training import pretext_task, tiny_backbone

SHORTCUTS = (EVERYTHING, BORDER, BODY_MASK, MEAN_DEVIATION, THUMBNAIL_ONLY)
every_function = pytest.mark.parametrize(
    "function", [border, silhouette, mean_deviation, thumbnail], ids=lambda f: f.__name__
)


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    """Return a batch of random views in [0, 1], of any sides."""
    sides = draw(st.lists(st.integers(2, 20), min_size=2, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return torch.rand(draw(st.integers(1, 3)), draw(st.integers(1, 2)), *sides, generator=generator)


def random_views(*sides: int, count: int = 3) -> Tensor:
    return torch.rand(count, 2, *sides, generator=torch.Generator().manual_seed(0))


@every_function
@given(given_views=views())
def test_a_shortcut_keeps_shape_and_type_and_leaves_its_input_alone(function, given_views):
    before = given_views.clone()
    seen = function(given_views)
    assert seen.shape == given_views.shape
    assert seen.dtype == given_views.dtype
    assert torch.equal(given_views, before)
    assert seen.min() >= 0
    assert seen.max() <= 1


@every_function
def test_a_shortcut_of_a_constant_view_is_the_same_for_every_place(function):
    seen = function(torch.full((2, 1, 8, 8), 0.5))
    assert torch.equal(seen[0], seen[1])


@given(given_views=views())
def test_the_border_is_kept_and_nothing_else(given_views):
    seen = border(given_views)
    sides = given_views.shape[2:]
    for place in product(*(range(side) for side in sides)):
        at_border = any(
            p < strip_width(side) or p >= side - strip_width(side)
            for p, side in zip(place, sides, strict=True)
        )
        voxel = (..., *place)
        wanted = given_views[voxel] if at_border else torch.full_like(given_views[voxel], BLANK)
        assert torch.equal(seen[voxel], wanted)


@pytest.mark.parametrize(("side", "width"), [(4, 1), (8, 1), (15, 1), (16, 2), (64, 8)])
def test_the_strip_is_an_eighth_of_a_side_and_at_least_a_voxel(side, width):
    assert strip_width(side) == width


def test_the_body_mask_tells_air_from_the_rest_and_no_more():
    values = torch.tensor([0.0, 0.05, 0.11, 0.5, 1.0])  # air: a tenth of the image's range
    assert silhouette(values.reshape(1, 1, 1, 5)).flatten().tolist() == [0, 0, 1, 1, 1]


def test_each_channel_has_a_silhouette_of_its_own():
    """Slices and sequences are channels: air in one may be body in another."""
    images = torch.zeros(1, 2, 4, 4)
    images[0, 0, :2] = 1.0
    images[0, 1, 2:] = 0.5
    assert torch.equal(silhouette(images), (images > 0).float())


@given(given_views=views())
def test_mean_and_deviation_fill_the_two_halves(given_views):
    seen = mean_deviation(given_views)
    half = given_views.shape[2] // 2
    flat = given_views.flatten(2)
    for part, wanted in (
        (seen[:, :, :half], flat.mean(2)),
        (seen[:, :, half:], flat.std(2, correction=0)),
    ):
        values = part.flatten(2)
        torch.testing.assert_close(values, wanted[:, :, None].expand_as(values))


def test_mean_and_deviation_do_not_change_when_voxels_change_places():
    given_views = random_views(6, 6)
    shuffled = given_views.flatten(2)[..., torch.randperm(36)].reshape(given_views.shape)
    torch.testing.assert_close(mean_deviation(given_views), mean_deviation(shuffled))


def test_a_thumbnail_holds_the_averages_of_blocks():
    given_views = random_views(16, 24)
    seen = thumbnail(given_views)
    blocks = given_views.reshape(3, 2, 8, 2, 8, 3)
    wanted = blocks.mean((3, 5), keepdim=True).expand_as(blocks).reshape(given_views.shape)
    torch.testing.assert_close(seen, wanted)


@pytest.mark.parametrize(
    ("sides", "size"), [((64, 64), (8, 8)), ((16, 12), (8, 6)), ((5, 4, 1), (2, 2, 1))]
)
def test_a_thumbnail_has_eight_voxels_a_side_and_at_most_half_the_view(sides, size):
    assert thumbnail_size(sides) == size


def test_bfloat16_views_stay_so():
    for function in (border, silhouette, mean_deviation, thumbnail):
        assert function(random_views(8, 8).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("shortcut", SHORTCUTS, ids=lambda s: s.name)
@pytest.mark.parametrize("dims", [2, 3])
def test_a_probe_keeps_the_tasks_labels_and_scores(shortcut, dims):
    task = pretext_task("rotation", dims)
    probe = ShortcutOnly(task, shortcut)
    sample = Sample(random_views(*[12] * dims)[:, :1], None)
    own = task.batch_of(sample, torch.Generator().manual_seed(1))
    batch = probe.batch_of(sample, torch.Generator().manual_seed(1))
    (puzzle,) = probe.puzzles(sample, torch.Generator().manual_seed(1))
    assert torch.equal(batch.inputs, puzzle.inputs)
    assert torch.equal(batch.target, own.target)
    assert torch.equal(batch.inputs, own.inputs) == (shortcut is EVERYTHING)
    network = build_network(tiny_backbone(dims), probe, seed=0)
    output = network(batch)
    assert probe.loss(output, batch) == task.loss(output, batch)
    assert probe.metrics(output, batch) == task.metrics(output, batch)


def test_a_silhouette_is_taken_before_the_puzzle_is_made():
    images = torch.zeros(2, 1, 8, 8)
    images[:, :, :3] = 0.7
    (batch,) = ShortcutOnly(pretext_task("rotation", 2), BODY_MASK).puzzles(
        Sample(images, None), torch.Generator().manual_seed(1)
    )
    assert set(batch.inputs.unique().tolist()) == {0.0, 1.0}


def test_a_shortcut_says_in_words_what_it_leaves():
    assert BORDER.shown((24, 24, 24)) == "the outer 3 voxels, 58% of a view"
    assert BORDER.shown((8, 8)) == "the outer 1 voxel, 44% of a view"
    assert BORDER.shown((16, 8)) == "the outer 1 or 2 voxels, 44% of a view"
    assert THUMBNAIL_ONLY.shown((24, 12)) == "8 x 6 averages of 24 x 12 voxels"
    assert all(shortcut.shown((16, 16)) for shortcut in SHORTCUTS)
