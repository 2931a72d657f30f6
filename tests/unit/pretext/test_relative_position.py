"""Relative position: each label is the direction in which the second tile really lies."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medssl.errors import ConfigError
from medssl.models.heads import SiameseHead
from medssl.pretext.base import PretextBatch
from medssl.pretext.relative_position import (
    Config,
    RelativePosition,
    direction_name,
    neighbour_directions,
)
from medssl.transforms.sampling import SampleRequest

SIZES = {2: (36, 45), 3: (24, 27, 30)}
both_dims = pytest.mark.parametrize("dims", [2, 3])


class Colours(nn.Module):
    """A backbone that says what its image looks like: the mean of each channel."""

    def embed(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


class Both(nn.Module):
    """A head that hands back what it sees."""

    def forward(self, embeddings: Tensor) -> Tensor:
        return embeddings


def places(dims: int, count: int = 1) -> Tensor:
    """Return images in which each voxel tells its place: a channel an axis, from 0 to 1."""
    axes = [torch.linspace(0, 1, size) for size in SIZES[dims]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(count, -1, *SIZES[dims])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain(**fields: object) -> Config:
    """Return a config that leaves intensities as they are and every puzzle in."""
    return Config.model_validate({"standardise": False, "min_foreground": 0, **fields})


def pairs_of(task: RelativePosition, batch: PretextBatch) -> Tensor:
    """Return the mean of each channel of both tiles of each pair, (N, 2, C)."""
    return task.forward(Colours(), Both(), batch)


@st.composite
def tasks(draw: st.DrawFn) -> RelativePosition:
    dims = draw(st.sampled_from([2, 3]))
    neighbours = draw(st.integers(1, 3**dims - 1))
    return RelativePosition(plain(neighbours=neighbours, both_directions=draw(st.booleans())), dims)


@both_dims
def test_the_directions_are_all_steps_to_a_neighbour(dims):
    found = [tuple(step) for step in neighbour_directions(dims).tolist()]
    assert len(found) == 3**dims - 1
    assert set(found) == set(product((-1, 0, 1), repeat=dims)) - {(0,) * dims}


@both_dims
def test_a_direction_counted_from_the_end_is_the_opposite(dims):
    directions = neighbour_directions(dims)
    assert torch.equal(directions.flip(0), -directions)


@settings(max_examples=30)
@given(task=tasks(), num_images=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_second_tile_lies_in_the_direction_of_the_label(task, num_images, seed):
    batch = task.make_batch(places(task.spatial_dims, num_images), generator(seed))
    first, second = pairs_of(task, batch).unbind(1)
    sizes = torch.tensor(SIZES[task.spatial_dims])
    voxels = (second - first) * (sizes - 1)
    assert torch.equal((voxels / (sizes // 3)).round().long(), task.directions[batch.target])


@settings(max_examples=30)
@given(task=tasks(), num_images=st.integers(1, 4), seed=st.integers(0, 99))
def test_one_tile_of_each_pair_is_the_middle_one(task, num_images, seed):
    batch = task.make_batch(places(task.spatial_dims, num_images), generator(seed))
    middle = (pairs_of(task, batch) - 0.5).abs().amax(2) < 1 / 6  # (N, 2): inside the middle cell
    assert (middle.sum(1) == 1).all()


@settings(max_examples=30)
@given(
    dims=st.sampled_from([2, 3]),
    neighbours=st.integers(1, 8),
    num_images=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_a_pair_the_other_way_round_has_the_opposite_label(dims, neighbours, num_images, seed):
    task = RelativePosition(plain(neighbours=neighbours), dims)
    batch = task.make_batch(places(dims, num_images), generator(seed))
    to, back = batch.target.reshape(num_images, 2, neighbours).unbind(1)
    assert torch.equal(task.directions[to], -task.directions[back])
    seen = pairs_of(task, batch).reshape(num_images, 2, neighbours, 2, dims)
    assert torch.equal(seen[:, 0], seen[:, 1].flip(2))


@settings(max_examples=60)
@given(task=tasks(), num_images=st.integers(1, 30), seed=st.integers(0, 99))
def test_every_direction_comes_up_equally_often(task, num_images, seed):
    batch = task.make_batch(torch.ones(num_images, 1, *[12] * task.spatial_dims), generator(seed))
    counts = torch.bincount(batch.target, minlength=task.num_classes)
    assert counts.max() - counts.min() <= 1


@given(task=tasks(), num_images=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_neighbours_of_an_image_are_different_ones(task, num_images, seed):
    batch = task.make_batch(torch.ones(num_images, 1, *[12] * task.spatial_dims), generator(seed))
    labels = batch.target.reshape(num_images, -1)[:, : task.neighbours]
    assert all(len(set(row)) == task.neighbours for row in labels.tolist())


def test_neighbours_are_drawn_anew_for_each_batch():
    task = RelativePosition(plain(), 3)
    draws = {tuple(task.make_batch(places(3), generator(seed)).target.tolist()) for seed in (1, 2)}
    assert len(draws) == 2


@pytest.mark.parametrize(("dims", "neighbours", "pairs"), [(2, 8, 16), (3, 8, 16)])
def test_by_default_each_image_gives_eight_neighbours_and_both_directions(dims, neighbours, pairs):
    task = RelativePosition(Config(), dims)
    batch = task.make_batch(places(dims, 2), generator())
    assert len(batch.inputs) == 2 * (1 + neighbours)
    assert len(batch.target) == 2 * pairs
    assert task.chance_level == 1 / (3**dims - 1)


def test_all_neighbours_of_a_volume_are_twenty_six():
    batch = RelativePosition(plain(neighbours="all", both_directions=False), 3).make_batch(
        places(3), generator()
    )
    assert sorted(batch.target.tolist()) == list(range(26))


def test_each_tile_is_embedded_once_whatever_the_number_of_its_pairs():
    task = RelativePosition(plain(neighbours="all"), 2)
    batch = task.make_batch(places(2, 3), generator())
    assert len(batch.inputs) == 27
    assert len(batch.target) == 48


def test_the_head_compares_the_embeddings_of_two_tiles():
    task = RelativePosition(Config(hidden=7), 2)
    backbone = Colours()
    backbone.embedding_channels = 5
    head = task.build_head(backbone)
    assert isinstance(head, SiameseHead)
    assert head(torch.rand(4, 2, 5)).shape == (4, 8)
    assert head.layers[0].out_features == 7


def test_pairs_with_a_tile_of_air_do_not_count():
    """The right half of the image is air: neighbours at +1 along the first axis hold nothing."""
    images = torch.zeros(2, 1, 36, 36)
    images[:, :, :24] = 0.8
    task = RelativePosition(Config(), 2)
    batch = task.make_batch(images, generator())
    air = task.directions[batch.target, 0]
    to, back = (part.flatten() for part in air.reshape(2, 2, 8).unbind(1))
    weight = batch.extras["weight"].reshape(2, 2, 8).transpose(0, 1).flatten(1)
    assert torch.equal(weight[0], (to != 1).float())
    assert torch.equal(weight[1], (back != -1).float())


def test_no_pair_counts_where_the_middle_is_air():
    images = torch.full((1, 1, 36, 36), 0.8)
    images[:, :, 12:24, 12:24] = 0
    batch = RelativePosition(Config(), 2).make_batch(images, generator())
    assert not batch.extras["weight"].any()


def test_the_share_of_puzzles_left_out_is_reported():
    images = torch.zeros(1, 1, 36, 36)
    images[:, :, :24] = 0.8
    task = RelativePosition(Config(), 2)
    batch = task.make_batch(images, generator())
    rate = task.metrics(torch.zeros(16, 8), batch)["rejection_rate"]
    assert torch.isclose(rate, torch.tensor(3 / 8))


def test_standardised_tiles_do_not_tell_their_place_by_their_brightness():
    ramp = places(2, 2)[:, :1] * 0.5 + 0.2
    ramp = ramp + 0.05 * torch.rand(ramp.shape, generator=generator())
    batch = RelativePosition(Config(), 2).make_batch(ramp, generator())
    assert (batch.inputs.flatten(1).mean(1) - 0.5).abs().max() < 0.01


def test_a_crop_too_small_for_the_tiles_is_refused():
    with pytest.raises(ConfigError, match=r"gives 3 cells an axis of \[3, 3\] voxels"):
        RelativePosition(Config(), 2).request(SampleRequest(2, (11, 11), "axial"))


def test_crops_lie_inside_the_scan():
    base = SampleRequest(3, (24, 24, 24), min_foreground=0.3)
    request = RelativePosition(Config(), 3).request(base)
    assert not request.allow_padding
    assert request.min_foreground == 0.3


@pytest.mark.parametrize(("dims", "neighbours", "most"), [(2, 0, 8), (2, 9, 8), (3, 27, 26)])
def test_more_neighbours_than_there_are_or_none_are_refused(dims, neighbours, most):
    with pytest.raises(ConfigError) as refused:
        RelativePosition(Config(neighbours=neighbours), dims)
    assert str(refused.value) == (
        f"pretext.neighbours: {neighbours} neighbours of the middle tile asked for; "
        f"in {dims}D it has {most}. Choose 1 to {most}, or all."
    )


@pytest.mark.parametrize(
    ("step", "name"), [((-1, 1), "(-1, +1)"), ((0, -1), "(0, -1)"), ((1, 0, 0), "(+1, 0, 0)")]
)
def test_a_direction_is_named_by_its_steps(step, name):
    assert direction_name(step) == name


def test_a_picture_shows_both_tiles_with_label_and_answer():
    task = RelativePosition(plain(neighbours=1, both_directions=False), 2)
    batch = task.make_batch(places(2), generator())
    names, label = task.class_names(), int(batch.target)
    output = torch.nn.functional.one_hot(torch.tensor([3]), 8).float()
    ((first, second),) = task.panels(batch, output)
    assert torch.equal(first.image_XY, batch.inputs[0, 0])
    assert torch.equal(second.image_XY, batch.inputs[1, 0])
    assert (first.title, second.title) == ("seen from here", f"{names[label]}, answer {names[3]}")


def test_a_picture_of_a_pair_with_air_says_that_it_is_left_out():
    task = RelativePosition(Config(), 2)
    batch = task.make_batch(torch.zeros(1, 1, 36, 36), generator())
    rows = task.panels(batch, None)
    assert all(row[1].title.endswith(", left out") for row in rows)
