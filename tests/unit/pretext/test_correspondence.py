"""Correspondence: which pairs belong together, and that nothing else tells them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from medssl.config import validate_config
from medssl.errors import ConfigError
from medssl.pretext._tiles import TilesConfig, level_tiles
from medssl.pretext.base import PretextBatch
from medssl.pretext.correspondence import Config, Correspondence, cut_views, other_places
from medssl.transforms.sampling import Sample, SampleRequest

NEGATIVES = ["other_patient", "other_place", "both"]
every_kind = pytest.mark.parametrize("negatives", NEGATIVES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def studies(count: int, channels: int = 2, size: tuple[int, ...] = (12, 10)) -> Tensor:
    """Return images of noise in [0.1, 0.9], in which no two places look alike."""
    return 0.1 + 0.8 * torch.rand(count, channels, *size, generator=generator(1))


def request(num_sequences: int = 2, side: int = 12, **changes: Any) -> SampleRequest:
    return SampleRequest(2, (side, side), "axial", num_sequences=num_sequences, **changes)


@st.composite
def puzzles(draw: DrawFn) -> tuple[Tensor, str, PretextBatch]:
    """Return images, a kind of negatives, and puzzles of it whose views are left as they are."""
    dims = draw(st.sampled_from([2, 3]))
    size = tuple(draw(st.integers(8, 12)) for _ in range(dims))
    images = studies(draw(st.integers(1, 9)), draw(st.integers(2, 4)), size)
    negatives = draw(st.sampled_from(NEGATIVES))
    task = Correspondence(Config(negatives=negatives, standardise=False), dims)
    return images, negatives, task.make_batch(images, generator(draw(st.integers(0, 999))))


@settings(max_examples=60)
@given(puzzle=puzzles())
def test_each_view_is_cut_from_one_sequence_where_the_puzzle_says(puzzle):
    images, _, batch = puzzle
    views = batch.inputs.unflatten(0, (-1, 2))
    for item in range(len(images)):
        for side in range(2):
            image, sequence, start = (
                batch.extras[name][item, side] for name in ("images", "sequences", "start")
            )
            size = views.shape[3:]
            region = tuple(slice(int(a), int(a) + b) for a, b in zip(start, size, strict=True))
            assert torch.equal(views[item, side, 0], images[(image, sequence, *region)])


@settings(max_examples=60)
@given(puzzle=puzzles())
def test_a_pair_belongs_together_if_and_only_if_image_and_place_agree(puzzle):
    images, negatives, batch = puzzle
    image, start = batch.extras["images"], batch.extras["start"]
    same_image = image[:, 0] == image[:, 1]
    same_place = (start[:, 0] == start[:, 1]).all(1)
    assert torch.equal(batch.target.bool(), same_image & same_place)
    assert (same_image | same_place).all()  # a negative differs in one thing alone
    apart = batch.target == 0
    if negatives == "other_place" or len(images) == 1:
        assert same_image.all()
    elif negatives == "other_patient":
        assert not same_image[apart].any()


@settings(max_examples=60)
@given(puzzle=puzzles())
def test_the_two_sequences_of_a_pair_differ_and_half_the_pairs_belong_together(puzzle):
    _, _, batch = puzzle
    sequences = batch.extras["sequences"]
    assert (sequences[:, 0] != sequences[:, 1]).all()
    together = int(batch.target.sum())
    assert abs(2 * together - len(batch.target)) <= 1


def test_both_kinds_of_negatives_come_up_where_both_are_asked_for():
    batch = Correspondence(Config(), 2).make_batch(studies(40), generator())
    image = batch.extras["images"][batch.target == 0]
    strange = image[:, 0] != image[:, 1]
    assert strange.any()
    assert not strange.all()


def test_every_pair_of_sequences_in_either_order_comes_up():
    batch = Correspondence(Config(), 2).make_batch(studies(60, 3), generator())
    pairs = {tuple(pair) for pair in batch.extras["sequences"].tolist()}
    assert len(pairs) == 6


@every_kind
def test_a_single_image_can_be_labelled_either_way(negatives):
    task, image = Correspondence(Config(negatives=negatives), 2), studies(1)
    labels = {int(task.make_batch(image, generator(seed)).target) for seed in range(20)}
    assert labels == {0, 1}


@settings(max_examples=60)
@given(
    room=st.lists(st.integers(0, 12), min_size=2, max_size=3).filter(any),
    seed=st.integers(0, 999),
)
def test_another_place_is_inside_and_a_third_of_the_room_away_along_some_axis(room, seed):
    limit = torch.tensor(room)
    start = (torch.rand(16, len(room), generator=generator(seed)) * (limit + 1)).long()
    found = other_places(start, tuple(room), generator(seed + 1))
    assert (found >= 0).all()
    assert (found <= limit).all()
    least = (limit + 1) // 3  # of few places: one voxel
    far = (found - start).abs() >= least.clamp(min=1)
    assert (far & (limit > 0)).any(1).all()


def test_all_places_are_equally_likely_the_second_time():
    start = torch.arange(9).repeat(2000)[:, None]
    found = other_places(start, (8,), generator())
    counts = torch.bincount(found[:, 0], minlength=9)
    assert counts.min() > 0.9 * counts.max()
    distance = (found - start).abs()
    assert int(distance.min()) == 3
    assert set(found[start == 0].tolist()) == {3, 4, 5, 6}


@pytest.mark.parametrize("size", [(12, 10), (9, 8, 10)])
def test_views_are_parts_of_their_images(size):
    images = studies(3, 2, size)
    part = tuple(side // 2 for side in size)
    start = torch.tensor([[0] * len(size), [1, 2, 3][: len(size)], [4] * len(size)])
    views = cut_views(images, start, part)
    for item, (image, first) in enumerate(zip(images, start.tolist(), strict=True)):
        region = tuple(slice(a, a + b) for a, b in zip(first, part, strict=True))
        assert torch.equal(views[item], image[(slice(None), *region)])


def test_views_are_standardised_alone():
    images = studies(4)
    plain = Correspondence(Config(standardise=False), 2).make_batch(images, generator())
    level = Correspondence(Config(), 2).make_batch(images, generator())
    views = plain.inputs.unflatten(0, (-1, 2))
    config = TilesConfig(name="tiles", standardise=True)
    assert torch.allclose(level.inputs, level_tiles(views, config, generator()).flatten(0, 1))
    means = level.inputs.flatten(1).mean(1)
    assert torch.allclose(means, torch.full_like(means, 0.5), atol=0.02)


def test_brightness_and_contrast_of_a_sequence_do_not_reach_the_network():
    task, images = Correspondence(Config(), 2), studies(4)
    gain = torch.rand(4, 2, 1, 1, generator=generator(2)) * 0.5 + 0.4
    first, second = (task.make_batch(batch, generator()) for batch in (images, gain * images))
    assert torch.allclose(first.inputs, second.inputs, atol=1e-4)


def test_intensities_are_varied_for_each_view_where_asked_for():
    images = studies(4)
    plain, varied = (
        Correspondence(Config(standardise=False, intensity_jitter=jitter), 2).make_batch(
            images, generator()
        )
        for jitter in (0.0, 0.3)
    )
    changes = (varied.inputs - plain.inputs).flatten(1).mean(1)
    assert len(set(changes.tolist())) == 8


@every_kind
@pytest.mark.parametrize("seed", [0, 1])
def test_a_pair_counts_if_both_that_could_be_shown_hold_enough_tissue(negatives, seed):
    """So that labels are no better known among the pairs that count."""
    images = studies(400, 2, (16, 16))
    images[..., 8:] = 0
    task = Correspondence(Config(negatives=negatives, min_foreground=0.5), 2)
    batch = task.make_batch(images, generator(seed))
    views = (batch.inputs.unflatten(0, (-1, 2)) != batch.inputs.amin()).flatten(2)
    weight = batch.extras["weight"].bool()
    assert views.float().mean(2)[weight].min() > 0.3
    assert 0.05 < float(weight.float().mean()) < 0.95
    share = float(batch.target[weight].float().mean())
    assert share == pytest.approx(0.5, abs=4 * 0.5 / int(weight.sum()) ** 0.5)


def test_images_of_air_do_not_count():
    task = Correspondence(Config(), 2)
    batch = task.make_batch(torch.zeros(4, 2, 16, 16), generator())
    assert batch.extras["weight"].tolist() == [0.0] * 4


def test_a_crop_is_asked_for_that_lies_inside_the_scan_and_the_backbone_sees_one_channel():
    task = Correspondence(Config(), 2)
    asked = task.request(request(3))
    assert not asked.allow_padding
    assert asked.num_sequences == 3
    assert task.in_channels(asked) == 1


@pytest.mark.parametrize(
    ("config", "base", "text"),
    [
        (
            {},
            request(1),
            (
                "sampling.num_sequences: correspondence needs 2 co-registered sequences or more, "
                "found 1. Set it to what the scans have, or choose another task."
            ),
        ),
        (
            {},
            request(2, num_neighbours=2),
            (
                "correspondence takes slices without neighbours, found num_neighbours 2. "
                "Set it to 0, or choose another task."
            ),
        ),
        (
            {},
            request(2, side=6),
            (
                "sampling.crop_size: [6, 6] gives views of [3, 3] voxels (pretext.view: 0.5); each "
                "side must have 4 or more, and one be smaller than the crop. "
                "Take a larger crop, or another pretext.view."
            ),
        ),
        (
            {"view": 0.99},
            request(2, side=6),
            (
                "sampling.crop_size: [6, 6] gives views of [6, 6] voxels (pretext.view: 0.99); "
                "each side must have 4 or more, and one be smaller than the crop. "
                "Take a larger crop, or another pretext.view."
            ),
        ),
    ],
)
def test_scans_and_crops_that_give_no_pairs_are_refused(config, base, text):
    with pytest.raises(ConfigError) as refused:
        Correspondence(Config(**config), 2).request(base)
    assert str(refused.value) == text


def test_images_of_one_sequence_are_refused():
    with pytest.raises(ConfigError) as refused:
        Correspondence(Config(), 2).make_batch(torch.rand(2, 1, 16, 16), generator())
    assert str(refused.value) == (
        "correspondence compares 2 sequences, found images of 1 channel. "
        "Set sampling.num_sequences to what the scans have."
    )


@pytest.mark.parametrize("answered", [True, False])
def test_pictures_show_both_views_and_the_answer(answered):
    batch = Correspondence(Config(), 2).make_batch(studies(2), generator())
    output = torch.tensor([[0.0, 1.0], [0.0, 1.0]]) if answered else None
    rows = Correspondence(Config(), 2).panels(batch, output)
    for row, label, (first, second) in zip(
        rows, batch.target, batch.extras["sequences"].tolist(), strict=True
    ):
        answer = ["different", "same"][int(label)] + (", answer same" if answered else "")
        assert [panel.title for panel in row] == [
            f"sequence {first}",
            f"sequence {second}: {answer}",
        ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"negatives": "none"},
            "negatives: input should be 'other_patient', 'other_place' or 'both' (found 'none')",
        ),
        ({"view": 1}, "view: input should be less than 1 (found 1)"),
        ({"view": 0}, "view: input should be greater than 0 (found 0)"),
        ({"hidden": 0}, "hidden: input should be greater than or equal to 1 (found 0)"),
    ],
)
def test_a_task_that_cannot_be_is_refused_by_the_config(change, text):
    with pytest.raises(ConfigError) as refused:
        validate_config({"name": "correspondence", **change}, Config)
    assert text in str(refused.value)


def test_images_of_one_scan_are_no_strangers():
    """Two crops of one scan in a batch: the other patient must be another one."""
    images = studies(6)
    task = Correspondence(Config(negatives="other_patient", standardise=False), 2)
    keys = ["a", "a", "a", "b", "b", "a"]
    for seed in range(20):
        batch = task.batch_of(Sample(images, None, keys), generator(seed))
        sources = batch.extras["images"]
        strangers = sources[:, 0] != sources[:, 1]
        pairs = [(keys[int(a)], keys[int(b)]) for a, b in sources[strangers]]
        assert all(a != b for a, b in pairs)
        assert torch.equal(
            batch.target.bool(),
            ~strangers & (batch.extras["start"][:, 0] == batch.extras["start"][:, 1]).all(1),
        )


def test_a_batch_of_one_scan_asks_for_places():
    task = Correspondence(Config(negatives="other_patient"), 2)
    batch = task.batch_of(Sample(studies(4), None, ["a"] * 4), generator())
    assert (batch.extras["images"][:, 0] == batch.extras["images"][:, 1]).all()
    assert batch.target.sum() == 2
