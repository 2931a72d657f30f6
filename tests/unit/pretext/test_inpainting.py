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
from medssl.models.backbones.base import Backbone
from medssl.pretext import _scores
from medssl.pretext._masks import block_mask, dilate
from medssl.pretext._scores import (
    SSIM_WINDOW,
    biharmonic_fill,
    masked_mean,
    masked_psnr,
    masked_ssim,
    ssim_map,
)
from medssl.pretext.base import PretextBatch
from medssl.pretext.inpainting import AdversarialDecoder, Config, Inpainting, Judged
from medssl.training.network import build_network
from training import tiny_backbone


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
    mean = torch.full((len(target), 1, 1, 1), 0.5)
    extras = {"hidden": hidden, "scored": hidden, "weight": hidden, "mean": mean}
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
        (
            {"holes": "star"},
            "holes: input should be 'blocks', 'centre' or 'region' (found 'star')",
        ),
        ({"overlap": -1}, "overlap: input should be greater than or equal to 0 (found -1)"),
        ({"overlap_weight": 0}, "overlap_weight: input should be greater than 0 (found 0)"),
        ({"adversarial": -1}, "adversarial: input should be greater than or equal to 0 (found -1)"),
    ],
)
def test_a_puzzle_that_cannot_be_is_refused_by_the_config(change, text):
    with pytest.raises(ConfigError) as refused:
        validate_config({"name": "inpainting", **change}, Config)
    assert text in str(refused.value)


def smooth(count: int, size: tuple[int, ...], seed: int = 1, channels: int = 1) -> Tensor:
    """Return images of large, soft blobs in [0.2, 0.8]."""
    coarse = torch.rand(count, channels, *[3] * len(size), generator=generator(seed))
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return 0.2 + 0.6 * torch.nn.functional.interpolate(
        coarse, size=size, mode=mode, align_corners=True
    )


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("holes", ["blocks", "centre", "region"])
def test_every_kind_of_hole_makes_a_puzzle(holes, dims):
    images = smooth(2, (16,) * dims)
    batch = Inpainting(Config(holes=holes, block=4), dims).make_batch(images, generator())
    changed = (batch.inputs != images).any(1, keepdim=True)
    assert changed.any()
    assert not (changed & ~batch.extras["hidden"]).any()
    assert torch.equal(batch.extras["weight"], batch.extras["hidden"])


# Overlap.


@pytest.mark.parametrize("overlap", [1, 3])
def test_the_band_around_a_hole_weighs_what_is_asked_for_and_the_rest_nothing(overlap):
    task = Inpainting(Config(holes="centre", ratio=0.2, overlap=overlap, overlap_weight=10), 2)
    batch = task.make_batch(torch.full((1, 1, 32, 32), 0.5), generator())
    hidden, weight = batch.extras["hidden"], batch.extras["weight"]
    near = dilate(hidden, overlap)
    assert (weight[hidden] == 1).all()
    assert (weight[near & ~hidden] == 10).all()
    assert (weight[~near] == 0).all()
    assert (near & ~hidden).any()


def test_the_band_stays_visible():
    task = Inpainting(Config(holes="centre", overlap=3), 2)
    images = smooth(2, (32, 32))
    batch = task.make_batch(images, generator())
    seen = ~batch.extras["hidden"]
    assert torch.equal(batch.inputs[seen], images[seen])


def test_an_error_in_the_band_counts_ten_times_one_in_the_hole():
    task = Inpainting(Config(holes="centre", ratio=0.1, overlap=2), 2)
    batch = task.make_batch(smooth(1, (24, 24)), generator())
    output = batch.target.clone().requires_grad_()
    loss = task.loss(output + 0.1, batch)
    (gradient,) = torch.autograd.grad(loss, output)
    hidden = batch.extras["hidden"]
    band = dilate(hidden, 2) & ~hidden
    assert torch.allclose(gradient[band], 10 * gradient[hidden][0])
    assert (gradient[~(hidden | band)] == 0).all()


def test_metrics_look_at_the_hole_alone():
    plain, band = (Inpainting(Config(holes="centre", overlap=width), 2) for width in (0, 3))
    images = smooth(2, (24, 24))
    output = torch.rand(2, 1, 24, 24, generator=generator(3))
    first, second = (task.make_batch(images, generator()) for task in (plain, band))
    assert plain.metrics(output, first) == band.metrics(output, second)


# Blank voxels.


def defaced() -> Tensor:
    """Return an image of tissue, with a cut of exactly zero that lies within reach of a hole."""
    images = smooth(1, (32, 32))
    images[..., 14:18, 10:20] = 0
    return images


def test_blank_voxels_in_a_hole_are_left_out_of_loss_and_metrics():
    task = Inpainting(Config(holes="centre", ratio=0.5, exclude_blank=True), 2)
    images = defaced()
    batch = task.make_batch(images, generator())
    hidden, blank = batch.extras["hidden"], images == 0
    assert (hidden & blank).any()
    output = torch.where(blank, 0.9, images).requires_grad_()
    loss = task.loss(output, batch)
    assert float(loss.detach()) == 0
    (gradient,) = torch.autograd.grad(task.loss(output * 0.9, batch), output)
    assert (gradient[blank] == 0).all()
    assert (gradient[hidden & ~blank] != 0).all()
    assert float(task.metrics(output.detach(), batch)["masked_l1"]) == 0


def test_blank_voxels_in_the_band_are_left_out_as_well():
    task = Inpainting(Config(holes="centre", ratio=0.05, overlap=8, exclude_blank=True), 2)
    images = defaced()
    weight = task.make_batch(images, generator()).extras["weight"]
    assert (weight[images == 0] == 0).all()


def test_by_default_blank_voxels_are_restored_like_others():
    batch = Inpainting(Config(holes="centre"), 2).make_batch(defaced(), generator())
    assert torch.equal(batch.extras["scored"], batch.extras["hidden"])


@given(brightness=st.floats(0, 0.2), contrast=st.floats(0.5, 1.1), gamma=st.floats(0.5, 2))
@settings(max_examples=20)
def test_brightness_contrast_and_gamma_do_not_hide_what_is_blank(brightness, contrast, gamma):
    task = Inpainting(Config(holes="centre", exclude_blank=True), 2)
    images = defaced()
    changed = (images**gamma * contrast + brightness).clamp(0, 1)
    extras = task.make_batch(changed, generator()).extras
    assert not extras["scored"][images == 0].any()


def test_a_voxel_that_is_dark_in_one_sequence_alone_is_not_blank():
    images = torch.cat([defaced(), smooth(1, (32, 32), seed=4)], dim=1)
    images[:, 1, 0, 0] = 0  # the other sequence's darkest voxel
    task = Inpainting(Config(holes="centre", exclude_blank=True), 2)
    batch = task.make_batch(images, generator())
    assert torch.equal(batch.extras["scored"], batch.extras["hidden"])


# Scores.


@pytest.mark.parametrize("shape", [(20, 17), (12, 11, 13)])
def test_the_similarity_is_that_of_scikit_image_away_from_the_border(shape):
    from skimage.metrics import structural_similarity

    first = torch.rand(1, 1, *shape, generator=generator(1))
    second = (first + 0.2 * torch.randn(1, 1, *shape, generator=generator(2))).clamp(0, 1)
    _, wanted = structural_similarity(
        first[0, 0].double().numpy(),
        second[0, 0].double().numpy(),
        win_size=SSIM_WINDOW,
        data_range=1.0,
        use_sample_covariance=False,
        full=True,
    )
    inner = (slice(SSIM_WINDOW // 2, -(SSIM_WINDOW // 2)),) * len(shape)
    found = ssim_map(first, second)[0, 0][inner]
    assert torch.allclose(found.double(), torch.from_numpy(wanted)[inner], atol=1e-4)


@settings(max_examples=30)
@given(sides=st.lists(st.integers(1, 12), min_size=2, max_size=3), seed=st.integers(0, 99))
def test_the_similarity_is_one_for_equal_images_symmetric_and_at_most_one(sides, seed):
    first = torch.rand(2, 1, *sides, generator=generator(seed))
    second = torch.rand(2, 1, *sides, generator=generator(seed + 1000))
    assert torch.allclose(ssim_map(first, first), torch.ones_like(first), atol=1e-4)
    assert torch.allclose(ssim_map(first, second), ssim_map(second, first), atol=1e-5)
    assert (ssim_map(first, second) <= 1 + 1e-4).all()


def test_scores_are_taken_inside_the_mask():
    target = smooth(1, (20, 20))
    mask = torch.zeros(1, 1, 20, 20).bool()
    mask[..., :5] = True
    far = target.clone()
    far[..., 12:] = 0
    assert float(masked_psnr(far, target, mask)) == pytest.approx(100)
    assert float(masked_ssim(far, target, mask)) == pytest.approx(1, abs=1e-5)
    assert float(masked_psnr(target + 0.1, target, mask)) == pytest.approx(20, abs=0.01)


def test_similarity_is_reported_in_validation_alone():
    task = Inpainting(Config(block=4), 2)
    batch = task.make_batch(smooth(2, (16, 16)), generator())
    answer = batch.inputs.clone()
    names = set(task.metrics(answer, batch))
    assert names == {
        f"{name}_{score}" for name in ("masked", "mean_fill") for score in ("l1", "psnr", "ssim")
    }
    training = set(task.metrics(answer.requires_grad_(), batch))
    assert names - training == {"masked_ssim", "mean_fill_ssim"}


def test_the_mean_fill_is_scored_like_the_network_that_answers_it():
    task = Inpainting(Config(block=4), 2)
    batch = task.make_batch(torch.rand(4, 1, 16, 16, generator=generator(2)), generator())
    metrics = task.metrics(batch.inputs, batch)
    for score in ("l1", "psnr", "ssim"):
        assert float(metrics[f"masked_{score}"]) == pytest.approx(
            float(metrics[f"mean_fill_{score}"]), rel=1e-5
        )


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_the_loss_of_guessing_is_that_of_the_mean(criterion):
    task = Inpainting(Config(block=4, criterion=criterion, overlap=1), 2)
    batch = task.make_batch(smooth(2, (16, 16)), generator())
    mean = batch.extras["mean"].expand_as(batch.target)
    assert torch.allclose(task.loss_of_guessing(batch), task.loss(mean, batch))


# The classical fill.


@pytest.mark.parametrize("shape", [(16, 16), (10, 10, 10)])
def test_the_smooth_fill_restores_a_slope(shape):
    slope = torch.linspace(0.1, 0.9, shape[0]).reshape(1, -1, *[1] * (len(shape) - 1))
    slope = slope.expand(1, *shape)
    hidden = torch.zeros(shape).bool()
    hidden[(slice(4, 8),) * len(shape)] = True
    filled = biharmonic_fill(slope, hidden, 0.0)
    assert torch.allclose(filled, slope, atol=1e-3)


def test_the_smooth_fill_leaves_what_is_visible_and_does_not_look_into_the_hole():
    image, hidden = smooth(1, (16, 16), channels=2)[0], torch.zeros(16, 16).bool()
    hidden[4:9, 5:9] = True
    filled = biharmonic_fill(image, hidden, 0.5)
    assert torch.equal(filled[:, ~hidden], image[:, ~hidden])
    assert torch.equal(filled, biharmonic_fill(torch.where(hidden, 1.0, image), hidden, 0.5))


def test_where_nothing_is_visible_the_smooth_fill_is_the_mean():
    filled = biharmonic_fill(torch.rand(1, 8, 8), torch.ones(8, 8).bool(), 0.3)
    assert torch.equal(filled, torch.full((1, 8, 8), 0.3))


def test_a_large_volume_is_filled_slice_by_slice(monkeypatch):
    monkeypatch.setattr(_scores, "SOLVED_WHOLE", 100)
    volume, hidden = smooth(1, (8, 8, 6))[0], torch.zeros(8, 8, 6).bool()
    hidden[2:5, 3:6, 1:] = True
    hidden[..., 3] = True
    filled = biharmonic_fill(volume, hidden, 0.3)
    for z in (0, 1, 5):
        alone = biharmonic_fill(volume[..., z], hidden[..., z], 0.3)
        assert torch.allclose(filled[..., z], alone)
    assert (filled[..., 3] == 0.3).all()


@pytest.mark.parametrize("dims", [2, 3])
def test_the_smooth_fill_beats_the_mean_on_smooth_images(dims):
    task = Inpainting(Config(block=4, ratio=0.3), dims)
    batch = task.make_batch(smooth(2, (12,) * dims), generator())
    found, trivial = task.baselines(batch), task.metrics(batch.inputs, batch)
    assert set(found) == {"biharmonic_fill_l1", "biharmonic_fill_psnr", "biharmonic_fill_ssim"}
    assert found["biharmonic_fill_l1"] < trivial["mean_fill_l1"]
    assert found["biharmonic_fill_psnr"] > trivial["mean_fill_psnr"]
    assert found["biharmonic_fill_ssim"] > trivial["mean_fill_ssim"]


@pytest.mark.parametrize(("most_voxels", "wanted"), [(10**6, 32), (3 * 144, 3), (1, 1)])
def test_a_few_images_are_filled_smoothly_but_one_at_least(monkeypatch, most_voxels, wanted):
    filled = []

    def fill(image: Tensor, hidden: Tensor, mean: float) -> Tensor:
        filled.append(mean)
        return image

    monkeypatch.setattr("medssl.pretext.inpainting.biharmonic_fill", fill)
    monkeypatch.setattr("medssl.pretext.inpainting._BASELINE_VOXELS", most_voxels)
    task = Inpainting(Config(block=4), 2)
    batch = task.make_batch(smooth(40, (12, 12)), generator())
    assert task.baselines(batch)["biharmonic_fill_l1"] == 0
    assert filled == pytest.approx(batch.extras["mean"][:wanted].flatten().tolist())


# The adversarial term.


def adversarial(dims: int = 2) -> tuple[Inpainting, Backbone, AdversarialDecoder, PretextBatch]:
    task = Inpainting(Config(block=4, adversarial=0.1), dims)
    network = build_network(tiny_backbone(dims), task, seed=0)
    assert isinstance(network.head, AdversarialDecoder)
    batch = task.make_batch(smooth(2, (16,) * dims), generator())
    return task, network.backbone, network.head, batch


def adversarial_part(task: Inpainting, output: Judged, batch: PretextBatch) -> Tensor:
    return task.loss(output, batch) - task.loss(output.restored, batch)


@pytest.mark.parametrize("dims", [2, 3])
def test_one_backward_pass_reaches_backbone_decoder_and_discriminator(dims):
    task, backbone, head, batch = adversarial(dims)
    task.loss(task.forward(backbone, head, batch), batch).backward()
    for module in (backbone, head.decoder, head.discriminator):
        assert all(parameter.grad is not None for parameter in module.parameters())


def test_the_discriminator_learns_to_tell_and_the_decoder_to_deceive():
    """A small step against the gradient, of either alone, helps that one."""
    task, backbone, head, batch = adversarial()
    output = task.forward(backbone, head, batch)
    adversarial_part(task, output, batch).backward()
    before = float((output.real.mean() - output.fake.mean()).detach())
    start = {name: value.clone() for name, value in head.state_dict().items()}

    def step(module: torch.nn.Module) -> Judged:
        head.load_state_dict(start)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 0.02 * parameter.grad / (parameter.grad.norm() + 1e-12)
            return task.forward(backbone, head, batch)

    told = step(head.discriminator)
    assert float(told.real.mean() - told.fake.mean()) > before
    deceived = step(head.decoder)
    assert float(deceived.fake.mean()) > float(output.fake.detach().mean())


def test_what_moves_the_discriminator_does_not_move_the_decoder_and_the_reverse():
    task, backbone, head, batch = adversarial()
    output = task.forward(backbone, head, batch)
    assert torch.allclose(output.fake, output.deceived, atol=1e-6)
    decoder, judge = list(head.decoder.parameters()), list(head.discriminator.parameters())
    for logits, moved, kept in (
        (output.real, judge, decoder),
        (output.fake, judge, decoder),
        (output.deceived, decoder, judge),
    ):
        found = torch.autograd.grad(
            logits.sum(), moved + kept, retain_graph=True, allow_unused=True
        )
        assert all(gradient is not None for gradient in found[: len(moved)])
        assert all(gradient is None for gradient in found[len(moved) :])


def test_the_discriminator_sees_the_image_where_it_is_visible():
    task, backbone, head, batch = adversarial()
    output = task.forward(backbone, head, batch)
    (gradient,) = torch.autograd.grad(output.deceived.sum(), output.restored)
    hidden = batch.extras["hidden"]
    assert (gradient[~hidden] == 0).all()
    assert (gradient[hidden] != 0).any()


def test_an_adversarial_training_stays_finite_and_restores():
    task, backbone, head, batch = adversarial()
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    errors = []
    for _ in range(30):
        output = task.forward(backbone, head, batch)
        loss = task.loss(output, batch)
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(task.metrics(output, batch)["masked_l1"]))
    assert errors[-1] < 0.3 * errors[0]


def test_the_discriminator_s_accuracy_is_reported_on_patches_with_holes():
    task, _, _, batch = adversarial()
    restored = batch.target
    right, wrong = torch.ones(2, 1, 2, 2), -torch.ones(2, 1, 2, 2)
    metrics = task.metrics(Judged(restored, right, wrong, wrong), batch)
    assert float(metrics["discriminator_accuracy"]) == 1
    metrics = task.metrics(Judged(restored, right, right, right), batch)
    assert float(metrics["discriminator_accuracy"]) == 0.5


@pytest.mark.parametrize("answered", [True, False])
def test_pictures_show_image_puzzle_and_what_was_restored(answered):
    task, backbone, head, batch = adversarial()
    with torch.no_grad():
        output = task.forward(backbone, head, batch)
    rows = task.panels(batch, output if answered else None)
    titles = ["image", "puzzle", "restored"] if answered else ["image", "puzzle"]
    assert [[panel.title for panel in row] for row in rows] == [titles] * 2


def test_the_weight_of_the_adversarial_term_is_the_decoders_alone():
    """The discriminator learns at its own weight, or it would never keep up."""
    task, backbone, head, batch = adversarial()
    heavier = Inpainting(Config(block=4, adversarial=1.0), 2)
    output = task.forward(backbone, head, batch)
    judge = list(head.discriminator.parameters())
    light = torch.autograd.grad(task.loss(output, batch), judge, retain_graph=True)
    heavy = torch.autograd.grad(heavier.loss(output, batch), judge, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(light, heavy, strict=True))


def test_an_image_without_a_voxel_to_score_is_passed_over():
    task = Inpainting(Config(block=4), 2)
    batch = task.make_batch(smooth(2, (12, 12)), generator())
    answer = batch.target + 0.1
    both = task.metrics(answer, batch)["masked_l1"]
    batch.extras["scored"][1] = False
    assert task.metrics(answer, batch)["masked_l1"] == pytest.approx(float(both))
    batch.extras["scored"][0] = False
    assert torch.isnan(task.metrics(answer, batch)["masked_l1"])
