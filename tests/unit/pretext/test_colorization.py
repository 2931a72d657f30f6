"""Colourisation: what is hidden, what the network sees, and what counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medssl.config import validate_config
from medssl.errors import ConfigError
from medssl.pretext._masks import body_mask
from medssl.pretext.colorization import Colorization, Config, chroma_of, coloured
from medssl.transforms.sampling import SampleRequest

both_dims = pytest.mark.parametrize("dims", [2, 3])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sequences(count: int, channels: int, dims: int = 2, seed: int = 1) -> Tensor:
    """Return random images of tissue in [0.1, 0.9]."""
    return 0.1 + 0.8 * torch.rand(count, channels, *[8] * dims, generator=generator(seed))


def request(num_sequences: int, dims: int = 2, **changes: Any) -> SampleRequest:
    plane = "axial" if dims == 2 else None
    return SampleRequest(dims, (8,) * dims, plane, num_sequences=num_sequences, **changes)


@settings(max_examples=40)
@given(
    count=st.integers(1, 12),
    channels=st.integers(2, 5),
    dims=st.sampled_from([2, 3]),
    seed=st.integers(0, 99),
)
def test_one_sequence_of_each_image_is_hidden_and_each_equally_often(count, channels, dims, seed):
    images = sequences(count, channels, dims)
    batch = Colorization(Config(), dims).make_batch(images, generator(seed))
    hidden = batch.extras["hidden"].reshape(count, channels)
    assert (hidden.sum(1) == 1).all()
    often = hidden.sum(0)
    assert often.max() - often.min() <= 1


def test_each_sequence_is_hidden_at_times_even_in_batches_of_one():
    task, image = Colorization(Config(), 2), sequences(1, 3)
    chosen = {
        int(task.make_batch(image, generator(seed)).extras["hidden"].flatten().int().argmax())
        for seed in range(30)
    }
    assert chosen == {0, 1, 2}


def test_a_sequence_that_is_named_is_always_the_hidden_one():
    batch = Colorization(Config(hidden=1), 2).make_batch(sequences(5, 3), generator())
    assert batch.extras["hidden"].reshape(5, 3).tolist() == [[False, True, False]] * 5


@both_dims
def test_what_is_hidden_does_not_reach_the_network_and_the_rest_does(dims):
    task, images = Colorization(Config(), dims), sequences(4, 3, dims)
    batch = task.make_batch(images, generator())
    hidden = batch.extras["hidden"].expand_as(images)
    changed = torch.where(hidden, 1 - images, images)
    assert torch.equal(task.make_batch(changed, generator()).inputs, batch.inputs)
    assert torch.equal(batch.inputs[~hidden], images[~hidden])
    assert torch.equal(batch.target, images)


def test_in_place_of_the_hidden_sequence_is_the_mean_of_the_visible_ones_in_the_body():
    images = torch.zeros(2, 3, 40, 40)
    images[..., 10:30, 10:30] = 0.1 + 0.8 * torch.rand(2, 3, 20, 20, generator=generator(1))
    batch = Colorization(Config(hidden=0), 2).make_batch(images, generator())
    for item in range(2):
        wanted = images[item, 1:, 10:30, 10:30].mean()
        assert torch.allclose(batch.inputs[item, 0], wanted.expand(40, 40))


@pytest.mark.parametrize(("criterion", "wanted"), [("l1", 0.2), ("l2", 0.04)])
def test_the_loss_looks_at_the_hidden_sequence_in_the_body_alone(criterion, wanted):
    images = torch.zeros(2, 2, 40, 40)
    images[..., 10:30, 10:30] = 0.5
    task = Colorization(Config(criterion=criterion), 2)
    batch = task.make_batch(images, generator())
    scored = batch.extras["hidden"] & body_mask(images)
    output = torch.where(scored, images + 0.2, 9.0).requires_grad_()
    loss = task.loss(output, batch)
    assert float(loss.detach()) == pytest.approx(wanted, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, output)
    assert (gradient[~scored] == 0).all()
    assert (gradient[scored] != 0).all()


def test_metrics_are_the_network_s_error_and_those_of_two_trivial_answers():
    images = sequences(3, 3)
    task = Colorization(Config(hidden=2), 2)
    batch = task.make_batch(images, generator())
    metrics = task.metrics(images + 0.1, batch)
    hidden, visible = images[:, 2], images[:, :2].mean(1)
    own = hidden.mean((1, 2), keepdim=True)
    assert float(metrics["masked_l1"]) == pytest.approx(0.1, abs=1e-5)
    assert float(metrics["masked_psnr"]) == pytest.approx(20, abs=0.01)
    assert torch.allclose(metrics["mean_fill_l1"], (own - hidden).abs().mean())
    assert torch.allclose(metrics["visible_fill_l1"], (visible - hidden).abs().mean())


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_the_loss_of_guessing_is_that_of_the_hidden_sequence_s_mean(criterion):
    images = sequences(3, 2)
    task = Colorization(Config(hidden=0, criterion=criterion), 2)
    batch = task.make_batch(images, generator())
    means = images.mean((2, 3), keepdim=True).expand_as(images)
    assert torch.allclose(task.loss_of_guessing(batch), task.loss(means, batch))


# Colour from grey.


@settings(max_examples=40)
@given(seed=st.integers(0, 999), dims=st.sampled_from([2, 3]))
def test_brightness_and_colour_together_are_the_image(seed, dims):
    images = torch.rand(2, 3, *[4] * dims, generator=generator(seed))
    luma, chroma = chroma_of(images)
    assert luma.shape == (2, 1, *[4] * dims)
    assert chroma.shape == (2, 2, *[4] * dims)
    assert luma.min() >= 0
    assert luma.max() <= 1 + 1e-6
    assert chroma.abs().max() <= 0.5 + 1e-6
    assert torch.allclose(coloured(luma, chroma), images, atol=1e-5)


@pytest.mark.parametrize(
    ("rgb", "luma", "chroma"),
    [
        ((1, 1, 1), 1.0, (0, 0)),
        ((1, 0, 0), 0.299, (-0.168736, 0.5)),
        ((0, 1, 0), 0.587, (-0.331264, -0.418688)),
        ((0, 0, 1), 0.114, (0.5, -0.081312)),
    ],
)
def test_brightness_and_colour_are_those_of_the_standard(rgb, luma, chroma):
    images = torch.tensor(rgb, dtype=torch.float32).reshape(1, 3, 1, 1)
    found, colours = chroma_of(images)
    assert float(found) == pytest.approx(luma, abs=1e-6)
    assert colours.flatten().tolist() == pytest.approx(chroma, abs=1e-5)


@both_dims
def test_of_a_colour_image_the_network_sees_the_brightness_and_tells_the_colours(dims):
    task, images = Colorization(Config(mode="rgb"), dims), sequences(2, 3, dims)
    batch = task.make_batch(images, generator())
    luma, chroma = chroma_of(images)
    assert torch.equal(batch.inputs, luma)
    assert torch.equal(batch.target, chroma)
    assert task.in_channels(request(3, dims)) == 1


def test_a_grey_image_has_no_colours_to_tell():
    task, images = Colorization(Config(mode="rgb"), 2), sequences(2, 1).repeat(1, 3, 1, 1)
    batch = task.make_batch(images, generator())
    metrics = task.metrics(torch.zeros_like(batch.target), batch)
    assert float(metrics["masked_l1"]) < 1e-6
    assert float(metrics["mean_fill_l1"]) < 1e-6


def test_answering_one_colour_throughout_is_the_trivial_answer():
    task = Colorization(Config(mode="rgb"), 2)
    tinted = torch.tensor([0.9, 0.5, 0.6]).reshape(1, 3, 1, 1).expand(2, 3, 8, 8)
    batch = task.make_batch(tinted, generator())
    assert float(task.metrics(torch.zeros_like(batch.target), batch)["mean_fill_l1"]) < 1e-6
    assert float(task.metrics(torch.zeros_like(batch.target), batch)["masked_l1"]) > 0.05


def test_colours_are_told_in_the_body_alone():
    images = torch.zeros(1, 3, 40, 40)
    images[:, 0, 10:30, 10:30] = 0.8
    task = Colorization(Config(mode="rgb"), 2)
    batch = task.make_batch(images, generator())
    wrong = torch.where(body_mask(images), batch.target, 0.4)
    assert float(task.loss(wrong, batch)) == 0


@pytest.mark.parametrize("answered", [True, False])
@both_dims
def test_pictures_of_colours_are_in_colour(dims, answered):
    task, images = Colorization(Config(mode="rgb"), dims), sequences(2, 3, dims)
    batch = task.make_batch(images, generator())
    rows = task.panels(batch, batch.target if answered else None)
    assert [panel.title for panel in rows[0]] == ["image", "grey", "restored"][: 2 + answered]
    middle = images[0] if dims == 2 else images[0, ..., 4]
    for panel in rows[0][::2]:
        assert torch.allclose(panel.image_XY, middle.movedim(0, -1), atol=1e-5)
    assert rows[0][1].image_XY.shape == (8, 8)


@pytest.mark.parametrize("answered", [True, False])
def test_pictures_of_sequences_name_the_hidden_one(answered):
    task, images = Colorization(Config(hidden=1), 2), sequences(2, 2)
    batch = task.make_batch(images, generator())
    rows = task.panels(batch, images * 0.5 if answered else None)
    titles = ["sequence 0", "sequence 1, hidden", "sequence 1, restored"]
    assert [panel.title for panel in rows[0]] == titles[: 2 + answered]
    if answered:
        assert torch.allclose(rows[0][2].image_XY, images[0, 1] * 0.5)


# What is asked of the scans.


def test_the_backbone_sees_every_sequence():
    task = Colorization(Config(), 2)
    assert task.in_channels(task.request(request(4))) == 4


@pytest.mark.parametrize(
    ("config", "base", "text"),
    [
        (
            {},
            request(1),
            (
                "sampling.num_sequences: colorization needs 2 co-registered sequences or more, "
                "found 1. Set it to what the scans have, or choose another task."
            ),
        ),
        (
            {"mode": "rgb"},
            request(2),
            (
                "sampling.num_sequences: colorization of mode rgb takes scans of 3 channels (red, "
                "green, blue), found 2. Set it to 3, or choose pretext.mode: sequence."
            ),
        ),
        (
            {"hidden": 3},
            request(3),
            (
                "pretext.hidden: 3 is no sequence of scans that have 3 (sampling.num_sequences). "
                "Choose 0 to 2."
            ),
        ),
        (
            {},
            request(2, num_neighbours=1),
            (
                "colorization takes slices without neighbours, found num_neighbours 1. "
                "Set it to 0, or choose another task."
            ),
        ),
    ],
)
def test_scans_that_do_not_hold_what_is_needed_are_refused(config, base, text):
    with pytest.raises(ConfigError) as refused:
        Colorization(Config(**config), 2).request(base)
    assert str(refused.value) == text


def test_a_hidden_sequence_of_a_colour_image_is_refused():
    with pytest.raises(ConfigError) as refused:
        Colorization(Config(mode="rgb", hidden=1), 2)
    assert str(refused.value) == (
        "pretext.hidden: 1 names a sequence, but mode rgb hides all colours. "
        "Leave it out, or choose mode: sequence."
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mode": "lab"}, "mode: input should be 'sequence' or 'rgb' (found 'lab')"),
        ({"hidden": -1}, "hidden: input should be greater than or equal to 0 (found -1)"),
        ({"criterion": "l3"}, "criterion: input should be 'l1' or 'l2' (found 'l3')"),
    ],
)
def test_a_task_that_cannot_be_is_refused_by_the_config(change, text):
    with pytest.raises(ConfigError) as refused:
        validate_config({"name": "colorization", **change}, Config)
    assert text in str(refused.value)
