"""The optimiser and its schedule: AdamW or SGD, linear warm-up, cosine decay."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from medssl.config import Config


class OptimizationConfig(Config):
    """How weights are updated.

    Attributes:
        optimizer: ``adamw`` or ``sgd`` (Nesterov momentum 0.9).
        learning_rate: of the head, and of the backbone unless scaled.
        backbone_scale: the backbone's learning rate as a share of ``learning_rate``.
        weight_decay: decoupled; not applied to biases and norm parameters.
        warmup_steps: steps over which the rate rises linearly from zero.
        frozen_steps: first steps in which the backbone's weights are not updated.
        min_share: share of the peak that the rate falls towards over the steps.
        gradient_clip: greatest norm of the gradient; 0 for none.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    backbone_scale: float = Field(default=1.0, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    frozen_steps: int = Field(default=0, ge=0)
    min_share: float = Field(default=0.01, ge=0, le=1)
    gradient_clip: float = Field(default=1.0, ge=0)


def build_optimizer(network: nn.Module, config: OptimizationConfig) -> torch.optim.Optimizer:
    """Return an optimiser with four groups: backbone and rest, decayed and not.

    Each group carries ``is_backbone``, which `set_learning_rates` reads.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        key = (name.startswith("backbone."), parameter.ndim > 1)
        groups.setdefault(key, []).append(parameter)
    parameters = [
        {
            "params": members,
            "is_backbone": is_backbone,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (is_backbone, decayed), members in sorted(groups.items(), key=lambda item: item[0])
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(parameters, lr=config.learning_rate)


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
        scale = 1.0
        if group["is_backbone"]:
            scale = 0.0 if step < config.frozen_steps else config.backbone_scale
        group["lr"] = rate * scale
    return rate
