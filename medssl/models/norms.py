"""Norms: what takes the place of batch norm where batches are small.

Statistics of few images are noisy, and differ between training and evaluation. Group norm and
instance norm look at each image alone.

Source: Wu & He, Group normalization, ECCV 2018; Ulyanov et al., Instance normalization, 2016.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer
from torch import nn

from medssl.config import ComponentConfig
from medssl.errors import ConfigError

Norm = Literal["batch", "group", "instance"]

MOST_GROUPS = 32
"""Groups of a group norm, as in the paper; fewer where they do not divide the channels."""


class NormConfig(ComponentConfig):
    """A configuration with a choice of norm.

    What is not set is not written either, so the files and digests of configurations made before
    a setting existed stay as they are.

    Attributes:
        norm: of networks with batch norm: ``batch``, or ``group`` (32 groups of channels, or as
            many as divide them) or ``instance`` (each channel alone; it needs more than one voxel
            in the last stage) where batches are small; None: the architecture's own.
    """

    norm: Norm | None = None

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if value is not None}


def replace_batch_norms(net: nn.Module, norm: Norm | None, name: str) -> None:
    """Replace every batch norm of a network, in place.

    Scales and offsets at the start, epsilon, and an activation joined to the norm (timm's
    ``BatchNormAct2d``) stay.

    Args:
        net: the network.
        norm: what takes the place of batch norm; ``batch`` and None change nothing.
        name: of the network, for messages.

    Raises:
        ConfigError: a norm is asked for, and the network has no batch norm over feature maps.
    """
    if norm is None:
        return
    # All kinds of batch norm derive from one class; those over plain vectors have no images apart.
    found = [
        (path, module)
        for path, module in net.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    if not found or any(isinstance(module, nn.BatchNorm1d) for _, module in found):
        raise ConfigError(
            f"norm: {norm} takes the place of the batch norm of feature maps, and {name} has none, "
            "or others beside. Leave norm out: it keeps the norm it was designed with."
        )
    if norm == "batch":
        return
    for path, module in found:
        parent, _, child = path.rpartition(".")
        setattr(net.get_submodule(parent), child, _replacement(module, norm))


def refuse_norm(norm: Norm | None, name: str) -> None:
    """Refuse a choice of norm for a network whose norm is part of its design.

    Raises:
        ConfigError: a norm is asked for.
    """
    if norm is not None:
        raise ConfigError(
            f"norm: {norm} takes the place of batch norm, and {name} has layer norm, which looks "
            "at each image alone already. Leave norm out."
        )


def check_file_norm(norm: Norm | None, file_name: str) -> None:
    """Refuse published weights for a network whose norm is not the file's.

    Raises:
        ConfigError: the network has no batch norm, for which the file's scales were trained.
    """
    if norm not in {None, "batch"}:
        raise ConfigError(
            f"init imagenet: {file_name} was trained with batch norm, and the config says norm: "
            f"{norm}. Leave norm out, or use another init."
        )


def _replacement(module: nn.modules.batchnorm._BatchNorm, norm: Norm) -> nn.GroupNorm:
    from timm.layers.norm_act import BatchNormAct2d, GroupNormAct

    channels = module.num_features
    groups = channels if norm == "instance" else math.gcd(MOST_GROUPS, channels)
    new: nn.GroupNorm
    if isinstance(module, BatchNormAct2d):
        new = GroupNormAct(channels, groups, eps=module.eps, affine=module.affine)
        new.drop, new.act = module.drop, module.act
    else:
        new = nn.GroupNorm(groups, channels, eps=module.eps, affine=module.affine)
    if module.affine:
        new.weight, new.bias = module.weight, module.bias
    return new
