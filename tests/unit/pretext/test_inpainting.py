"""Inpainting: what is hidden, what the network sees in its place, and what counts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from medssl.config import validate_config
from medssl.errors import ConfigError
from medssl.pretext.base import PretextBatch
from medssl.pretext.inpainting import Config, Inpainting, block_mask, masked_mean


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blocks_of(voxels: Tensor, block: int) -> Tensor:
    """Return one value a block of (B, 1, *S): the voxel in its corner."""
    return voxels[(slice(None), 0, *[slice(None, None, block)] * (voxels.ndim - 2))]


@st.composite
def puzzles(draw: DrawFn) -> tuple[Tensor, int, float, int]:
    """Return images of air and tissue (whole blocks), a block, a ratio, a seed."""
    dims, block = draw(st.sampled_from([2, 3])), draw(st.integers(2, 4))
    sides = [draw(st.integers(1, 3 if dims == 3 else 5)) for _ in range(dims)]
    seed = draw(st.integers(0, 999))
    tissue = torch.rand(2, 1, *sides, generator=generator(seed)) < draw(st.floats(0, 1))
    images = 0.2 + 0.7 * torch.rand(2, 1, *[n * block for n in sides], generator=generator(seed))
    for axis in range(2, dims + 2):
        tissue = tissue.repeat_interleave(block, dim=axis)
    return images * tissue, block, draw(st.floats(0.05, 0.95)), seed


@settings(max_examples=40)
@given(puzzle=puzzles())
def test_the_wanted_share_of_tissue_is_hidden_and_at_least_one_block(puzzle):
    images, block, ratio, seed = puzzle
    hidden = blocks_of(block_mask(images, block, ratio, generator(seed)), block)
    tissue = blocks_of(images, block) > 0
    for item in range(len(images)):
        wanted = max(1, int((tissue[item].sum() * ratio).round()))
        assert int(hidden[item].sum()) == wanted


@settings(max_examples=40)
@given(puzzle=puzzles())
def test_holes_lie_in_tissue_wherever_there_is_any(puzzle):
    images, block, ratio, seed = puzzle
    hidden = block_mask(images, block, ratio, generator(seed))
    for image, holes in zip(images, hidden, strict=True):
        if (image > 0).any():
            assert (image[holes] > 0).all()


@settings(max_examples=40)
@given(puzzle=puzzles())
def test_whole_blocks_are_hidden(puzzle):
    images, block, ratio, seed = puzzle
    hidden = block_mask(images, block, ratio, generator(seed))
    corners = blocks_of(hidden, block)[:, None]
    for axis in range(2, images.ndim):
        corners = corners.repeat_interleave(block, dim=axis)
    assert torch.equal(hidden, corners)


@pytest.mark.parametrize("shape", [(10, 7), (5, 9, 6)])
def test_sizes_that_no_whole_number_of_blocks_fills_are_covered(shape):
    images = torch.full((3, 1, *shape), 0.5)
    hidden = block_mask(images, 4, 0.9, generator())
    assert hidden.shape == images.shape
    assert hidden.dtype == torch.bool
    assert hidden.flatten(1).any(1).all()
    assert not hidden.flatten(1).all(1).any()


def test_an_image_of_air_alone_still_gets_one_block():
    hidden = block_mask(torch.zeros(1, 1, 16, 16), 4, 0.5, generator())
    assert int(hidden.sum()) == 16


def test_images_of_a_batch_get_holes_of_their_own():
    hidden = block_mask(torch.full((8, 1, 32, 32), 0.5), 4, 0.5, generator())
    assert len({tuple(mask.flatten().tolist()) for mask in hidden}) == 8


@settings(max_examples=40)
@given(puzzle=puzzles(), fill=st.sampled_from(["mean", "noise"]))
def test_only_hidden_voxels_differ_from_the_image(puzzle, fill):
    images, block, ratio, seed = puzzle
    before = images.clone()
    task = Inpainting(Config(block=block, ratio=ratio, fill=fill), images.ndim - 2)
    batch = task.make_batch(images, generator(seed))
    seen = ~batch.extras["hidden"]
    assert torch.equal(images, before)
    assert torch.equal(batch.target, before)
    assert torch.equal(batch.inputs[seen], before[seen])


@pytest.mark.parametrize("fill", ["mean", "noise"])
def test_what_is_hidden_does_not_reach_the_network(fill):
    task = Inpainting(Config(block=4, fill=fill), 2)
    image = 0.2 + 0.6 * torch.rand(2, 1, 16, 16, generator=generator(1))
    first = task.make_batch(image, generator(5))
    hidden = first.extras["hidden"]
    second = task.make_batch(torch.where(hidden, image.flip(0) * 0.9, image), generator(5))
    assert torch.equal(second.extras["hidden"], hidden)
    assert torch.equal(first.inputs, second.inputs)


def test_mean_fill_is_the_mean_of_what_is_visible():
    task = Inpainting(Config(block=4), 2)
    images = torch.rand(3, 1, 16, 16, generator=generator(1))
    batch = task.make_batch(images, generator())
    for image, shown, hidden in zip(images, batch.inputs, batch.extras["hidden"], strict=True):
        visible = image[~hidden].mean()
        assert torch.allclose(shown[hidden], visible.expand(int(hidden.sum())))


def test_noise_fill_has_the_mean_and_deviation_of_what_is_visible():
    task = Inpainting(Config(block=8, fill="noise"), 2)
    images = (0.5 + 0.1 * torch.randn(1, 1, 256, 256, generator=generator(1))).clamp(0, 1)
    batch = task.make_batch(images, generator())
    hidden = batch.extras["hidden"]
    filled, visible = batch.inputs[hidden], images[~hidden]
    assert filled.mean() == pytest.approx(float(visible.mean()), abs=0.005)
    assert filled.std() == pytest.approx(float(visible.std()), abs=0.005)
    assert filled.min() >= 0
    assert filled.max() <= 1


def test_masked_mean_is_the_mean_where_the_mask_is_true():
    values = torch.arange(12.0).reshape(2, 1, 2, 3)
    mask = torch.tensor([[[[1, 0, 0], [0, 0, 1]]], [[[0, 1, 1], [0, 0, 0]]]]).bool()
    assert masked_mean(values, mask).tolist() == [2.5, 7.5]


def test_masked_mean_counts_each_channel_under_one_mask():
    values = torch.tensor([[[[1.0, 9.0]], [[3.0, 9.0]]]])  # two channels
    assert masked_mean(values, torch.tensor([[[[True, False]]]])).tolist() == [2.0]


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2).bool()).tolist() == [0.0]


def puzzle_with(target: Tensor, hidden: Tensor) -> PretextBatch:
    extras = {"hidden": hidden, "mean": torch.full((len(target), 1, 1, 1), 0.5)}
    return PretextBatch(torch.zeros_like(target), target, "inpainting", extras)


@pytest.mark.parametrize(("criterion", "wanted"), [("l1", 0.3), ("l2", 0.09)])
def test_the_loss_looks_at_hidden_voxels_alone(criterion, wanted):
    task = Inpainting(Config(criterion=criterion), 2)
    hidden = torch.zeros(2, 1, 4, 4).bool()
    hidden[:, :, :2] = True
    target = torch.full((2, 1, 4, 4), 0.4)
    output = torch.where(hidden, 0.7, torch.tensor(100.0)).requires_grad_()
    loss = task.loss(output, puzzle_with(target, hidden))
    assert float(loss.detach()) == pytest.approx(wanted, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, output)
    assert (gradient[~hidden] == 0).all()
    assert (gradient[hidden] != 0).all()


def test_every_image_counts_alike_however_much_of_it_is_hidden():
    hidden = torch.zeros(2, 1, 4, 4).bool()
    hidden[0, :, 0, 0] = True
    hidden[1] = True
    output = torch.zeros(2, 1, 4, 4)
    output[0] = 1.0
    loss = Inpainting(Config(), 2).loss(output, puzzle_with(torch.zeros(2, 1, 4, 4), hidden))
    assert float(loss) == pytest.approx(0.5)


def test_metrics_are_error_noise_ratio_and_the_error_of_the_trivial_answer():
    hidden = torch.zeros(1, 1, 4, 4).bool()
    hidden[..., 0] = True
    target = torch.full((1, 1, 4, 4), 0.3)
    metrics = Inpainting(Config(), 2).metrics(target + 0.1, puzzle_with(target, hidden))
    assert float(metrics["masked_l1"]) == pytest.approx(0.1)
    assert float(metrics["masked_psnr"]) == pytest.approx(-10 * math.log10(0.01), abs=1e-3)
    assert float(metrics["mean_fill_l1"]) == pytest.approx(0.2)


def test_answering_with_the_mean_scores_the_error_of_the_mean():
    task = Inpainting(Config(block=4), 2)
    batch = task.make_batch(torch.rand(4, 1, 16, 16, generator=generator(2)), generator())
    metrics = task.metrics(batch.inputs, batch)
    assert float(metrics["masked_l1"]) == pytest.approx(float(metrics["mean_fill_l1"]), rel=1e-6)


def test_a_perfect_answer_has_a_finite_noise_ratio():
    task = Inpainting(Config(block=4), 2)
    batch = task.make_batch(torch.rand(2, 1, 16, 16, generator=generator(2)), generator())
    assert float(task.metrics(batch.target, batch)["masked_psnr"]) == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ratio": 0}, "ratio: input should be greater than 0 (found 0)"),
        ({"ratio": 1}, "ratio: input should be less than 1 (found 1)"),
        ({"block": 1}, "block: input should be greater than or equal to 2 (found 1)"),
        ({"fill": "zero"}, "fill: input should be 'mean' or 'noise' (found 'zero')"),
    ],
)
def test_a_puzzle_that_cannot_be_is_refused_by_the_config(change, text):
    with pytest.raises(ConfigError) as refused:
        validate_config({"name": "inpainting", **change}, Config)
    assert text in str(refused.value)
