"""Rates and groups of parameters."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medssl.models.backbones import BACKBONES
from medssl.models.build import build_backbone
from medssl.models.inits import INITS
from medssl.training.network import Network, build_network
from medssl.training.optimization import (
    OptimizationConfig,
    build_optimizer,
    learning_rate_share,
    set_learning_rates,
    stages_of_parameters,
)
from training import pretext_task, tiny_backbone


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(tiny_backbone(2), pretext_task("inpainting", 2))


def rates(optimizer: torch.optim.Optimizer) -> dict[bool, list[float]]:
    """Return the rates of the backbone's groups (True) and of the others (False)."""
    return {
        side: [group["lr"] for group in optimizer.param_groups if group["is_backbone"] is side]
        for side in (True, False)
    }


@given(warmup=st.integers(0, 20), more=st.integers(1, 40), least=st.floats(0, 1))
def test_the_rate_rises_to_its_peak_and_then_only_falls(warmup, more, least):
    steps = warmup + more
    config = OptimizationConfig(warmup_steps=warmup, min_share=least)
    shares = [learning_rate_share(step, steps, config) for step in range(steps)]
    rising, falling = shares[: warmup + 1], shares[warmup:]
    assert all(a < b for a, b in pairwise(rising))
    assert all(a >= b for a, b in pairwise(falling))
    assert shares[warmup] == pytest.approx(1)
    assert all(0 < share <= 1 for share in rising)
    assert all(least - 1e-9 <= share <= 1 + 1e-9 for share in falling)


def test_the_schedule_by_hand():
    config = OptimizationConfig(warmup_steps=3, min_share=0.2)
    shares = [learning_rate_share(step, 7, config) for step in range(8)]
    falling = [0.2 + 0.8 * (1 + math.cos(math.pi * done / 4)) / 2 for done in range(5)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, *falling])
    assert shares[-1] == pytest.approx(0.2)  # where the cosine ends, one after the last step


def test_warming_up_longer_than_training_never_reaches_the_peak():
    config = OptimizationConfig(warmup_steps=10)
    assert learning_rate_share(3, 4, config) == pytest.approx(4 / 11)


def test_every_parameter_is_in_one_group(network: Network):
    optimizer = build_optimizer(network, OptimizationConfig())
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters())
    assert len(optimizer.param_groups) == 4


def test_biases_and_norms_are_not_decayed(network: Network):
    optimizer = build_optimizer(network, OptimizationConfig(weight_decay=0.3))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    norms = (nn.modules.batchnorm._BatchNorm, nn.InstanceNorm2d, nn.GroupNorm)
    seen = set()
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            plain = name == "bias" or isinstance(module, norms)
            assert decay[id(parameter)] == (0.0 if plain else 0.3), f"{type(module)}.{name}"
            seen.add(plain)
    assert seen == {True, False}


def test_groups_know_whether_they_are_the_backbones(network: Network):
    backbone = {id(p) for p in network.backbone.parameters()}
    for group in build_optimizer(network, OptimizationConfig()).param_groups:
        assert {id(p) in backbone for p in group["params"]} == {group["is_backbone"]}


def test_the_backbones_rate_is_scaled(network: Network):
    config = OptimizationConfig(learning_rate=0.4, backbone_scale=0.25)
    optimizer = build_optimizer(network, config)
    head = set_learning_rates(optimizer, 0, 10, config)
    assert head == pytest.approx(0.4)
    assert rates(optimizer) == {True: pytest.approx([0.1] * 2), False: pytest.approx([0.4] * 2)}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_frozen_steps_leave_the_backbones_weights_and_train_the_head(name: str):
    network = Network(tiny_backbone(2), pretext_task("rotation", 2))
    config = OptimizationConfig(optimizer=name, frozen_steps=2, weight_decay=0.5)
    optimizer = build_optimizer(network, config)
    moved = []
    for step in range(3):
        before = {key: p.detach().clone() for key, p in network.named_parameters()}
        set_learning_rates(optimizer, step, 10, config)
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        changed = {k for k, p in network.named_parameters() if not torch.equal(p, before[k])}
        moved.append({key.split(".")[0] for key in changed})
    assert moved == [{"head"}, {"head"}, {"backbone", "head"}]


def test_sgd_has_nesterov_momentum(network: Network):
    optimizer = build_optimizer(network, OptimizationConfig(optimizer="sgd"))
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(0.9, True)}


def test_rates_fall_from_stage_to_stage_towards_the_input(network: Network):
    config = OptimizationConfig(layer_decay=0.5, learning_rate=0.1)
    optimizer = build_optimizer(network, config)
    set_learning_rates(optimizer, 0, 10, config)
    rate = {
        name: next(
            group["lr"] for group in optimizer.param_groups if any(p is q for q in group["params"])
        )
        for name, p in network.named_parameters()
    }
    stages = stages_of_parameters(network.backbone)
    last = len(network.backbone.stages) - 1
    assert set(stages.values()) == set(range(last + 1))
    for name, stage in stages.items():
        assert rate[f"backbone.{name}"] == pytest.approx(0.1 * 0.5 ** (last - stage)), name
    assert all(rate[f"head.{name}"] == 0.1 for name, _ in network.head.named_parameters())


@pytest.mark.parametrize(
    "config",
    [
        BACKBONES.config_class("torchvision")(variant="resnet18"),
        BACKBONES.config_class("timm")(variant="efficientnet_lite0"),
        BACKBONES.config_class("monai")(variant="resnet", depth=10, spatial_dims=3),
    ],
    ids=lambda config: config.name,
)
def test_a_parameter_belongs_to_the_first_stage_that_feels_it(config: Any):
    backbone, _ = build_backbone(config, INITS.config_class("random")(), in_channels=1, seed=0)
    backbone.train()
    before = torch.get_rng_state()
    stages = stages_of_parameters(backbone)
    assert torch.equal(torch.get_rng_state(), before)
    assert backbone.training
    assert list(stages) == [name for name, _ in backbone.named_parameters()]
    assert sorted(set(stages.values())) == list(range(len(backbone.stages)))
    numbers = list(stages.values())
    assert numbers[0] == 0
    assert numbers[-1] == len(backbone.stages) - 1
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_each_optimizer_lowers_the_loss(name: Any):
    network = build_network(tiny_backbone(2), pretext_task("rotation", 2), seed=0)
    config = OptimizationConfig(
        optimizer=name, learning_rate={"adamw": 1e-3, "sgd": 1e-3, "lars": 0.5}[name]
    )
    optimizer = build_optimizer(network, config)
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (network.backbone(images)[-1] ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert ("Lars" in type(optimizer).__name__) == (name == "lars")
