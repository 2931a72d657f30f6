"""The optimiser and its schedule: AdamW, SGD or LARS, linear warm-up, cosine decay."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import nn

from medssl.config import Config
from medssl.models.backbones.base import Backbone

_TRACING_SIZE = {2: 64, 3: 32}
"""Voxels along each axis of the image by which a backbone's layers are put in order."""


class OptimizationConfig(Config):
    """How weights are updated.

    Attributes:
        optimizer: ``adamw``, ``sgd`` (Nesterov momentum 0.9) or ``lars`` (You et al. 2017, for
            batches of thousands).
        learning_rate: of the head, and of the backbone unless scaled.
        backbone_scale: the backbone's learning rate as a share of ``learning_rate``.
        layer_decay: from each stage of the backbone to the one before it, the learning rate is
            multiplied by this (layer-wise rates; fine-tuning often takes 0.65 to 0.9).
        weight_decay: decoupled; not applied to biases and norm parameters.
        warmup_steps: steps over which the rate rises linearly from zero.
        frozen_steps: first steps in which the backbone's weights are not updated.
        min_share: share of the peak that the rate falls towards over the steps.
        gradient_clip: greatest norm of the gradient; 0 for none.
        ema_decay: share of the averaged weights that stays at each step, for example 0.999; the
            average (exponential moving average) is what is validated and kept. 0 for none.
    """

    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    backbone_scale: float = Field(default=1.0, ge=0)
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    frozen_steps: int = Field(default=0, ge=0)
    min_share: float = Field(default=0.01, ge=0, le=1)
    gradient_clip: float = Field(default=1.0, ge=0)
    ema_decay: float = Field(default=0.0, ge=0, lt=1)


def build_optimizer(network: nn.Module, config: OptimizationConfig) -> torch.optim.Optimizer:
    """Return an optimiser with groups of backbone and rest, decayed and not, by stage.

    Each group carries ``is_backbone`` and ``scale``, which `set_learning_rates` reads.
    """
    scales = _stage_scales(network, config.layer_decay)
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        scale = scales.get(name, 1.0)
        key = (name.startswith("backbone."), parameter.ndim > 1, scale)
        groups.setdefault(key, []).append(parameter)
    parameters: list[dict[str, Any]] = [
        {
            "params": members,
            "is_backbone": is_backbone,
            "scale": scale,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (is_backbone, decayed, scale), members in sorted(
            groups.items(), key=lambda item: item[0]
        )
    ]
    rate = config.learning_rate
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9, nesterov=True, fused=True)
    if config.optimizer == "lars":
        from timm.optim.lars import Lars  # takes a while to import, and few ask for it

        return cast("torch.optim.Optimizer", Lars(parameters, lr=rate, momentum=0.9))
    return torch.optim.AdamW(parameters, lr=rate, fused=True)


def _stage_scales(network: nn.Module, decay: float) -> dict[str, float]:
    """Return the share of the backbone's rate for each of its parameters, by name."""
    if decay == 1:
        return {}
    backbone = cast("Backbone", network.get_submodule("backbone"))
    last = len(backbone.stages) - 1
    return {
        f"backbone.{name}": decay ** (last - stage)
        for name, stage in stages_of_parameters(backbone).items()
    }


def stages_of_parameters(backbone: Backbone) -> dict[str, int]:
    """Return, by name, the first stage of a backbone that each of its parameters acts on.

    Found out by gradients, so it holds for any network. Random states are left alone.
    """
    size = (_TRACING_SIZE[backbone.spatial_dims],) * backbone.spatial_dims
    image = torch.rand(
        1, backbone.in_channels, *size, generator=torch.Generator().manual_seed(0)
    ).to(next(backbone.parameters()).device)
    training = backbone.training
    backbone.eval()
    names, parameters = zip(*backbone.named_parameters(), strict=True)
    found: dict[str, int] = {}
    with torch.enable_grad():
        features = backbone(image)
        for number, feature in enumerate(features):
            gradients = torch.autograd.grad(
                feature.sum(), parameters, retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    found.setdefault(name, number)
    backbone.train(training)
    return {name: found.get(name, len(features) - 1) for name in names}


def learning_rate_share(step: int, num_steps: int, config: OptimizationConfig) -> float:
    """Return the learning rate at a step as a share of its peak."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.min_share + (1 - config.min_share) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rates(
    optimizer: torch.optim.Optimizer, step: int, num_steps: int, config: OptimizationConfig
) -> float:
    """Set every group's rate for a step and return the head's."""
    rate = config.learning_rate * learning_rate_share(step, num_steps, config)
    for group in optimizer.param_groups:
        share = 1.0
        if group["is_backbone"]:
            share = 0.0 if step < config.frozen_steps else config.backbone_scale * group["scale"]
        group["lr"] = rate * share
    return rate
