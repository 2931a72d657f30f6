"""Every member of the backbone registry, and every variant of it, keeps what it declares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from medssl.config import ComponentConfig
from medssl.errors import ConfigError
from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import Backbone
from medssl.models.build import seeded_construction
from medssl.models.decoders import UNetDecoder

SMALL = {
    "base_channels": 4,
    "backbone": {"name": "monai", "depth": 10, "spatial_dims": 2, "base_channels": 4},
}
"""Settings that make a network small, where a family has them."""

ODD_SIZE = (37, 70, 35)
EVEN_SIZE = (64, 32, 32)


def variants(name: str) -> Iterator[ComponentConfig]:
    """Yield a family's configurations: its defaults, then every other listed choice in turn."""
    cls = BACKBONES.config_class(name)
    base: dict[str, Any] = {}
    others: list[dict[str, Any]] = []
    for field, info in cls.model_fields.items():
        if get_origin(info.annotation) is Literal:
            choices = get_args(info.annotation)
            base[field] = choices[0] if info.is_required() else info.default
            others += [{field: choice} for choice in choices if choice != base[field]]
        elif field in SMALL:
            base[field] = SMALL[field]
    for changes in ({}, *others):
        yield cls.model_validate({**base, **changes})


CONFIGS = [config for name in BACKBONES.names() for config in variants(name)]


def label(config: ComponentConfig) -> str:
    return "-".join(str(value) for value in config.model_dump().values())


every_backbone = pytest.mark.parametrize("config", CONFIGS, ids=label)
channels = pytest.mark.parametrize("in_channels", [1, 3])


def build(config: ComponentConfig, in_channels: int = 1) -> Backbone:
    with seeded_construction(0, "test"):
        return BACKBONES.build(config, in_channels=in_channels)


def images(backbone: Backbone, size: tuple[int, ...] = ODD_SIZE, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, backbone.in_channels, *size[: backbone.spatial_dims])
    return torch.rand(shape, generator=generator)


@every_backbone
@channels
@pytest.mark.parametrize("size", [ODD_SIZE, EVEN_SIZE], ids=["odd", "even"])
def test_stages_have_the_declared_channels_and_strides(config, in_channels, size):
    backbone = build(config, in_channels).eval()
    x_BC = images(backbone, size, batch=1)
    with torch.inference_mode():
        features = backbone(x_BC)
    assert len(features) == len(backbone.stages)
    for feature, stage in zip(features, backbone.stages, strict=True):
        assert feature.shape == (1, stage.channels, *stage.size(tuple(x_BC.shape[2:])))


@every_backbone
def test_stages_run_from_fine_to_coarse_and_have_names_of_their_own(config):
    stages = build(config).stages
    strides = [stage.stride for stage in stages]
    assert strides == sorted(strides)
    assert len({stage.name for stage in stages}) == len(stages)


@every_backbone
@channels
def test_every_parameter_receives_a_gradient_through_the_embedding(config, in_channels):
    backbone = build(config, in_channels)
    embedding = backbone.embed(images(backbone))
    assert embedding.shape == (2, backbone.embedding_channels)
    weights = torch.linspace(-1, 1, embedding.numel()).view_as(embedding)
    (embedding * weights).sum().backward()
    assert without_gradient(backbone) == []


@every_backbone
def test_every_parameter_receives_a_gradient_through_the_decoder(config):
    backbone = build(config)
    with seeded_construction(0, "decoder"):
        decoder = UNetDecoder(backbone, out_channels=2, channels=(4,) * len(backbone.stages))
    x_BC = images(backbone)
    size = tuple(x_BC.shape[2:])
    out = decoder(backbone(x_BC), size)
    assert out.shape == (2, 2, *size)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert without_gradient(backbone) == []
    assert without_gradient(decoder) == []


@every_backbone
def test_the_input_is_left_as_it_was(config):
    backbone = build(config)
    x_BC = images(backbone)
    before = x_BC.clone()
    backbone(x_BC)
    assert torch.equal(x_BC, before)


@every_backbone
def test_the_declared_normalisation_is_what_the_network_sees(config):
    backbone = build(config, in_channels=3).eval()
    x_BC = images(backbone, batch=1)
    shape = (1, 3, *([1] * backbone.spatial_dims))
    mean, std = (torch.tensor(v).view(shape) for v in (backbone.input_mean, backbone.input_std))
    with torch.inference_mode():
        direct = backbone.extract((x_BC - mean) / std)
        whole = backbone(x_BC)
    assert all(torch.equal(a, b) for a, b in zip(direct, whole, strict=True))


@every_backbone
def test_the_state_dict_holds_weights_only(config):
    """Constants of the architecture stay out of checkpoints, and no layer is without use."""
    backbone = build(config)
    assert all(name.startswith("net.") for name in backbone.state_dict())


@every_backbone
def test_images_of_another_shape_are_refused(config):
    backbone = build(config)
    wrong = torch.zeros(1, 2, *EVEN_SIZE[: backbone.spatial_dims])
    with pytest.raises(ConfigError, match=r"takes images .* of 1 channel\(s\), found shape \(1, 2"):
        backbone(wrong)


def without_gradient(module: torch.nn.Module) -> list[str]:
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is None or not bool(parameter.grad.abs().sum() > 0)
    ]
