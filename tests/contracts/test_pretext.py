"""What every pretext task must do. A new task is tested by existing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import interpolate

from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import Backbone
from medssl.models.build import build_backbone
from medssl.models.inits import INITS
from medssl.pretext import PRETEXT_TASKS
from medssl.pretext.base import PretextTask
from medssl.training.loop import build_network
from medssl.transforms.sampling import SampleRequest
from sketches import Jigsaw, Multi, RelativePosition

SIZE = {2: (32, 32), 3: (16, 16, 16)}


def registered(name: str) -> Callable[[int], PretextTask]:
    return lambda dims: PRETEXT_TASKS.build(PRETEXT_TASKS.config_class(name)(), dims)


def multi(dims: int) -> PretextTask:
    return Multi([registered("rotation")(dims), registered("inpainting")(dims), Jigsaw(dims)])


TASKS = {
    **{name: registered(name) for name in PRETEXT_TASKS.names()},
    "sketch of jigsaw": Jigsaw,
    "sketch of relative position": RelativePosition,
    "sketch of multi": multi,
}
every_task = pytest.mark.parametrize("make", TASKS.values(), ids=TASKS.keys())
both_dims = pytest.mark.parametrize("dims", [2, 3])


def images(dims: int, count: int = 4) -> torch.Tensor:
    """Return smooth random images: each a coarse grid of random values, enlarged."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 1, *[4] * dims, generator=generator)
    return interpolate(coarse, size=SIZE[dims], mode="bilinear" if dims == 2 else "trilinear")


def puzzle_generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def backbone(dims: int) -> Backbone:
    config = BACKBONES.config_class("monai")(
        depth=10, spatial_dims=dims, base_channels=8, stem_stride=1
    )
    init = INITS.config_class("random")()
    return build_backbone(config, init, in_channels=1, seed=0)[0]


@every_task
@both_dims
def test_the_same_generator_gives_the_same_puzzles(make, dims):
    task = make(dims)
    first, second = (task.make_batch(images(dims), puzzle_generator()) for _ in range(2))
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.target, second.target)
    assert first.extras.keys() == second.extras.keys()
    assert all(torch.equal(first.extras[name], second.extras[name]) for name in first.extras)


@every_task
@both_dims
def test_the_images_are_left_as_they_are(make, dims):
    given = images(dims)
    make(dims).make_batch(given, puzzle_generator())
    assert torch.equal(given, images(dims))


@every_task
@both_dims
def test_the_network_answers_and_every_backbone_parameter_gets_a_gradient(make, dims):
    task = make(dims)
    network = build_network(backbone(dims), task, seed=0)
    batch = task.make_batch(images(dims), puzzle_generator())
    output = network(batch)
    loss = task.loss(output, batch)
    assert loss.ndim == 0
    loss.backward()
    without = [n for n, p in network.backbone.named_parameters() if p.grad is None]
    assert without == []
    for value in task.metrics(output, batch).values():
        assert value.ndim == 0
        assert torch.isfinite(value)


@every_task
@both_dims
def test_one_batch_can_be_overfitted(make, dims):
    task = make(dims)
    network = build_network(backbone(dims), task, seed=0)
    batch = task.make_batch(images(dims, 2), puzzle_generator())
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss = task.loss(network(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@every_task
@both_dims
def test_bfloat16_gives_a_finite_loss(make, dims):
    task = make(dims)
    network = build_network(backbone(dims), task, seed=0)
    batch = task.make_batch(images(dims), puzzle_generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task.loss(network(batch), batch)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", PRETEXT_TASKS.names())
@both_dims
def test_labels_of_classification_tasks_are_balanced(name, dims):
    task = registered(name)(dims)
    batch = task.make_batch(images(dims, 24), puzzle_generator())
    if batch.target.is_floating_point():
        assert task.chance_level is None  # nothing is classified
        return
    counts = torch.bincount(batch.target, minlength=round(1 / task.chance_level))
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("name", PRETEXT_TASKS.names())
@both_dims
def test_constant_scans_all_give_the_same_answer(name, dims):
    """A network cannot beat chance on them: every puzzle of a class is the same image."""
    task = registered(name)(dims)
    constant = torch.full((4, 1, *SIZE[dims]), 0.5)
    batch = task.make_batch(constant, puzzle_generator())
    if batch.target.is_floating_point():
        assert torch.allclose(batch.inputs, batch.target)  # the trivial fill is already right
    else:
        assert torch.equal(batch.inputs, batch.inputs[:1].expand_as(batch.inputs))


@pytest.mark.parametrize("name", PRETEXT_TASKS.names())
@both_dims
def test_the_task_declares_what_people_judge_it_by(name, dims):
    task = registered(name)(dims)
    batch = task.make_batch(images(dims), puzzle_generator())
    network = build_network(backbone(dims), task, seed=0)
    assert task.primary_metric in task.metrics(network(batch), batch)
    low, high = task.healthy_range
    assert low < high
    if task.chance_level is not None and task.higher_is_better:
        assert low > task.chance_level


@pytest.mark.parametrize("name", PRETEXT_TASKS.names())
@both_dims
def test_pictures_of_puzzles_are_plain_2d_images(name, dims):
    task = registered(name)(dims)
    network = build_network(backbone(dims), task, seed=0)
    batch = task.make_batch(images(dims), puzzle_generator())
    rows = task.panels(batch, network(batch))
    assert rows
    for panel in (panel for row in rows for panel in row):
        assert panel.image_XY.ndim == 2
        assert panel.title


@pytest.mark.parametrize("name", PRETEXT_TASKS.names())
@both_dims
def test_the_request_keeps_crop_and_dimensions(name, dims):
    base = SampleRequest(
        spatial_dims=dims, crop_size=SIZE[dims], plane="axial" if dims == 2 else None
    )
    request = registered(name)(dims).request(base)
    assert request.crop_size == base.crop_size
    assert request.spatial_dims == dims


def test_multi_swaps_the_head_by_the_batch():
    task = multi(2)
    network = build_network(backbone(2), task, seed=0)
    seen = set()
    for seed in range(12):
        batch = task.make_batch(images(2), puzzle_generator(seed))
        network.zero_grad()
        task.loss(network(batch), batch).backward()
        used = {
            name
            for name, head in network.head.items()
            if any(parameter.grad is not None for parameter in head.parameters())
        }
        assert used == {batch.task}
        seen |= used
    assert seen == {"rotation", "inpainting", "jigsaw"}
