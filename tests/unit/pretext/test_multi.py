"""Several tasks on one backbone: whose turn it is, which head learns, how the losses compare."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medssl.config import validate_config
from medssl.errors import ConfigError
from medssl.pipelines.pretrain import PretrainConfig
from medssl.pretext.multi import Config, MultiTask
from medssl.training.network import build_network
from medssl.transforms.sampling import Sample, SampleRequest
from training import tiny_backbone

PAIR = ({"name": "rotation", "views": 2}, {"name": "inpainting", "block": 4})
BASE = SampleRequest(2, (16, 16), "axial")


def multi(**settings: object) -> MultiTask:
    task = MultiTask(Config.model_validate({"tasks": PAIR, **settings}), 2)
    task.request(BASE)
    return task


def sample(step: int, channels: int = 1) -> Sample:
    images = torch.rand(4, channels, 16, 16, generator=torch.Generator().manual_seed(step))
    return Sample(images, None, step=step)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_alternating_tasks_take_turns():
    task = multi()
    names = [task.batch_of(sample(step), generator()).task for step in range(4)]
    assert names == ["rotation", "inpainting", "rotation", "inpainting"]


@given(share=st.floats(0.05, 20), start=st.integers(0, 10_000))
def test_proportional_tasks_come_as_often_as_their_shares_say_in_any_stretch(share, start):
    task = multi(mode="proportional", shares={"rotation": share})
    names = Counter(task.task_at(step).name for step in range(start, start + 200))
    assert abs(names["rotation"] / 200 - share / (share + 1)) < 0.03


def test_a_schedule_changes_the_shares_at_its_steps():
    task = multi(
        mode="scheduled",
        schedule=[
            {"from_step": 0, "shares": {"rotation": 1}},
            {"from_step": 10, "shares": {"inpainting": 2}},
        ],
    )
    assert {task.task_at(step).name for step in range(10)} == {"rotation"}
    assert {task.task_at(step).name for step in range(10, 30)} == {"inpainting"}


def test_only_the_head_of_the_batch_and_the_backbone_learn():
    task = multi()
    network = build_network(tiny_backbone(2), task, seed=0)
    for step, used in enumerate(("rotation", "inpainting")):
        network.zero_grad()
        batch = task.batch_of(sample(step), generator())
        task.loss(network(batch), batch).backward()
        learning = {
            name
            for name, head in network.head.items()
            if any(weight.grad is not None for weight in head.parameters())
        }
        assert learning == {used}
        assert all(weight.grad is not None for weight in network.backbone.parameters())


def test_losses_are_in_units_of_the_answer_that_needs_no_network():
    balanced, plain = multi(), multi(balance="none")
    network = build_network(tiny_backbone(2), balanced, seed=0)
    batch = balanced.batch_of(sample(0), generator())
    output = network(batch)
    guessing = torch.log(torch.tensor(4.0))
    assert torch.isclose(balanced.loss(output, batch) * guessing, plain.loss(output, batch))
    weighed = multi(balance="none", weights={"rotation": 3})
    assert torch.isclose(weighed.loss(output, batch), 3 * plain.loss(output, batch))


def test_metrics_carry_the_name_of_their_task():
    task = multi()
    network = build_network(tiny_backbone(2), task, seed=0)
    batch = task.batch_of(sample(0), generator())
    metrics = task.metrics(network(batch), batch)
    assert {"relative_loss", "rotation_relative_loss", "rotation_accuracy"} <= metrics.keys()
    assert not [name for name in metrics if "inpainting" in name]


def test_validation_makes_puzzles_of_every_task():
    assert [batch.task for batch in multi().puzzles(sample(1), generator())] == [
        "rotation", "inpainting",
    ]  # fmt: skip


def test_the_cosine_of_gradients_is_that_of_the_tasks_own_gradients():
    task = multi()
    network = build_network(tiny_backbone(2), task, seed=0)
    found = task.diagnostics(network, task.puzzles(sample(0), generator()))
    gradients = []
    for batch in task.puzzles(sample(0), generator()):
        network.zero_grad()
        task.loss(network(batch), batch).backward()
        parts = [weight.grad.flatten() for weight in network.backbone.parameters()]
        gradients.append(torch.cat(parts))
    expected = torch.cosine_similarity(*gradients, dim=0)
    assert torch.isclose(found["gradient_cosine_rotation_inpainting"], expected, atol=1e-5)
    assert torch.isclose(found["rotation_gradient_norm"], gradients[0].norm(), rtol=1e-4)


def test_the_gradient_cosine_leaves_the_gradients_of_training_alone():
    task = multi()
    network = build_network(tiny_backbone(2), task, seed=0)
    task.diagnostics(network, task.puzzles(sample(0), generator()))
    assert all(weight.grad is None for weight in network.parameters())


def test_a_task_sees_only_the_neighbours_it_asked_for():
    task = MultiTask(Config.model_validate({"tasks": ["rotation", "slice_order"]}), 2)
    request = task.request(BASE)
    images = sample(0, channels=request.in_channels).images
    read = task.tasks["rotation"].make_batch(images[:, [request.num_neighbours]], generator())
    batch = task.puzzles(Sample(images, None), generator())[0]
    assert task.in_channels(request) == 1
    assert torch.equal(batch.inputs, read.inputs)


def test_tasks_whose_backbones_see_other_channels_are_refused():
    task = MultiTask(Config.model_validate({"tasks": ["rotation", "correspondence"]}), 2)
    with pytest.raises(ConfigError, match="same number of channels, found rotation 2, corr"):
        task.request(SampleRequest(2, (24, 24), "axial", num_sequences=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["rotation"]}, "at least 2"),
        ({"tasks": ["rotation", "rotation"]}, "each task may come once, found rotation, rotation"),
        ({"tasks": ["rotation", "multi"]}, "there is no pretext task 'multi'"),
        ({"shares": {"rotation": 1}}, "shares are for mode proportional"),
        ({"weights": {"jigsaw": 1}}, "weights names jigsaw; the tasks are rotation, inpainting"),
        ({"weights": {"rotation": -1}}, "weights must be 0 or more"),
        ({"mode": "scheduled"}, "mode scheduled and a schedule go together"),
        (
            {"mode": "proportional", "shares": {"rotation": 0, "inpainting": 0}},
            "shares leave no task",
        ),
        (
            {"mode": "scheduled", "schedule": [{"from_step": 5, "shares": {"rotation": 1}}]},
            "schedule starts at step 0 and goes upwards, found [5]",
        ),
        (
            {"mode": "scheduled", "schedule": [{"from_step": 0, "shares": {"rotation": 0}}]},
            "each phase of schedule needs a task with a share above 0",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    content = {
        "index": "data/index",
        "preprocessing": {"spacing_mm": [1, 1, 1]},
        "sampling": {"crop_size": [24, 24, 24]},
        "backbone": "monai",
        "training": {"steps": 1},
        "pretext": {"name": "multi", "tasks": list(PAIR), **settings},
    }
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate_config(content, PretrainConfig)


def test_a_blank_batch_does_not_blow_the_loss_up():
    task = multi()
    network = build_network(tiny_backbone(2), task, seed=0)
    blank = Sample(torch.zeros_like(sample(1).images), None, step=1)
    batch = task.batch_of(blank, generator())
    assert batch.task == "inpainting"
    assert task.loss(network(batch), batch) < 1000 * task.tasks["inpainting"].loss(
        network(batch), batch
    ).clamp(min=1)


def test_a_batch_without_a_puzzle_that_counts_has_no_relative_loss():
    task = MultiTask(Config.model_validate({"tasks": ["rotation", "jigsaw"]}), 2)
    network = build_network(tiny_backbone(2), task, seed=0)
    blank = Sample(torch.zeros_like(sample(1).images), None, step=1)
    batch = task.batch_of(blank, generator())
    assert batch.task == "jigsaw"
    assert batch.extras["weight"].sum() == 0
    metrics = task.metrics(network(batch), batch)
    assert torch.isnan(metrics["jigsaw_relative_loss"])
    assert task.loss(network(batch), batch) == 0
