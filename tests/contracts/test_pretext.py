"""What every pretext task must do. A new task is tested by existing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import interpolate

from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import Backbone
from medssl.models.build import build_backbone
from medssl.models.inits import INITS
from medssl.pretext import PRETEXT_TASKS
from medssl.pretext.base import PretextBatch, PretextTask
from medssl.training.network import build_network
from medssl.transforms.sampling import SampleRequest

SIZE = {2: (36, 36), 3: (24, 24, 24)}


def registered(name: str) -> Callable[[int], PretextTask]:
    def make(dims: int) -> PretextTask:
        if dims not in PRETEXT_TASKS.load(name).supported_dims:
            pytest.skip(f"{name} does not exist in {dims}D")
        return PRETEXT_TASKS.build(PRETEXT_TASKS.config_class(name)(), dims)

    return make


def base_request(task: PretextTask) -> SampleRequest:
    """Return the request of a study whose scans hold what the task needs."""
    dims = task.spatial_dims
    return SampleRequest(
        dims, SIZE[dims], "axial" if dims == 2 else None, num_sequences=task.min_sequences
    )


TASKS = {name: registered(name) for name in PRETEXT_TASKS.names()}
every_task = pytest.mark.parametrize("make", TASKS.values(), ids=TASKS.keys())
both_dims = pytest.mark.parametrize("dims", [2, 3])


def images(task: PretextTask, count: int = 4) -> torch.Tensor:
    """Return smooth random images: each a coarse grid of random values, enlarged."""
    generator = torch.Generator().manual_seed(1)
    dims = task.spatial_dims
    channels = task.request(base_request(task)).in_channels
    coarse = torch.rand(count, channels, *[6] * dims, generator=generator)
    return interpolate(coarse, size=SIZE[dims], mode="bilinear" if dims == 2 else "trilinear")


def part_of(task: PretextTask, batch: PretextBatch) -> PretextTask:
    """Return the task, of several, that made a batch."""
    return next(part for part in task.parts().values() if part.name == batch.task)


def puzzle_generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def backbone(task: PretextTask) -> Backbone:
    config = BACKBONES.config_class("monai")(
        depth=10, spatial_dims=task.spatial_dims, base_channels=8, stem_stride=1
    )
    init = INITS.config_class("random")()
    channels = task.in_channels(task.request(base_request(task)))
    return build_backbone(config, init, in_channels=channels, seed=0)[0]


def answered(task: PretextTask, count: int = 4) -> tuple[PretextBatch, Any]:
    """Return a batch of puzzles, and what a network that learnt nothing answers."""
    network = build_network(backbone(task), task, seed=0)
    batch = task.make_batch(images(task, count), puzzle_generator())
    with torch.no_grad():
        return batch, network(batch)


@every_task
@both_dims
def test_the_same_generator_gives_the_same_puzzles(make, dims):
    task = make(dims)
    first, second = (task.make_batch(images(task), puzzle_generator()) for _ in range(2))
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.target, second.target)
    assert first.extras.keys() == second.extras.keys()
    assert all(torch.equal(first.extras[name], second.extras[name]) for name in first.extras)


@every_task
@both_dims
def test_the_images_are_left_as_they_are(make, dims):
    task = make(dims)
    given = images(task)
    task.make_batch(given, puzzle_generator())
    assert torch.equal(given, images(task))


@every_task
@both_dims
def test_the_network_answers_and_every_backbone_parameter_gets_a_gradient(make, dims):
    task = make(dims)
    network = build_network(backbone(task), task, seed=0)
    batch = task.make_batch(images(task), puzzle_generator())
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
@pytest.mark.parametrize("dims", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_one_batch_can_be_overfitted(make, dims):
    task = make(dims)
    network = build_network(backbone(task), task, seed=0)
    batch = task.make_batch(images(task, 2), puzzle_generator())
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
    network = build_network(backbone(task), task, seed=0)
    batch = task.make_batch(images(task), puzzle_generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task.loss(network(batch), batch)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", PRETEXT_TASKS.names())
@both_dims
def test_labels_of_classification_tasks_are_balanced(name, dims):
    task = registered(name)(dims)
    batch = task.make_batch(images(task, 24), puzzle_generator())
    if batch.target.is_floating_point():
        assert part_of(task, batch).chance_level is None  # nothing is classified
        return
    counts = torch.bincount(batch.target, minlength=part_of(task, batch).num_classes)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("name", PRETEXT_TASKS.names())
@both_dims
def test_constant_scans_all_give_the_same_answer(name, dims):
    """A network cannot beat chance on them: every puzzle of a class is the same image."""
    task = registered(name)(dims)
    batch = task.make_batch(torch.full_like(images(task), 0.5), puzzle_generator())
    if batch.target.is_floating_point():
        output = build_network(backbone(task), task, seed=0)(batch)
        part = part_of(task, batch)
        assert part.metrics(output, batch)[part.trivial_metric] < 1e-6  # is already right
    else:
        assert torch.equal(batch.inputs, batch.inputs[:1].expand_as(batch.inputs))


@pytest.mark.parametrize("name", PRETEXT_TASKS.names())
@both_dims
def test_the_task_declares_what_people_judge_it_by(name, dims):
    task = registered(name)(dims)
    batch, output = answered(task)
    metrics = task.metrics(output, batch)
    assert task.primary_metric in metrics
    low, high = task.healthy_range
    assert low < high
    if task.chance_level is None:
        assert task.trivial_metric in metrics
    elif task.higher_is_better:
        assert low > task.chance_level


@pytest.mark.parametrize("name", PRETEXT_TASKS.names())
@both_dims
def test_the_confusion_matrix_counts_every_answer_that_accuracy_does(name, dims):
    whole = registered(name)(dims)
    batch, output = answered(whole)
    confusion = whole.confusion(output, batch)
    task = part_of(whole, batch)
    if batch.target.is_floating_point():
        assert confusion is None
        return
    assert confusion.shape == (task.num_classes, task.num_classes)
    assert len(set(task.class_names())) == task.num_classes
    accuracy = confusion.diagonal().sum() / confusion.sum()
    assert torch.allclose(accuracy, task.metrics(output, batch)["accuracy"], atol=1e-6)


@pytest.mark.parametrize("with_answers", [True, False], ids=["answered", "puzzles alone"])
@pytest.mark.parametrize("name", PRETEXT_TASKS.names())
@both_dims
def test_pictures_of_puzzles_are_plain_images(name, dims, with_answers):
    task = registered(name)(dims)
    batch, output = answered(task)
    rows = task.panels(batch, output if with_answers else None)
    assert rows
    for panel in (panel for row in rows for panel in row):
        assert panel.image_XY.shape[2:] in ((), (3,))  # grey, or RGB
        assert panel.image_XY.min() >= 0
        assert panel.image_XY.max() <= 1
        assert panel.title


@pytest.mark.parametrize("name", PRETEXT_TASKS.names())
@both_dims
def test_the_request_keeps_crop_and_dimensions(name, dims):
    task = registered(name)(dims)
    base = base_request(task)
    request = task.request(base)
    assert request.crop_size == base.crop_size
    assert request.spatial_dims == dims
