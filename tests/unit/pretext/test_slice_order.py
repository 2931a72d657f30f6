"""Slice order: the label says whether the middle slice is in the middle, and nothing else does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from medssl.config import validate_config
from medssl.errors import ConfigError
from medssl.models.heads import SiameseHead
from medssl.pretext.base import PretextBatch
from medssl.pretext.slice_order import LABELS, TRIPLETS, Config, SliceOrder
from medssl.transforms.sampling import CropSampler, SampleRequest
from stores import make_store

SHUFFLED, ORDERED = 0, 1


class Brightness(nn.Module):
    """A backbone that says what its image looks like: the mean of each channel."""

    def embed(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


class Seen(nn.Module):
    """A head that hands back what it sees."""

    def forward(self, embeddings: Tensor) -> Tensor:
        return embeddings


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain(step: int = 2) -> Config:
    """Return a config that leaves intensities as they are and every puzzle in."""
    return Config(step=step, jitter=0, standardise=False, min_foreground=0)


def numbered(count: int, step: int, sequences: int = 1) -> Tensor:
    """Return images whose channels hold sequence + 0.01 * slice, slices running first."""
    depth = 4 * step + 1
    values = torch.arange(sequences)[:, None] + 0.01 * torch.arange(depth)
    return values.reshape(1, -1, 1, 1).expand(count, -1, 6, 5)


def slices_of(task: SliceOrder, batch: PretextBatch) -> Tensor:
    """Return the numbers of the slices of each puzzle of `numbered`, (N, 3, sequences)."""
    seen = task.forward(Brightness(), Seen(), batch)
    return ((seen - seen.floor()) / 0.01).round().long()


@given(step=st.integers(1, 4), count=st.integers(1, 4))
def test_a_triplet_is_ordered_where_its_second_slice_lies_between_the_others(step, count):
    task = SliceOrder(plain(step), 2)
    batch = task.make_batch(numbered(count, step), generator())
    first, middle, last = slices_of(task, batch).squeeze(2).unbind(1)
    between = (first - middle) * (middle - last) > 0
    assert torch.equal(between.long(), batch.target)


@given(step=st.integers(1, 4))
def test_ordered_slices_are_a_step_apart_and_all_lie_within_two_of_the_centre(step):
    task = SliceOrder(plain(step), 2)
    batch = task.make_batch(numbered(2, step), generator())
    slices = slices_of(task, batch).squeeze(2)
    gaps = slices.diff(dim=1).abs()
    assert (gaps[batch.target == ORDERED] == step).all()
    assert set(slices.flatten().tolist()) == {step * place for place in range(5)}


@given(sequences=st.integers(1, 3), step=st.integers(1, 3))
def test_each_slice_keeps_its_own_sequences_as_channels(sequences, step):
    task = SliceOrder(plain(step), 2)
    batch = task.make_batch(numbered(2, step, sequences), generator())
    assert batch.inputs.shape == (10, sequences, 6, 5)
    wanted = torch.arange(sequences).float()
    assert torch.equal(batch.inputs[..., 0, 0].floor(), wanted.expand(10, -1))
    slices = slices_of(task, batch)
    assert (slices == slices[:, :, :1]).all()


@pytest.mark.parametrize(("plane", "axis"), [("sagittal", 0), ("coronal", 1), ("axial", 2)])
def test_what_the_sampler_reads_are_slices_in_order_with_their_sequences(
    plane: str, axis: int, tmp_path: Path
):
    number = np.indices((12, 12, 12))[axis] / 64
    store = make_store(tmp_path, {"a1": np.stack([number + 0.125, number + 0.5])})
    task = SliceOrder(plain(), 2)
    request = task.request(SampleRequest(2, (12, 12), plane, num_sequences=2))
    sample = CropSampler(store, ["a1"], request, 0, "train").batch(0, 3)
    batch = task.make_batch(sample.images, generator())
    levels = batch.inputs.flatten(2)
    assert (levels == levels[:, :, :1]).all()
    slices = levels[:, :, 0].reshape(3, 5, 2)
    assert torch.equal(slices[..., 1] - slices[..., 0], torch.full((3, 5), 0.375))
    assert torch.equal(slices[..., 0].diff(dim=1), torch.full((3, 4), 2 / 64))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_slice_alone_tells_the_answer(place):
    """Neither does its place in the scan: both labels hold the same slices at each place."""
    found = {label: Counter() for label in (SHUFFLED, ORDERED)}
    for triplet, label in zip(TRIPLETS, LABELS, strict=True):
        found[label][triplet[place]] += 1
    assert found[SHUFFLED] == found[ORDERED]


def test_the_two_ends_together_do_not_tell_the_answer():
    found = {label: Counter() for label in (SHUFFLED, ORDERED)}
    for (first, _, last), label in zip(TRIPLETS, LABELS, strict=True):
        found[label][first, last] += 1
    assert found[SHUFFLED] == found[ORDERED]


def test_every_triplet_comes_backwards_too_with_the_same_label():
    puzzles = dict(zip(TRIPLETS, LABELS, strict=True))
    assert len(puzzles) == 8
    assert all(puzzles[triplet[::-1]] == label for triplet, label in puzzles.items())


@given(count=st.integers(1, 9))
def test_half_of_an_images_puzzles_are_ordered(count):
    batch = SliceOrder(plain(), 2).make_batch(numbered(count, 2), generator())
    assert (batch.target.reshape(count, 8).sum(1) == 4).all()


def test_each_slice_is_embedded_once():
    batch = SliceOrder(plain(), 2).make_batch(numbered(3, 2), generator())
    assert len(batch.inputs) == 15
    assert len(batch.target) == 24


@pytest.mark.parametrize("air", range(5))
def test_all_puzzles_of_an_image_are_left_out_where_one_of_its_slices_is_air(air):
    images = torch.full((2, 9, 6, 6), 0.5)
    images[0, 2 * air] = 0
    batch = SliceOrder(Config(), 2).make_batch(images, generator())
    assert batch.extras["weight"].tolist() == [0.0] * 8 + [1.0] * 8


def test_air_between_the_five_slices_does_not_matter():
    images = torch.full((1, 9, 6, 6), 0.5)
    images[:, 1::2] = 0
    assert SliceOrder(Config(), 2).make_batch(images, generator()).extras["weight"].all()


def test_the_share_of_puzzles_left_out_is_reported():
    images = torch.full((4, 9, 6, 6), 0.5)
    images[0, 0] = 0
    task = SliceOrder(Config(), 2)
    batch = task.make_batch(images, generator())
    assert task.metrics(torch.zeros(32, 2), batch)["rejection_rate"] == 0.25


def test_standardised_slices_do_not_tell_their_place_by_their_brightness():
    images = 0.2 * torch.rand(3, 9, 8, 8, generator=generator())
    images = images + torch.linspace(0.1, 0.7, 9)[:, None, None]
    batch = SliceOrder(Config(), 2).make_batch(images, generator())
    assert (batch.inputs.flatten(1).mean(1) - 0.5).abs().max() < 0.01


def test_intensity_jitter_changes_each_slice_by_itself():
    config = Config(standardise=False, intensity_jitter=0.2)
    batch = SliceOrder(config, 2).make_batch(torch.full((2, 9, 6, 6), 0.5), generator())
    assert len(set(batch.inputs[:, 0, 0, 0].tolist())) == 10


@given(jitter=st.integers(0, 4), seed=st.integers(0, 99))
def test_each_slice_is_displaced_by_itself_and_by_no_more_than_asked_for(jitter, seed):
    """Each voxel tells its place, so a slice's first voxel tells where it was cut."""
    place = torch.arange(9 * 8.0).reshape(9, 8) / 72
    config = Config(step=1, jitter=jitter, standardise=False, min_foreground=0)
    task = SliceOrder(config, 2)
    batch = task.make_batch(place.expand(20, 5, 9, 8), generator(seed))
    assert batch.inputs.shape == (100, 1, 9 - jitter, 8 - jitter)
    start = (batch.inputs[:, 0, 0, 0] * 72).round().long()
    rows, columns = (start // 8).tolist(), (start % 8).tolist()
    assert set(rows) == set(columns) == set(range(jitter + 1))
    for row, column, found in zip(rows, columns, batch.inputs, strict=True):
        part = place[row : row + 9 - jitter, column : column + 8 - jitter]
        assert torch.equal(found[0], part)


def test_slices_are_displaced_by_an_eighth_of_the_crop_by_default():
    batch = SliceOrder(Config(), 2).make_batch(torch.rand(2, 9, 32, 40), generator())
    assert batch.inputs.shape == (10, 1, 28, 36)


def test_a_crop_too_small_for_the_displacement_is_refused():
    with pytest.raises(ConfigError) as refused:
        SliceOrder(Config(jitter=5), 2).request(SampleRequest(2, (16, 8), "axial"))
    assert str(refused.value) == (
        "sampling.crop_size: [16, 8] does not hold slices of at least 4 voxels a side with a "
        "jitter of 5. Take a larger crop, or a smaller pretext.jitter."
    )


def test_slices_that_are_all_alike_give_every_puzzle_the_same_embeddings():
    task = SliceOrder(Config(), 2)
    batch = task.make_batch(torch.full((2, 9, 6, 6), 0.5), generator())
    seen = task.forward(Brightness(), Seen(), batch)
    assert torch.equal(seen, seen[:1].expand_as(seen))


def test_the_head_compares_the_embeddings_of_three_slices():
    backbone = Brightness()
    backbone.embedding_channels = 5
    head = SliceOrder(Config(hidden=7), 2).build_head(backbone)
    assert isinstance(head, SiameseHead)
    assert head(torch.rand(4, 3, 5)).shape == (4, 2)
    assert head.layers[0].out_features == 7


def growing_bodies() -> Tensor:
    """Return slices of a body that grows from slice to slice, with a texture of its own."""
    images = torch.zeros(2, 9, 12, 12)
    texture = 0.5 + 0.1 * torch.rand(12, 12, generator=generator())
    for place in range(9):
        images[:, place, : place + 3] = texture[: place + 3]
    return images


def test_the_rules_are_always_right_on_a_body_that_grows_evenly():
    task = SliceOrder(plain(), 2)
    found = task.baselines(task.make_batch(growing_bodies(), generator()))
    assert found == {"area_rule_accuracy": 1.0, "difference_rule_accuracy": 1.0}


def test_the_rules_stay_at_chance_on_slices_that_are_all_alike():
    task = SliceOrder(Config(), 2)
    found = task.baselines(task.make_batch(torch.full((2, 9, 6, 6), 0.5), generator()))
    assert found == {"area_rule_accuracy": 0.5, "difference_rule_accuracy": 0.5}


def test_rules_are_judged_on_the_puzzles_that_count():
    images = growing_bodies()
    images[1] = 0
    task = SliceOrder(Config(), 2)
    assert task.baselines(task.make_batch(images, generator()))["area_rule_accuracy"] == 1.0
    assert task.baselines(task.make_batch(torch.zeros_like(images), generator())) == {}


@given(step=st.integers(1, 5), sequences=st.integers(1, 3))
def test_two_steps_of_slices_on_each_side_are_asked_for_and_one_is_seen(step, sequences):
    task = SliceOrder(Config(step=step), 2)
    base = SampleRequest(2, (32, 24), "coronal", num_sequences=sequences, min_foreground=0.3)
    request = task.request(base)
    assert request.num_neighbours == 2 * step
    assert (request.crop_size, request.plane, request.min_foreground) == ((32, 24), "coronal", 0.3)
    assert task.in_channels(request) == sequences


def test_slices_without_a_plane_are_refused():
    with pytest.raises(ConfigError) as refused:
        SliceOrder(Config(), 2).request(SampleRequest(2, (32, 32)))
    assert str(refused.value) == (
        "sampling.plane: slice_order compares slices of 3D scans, or frames of cines, and no plane "
        "is given. Choose sagittal, coronal or axial (cines: axial)."
    )


def test_a_request_that_already_has_neighbours_is_refused():
    with pytest.raises(ConfigError) as refused:
        SliceOrder(Config(), 2).request(SampleRequest(2, (32, 32), "axial", num_neighbours=1))
    assert str(refused.value) == (
        "num_neighbours: slice_order shows the backbone single slices, found a request for 1 "
        "neighbours on each side. Set it to 0."
    )


def test_volumes_are_refused():
    with pytest.raises(ConfigError, match=r"slice_order takes 2D crops, found 3D"):
        SliceOrder(Config(), 3)


def test_images_without_the_neighbouring_slices_are_refused():
    with pytest.raises(ConfigError) as refused:
        SliceOrder(Config(), 2).make_batch(torch.rand(2, 5, 6, 6), generator())
    assert str(refused.value) == (
        "slice_order takes 9 neighbouring slices of each sequence as channels, found images of "
        "shape (2, 5, 6, 6). Sample them by the task's request."
    )


def test_a_step_of_nothing_is_refused_by_the_config():
    with pytest.raises(ConfigError, match=r"step: input should be greater than or equal to 1"):
        validate_config({"name": "slice_order", "step": 0}, Config)


def test_a_picture_shows_three_slices_with_label_and_answer():
    task = SliceOrder(plain(), 2)
    batch = task.make_batch(numbered(1, 2), generator())
    output = torch.tensor([[1.0, 0.0]]).expand(8, 2)
    row = task.panels(batch, output)[0]
    assert [panel.title for panel in row] == ["first", "ordered, answer shuffled", "last"]
    for panel, place in zip(row, TRIPLETS[0], strict=True):
        assert torch.equal(panel.image_XY, batch.inputs[place, 0])


def test_pictures_show_both_kinds_of_puzzles():
    task = SliceOrder(plain(), 2)
    rows = task.panels(task.make_batch(numbered(4, 2), generator()), None)
    assert {row[1].title for row in rows} == {"ordered", "shuffled"}


def test_a_picture_of_air_says_that_it_is_left_out():
    task = SliceOrder(Config(), 2)
    rows = task.panels(task.make_batch(torch.zeros(1, 9, 6, 6), generator()), None)
    assert all(row[1].title.endswith(", left out") for row in rows)
