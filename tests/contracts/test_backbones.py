"""Every member of the backbone registry, and every variant of it, keeps what it declares."""

from __future__ import annotations

import importlib.util
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

NESTED = {"backbone": {"name": "monai", "depth": 10, "spatial_dims": 2, "base_channels": 4}}
"""The small network inside families that wrap another."""

EVEN_SIZE = (64, 32, 32)
ODD_SIZE = (37, 70, 35)
ALIGNED_SIZE = (64, 64, 32)
"""Sizes: of no stride's multiple; of multiples; and large enough for any divisor here."""

SMALL = {"resnet": 4, "densenet": 8, "swin_unetr": 12, "segresnet": 8}
"""Base channels that make a network of MONAI small."""

TIMM = (
    "efficientnet_lite0",
    "mobilenetv3_small_050",
    "convnext_atto",
    "regnety_002",
    "edgenext_xx_small",
    "vit_tiny_patch16_224",
)
"""timm has more than a thousand networks; these stand for its families."""

MORE: dict[str, list[dict[str, Any]]] = {
    "monai": [{"variant": variant, "spatial_dims": 2} for variant in ("densenet", "segresnet")]
    + [
        {"variant": "swin_unetr", "spatial_dims": 2},
        *({"depth": depth, "spatial_dims": 2} for depth in (10, 34, 50)),
        {"variant": "resnet", "norm": "group"},
        {"variant": "segresnet", "norm": "instance", "spatial_dims": 2},
    ],
    "timm": [{"variant": "mobilenetv3_small_050", "norm": "group"}],
    "torchvision": [{"variant": "resnet18", "norm": "group"}],
}
"""Combinations that a single other choice does not reach."""

SLOW = {
    ("timm", "regnety_002"),
    ("timm", "edgenext_xx_small"),
    ("torchvision", "resnet34"),
    ("torchvision", "resnet50"),
    ("torchvision", "convnext_tiny"),
    ("torchvision", "vit_b_16"),
    ("torchvision", "swin_t"),
}
"""Variants whose like is tested anyway, or that take many seconds."""

SLOW_3D = {"densenet", "swin_unetr"}
OF_SOME_VARIANTS = {"depth", "norm"}
"""Fields whose choices depend on the variant; `MORE` and the unit tests go through them."""


def variants(name: str) -> Iterator[ComponentConfig]:
    """Yield a family's configurations: its defaults, then every other listed choice in turn."""
    cls = BACKBONES.config_class(name)
    base: dict[str, Any] = {}
    others: list[dict[str, Any]] = []
    for field, info in cls.model_fields.items():
        if name == "timm" and field == "variant":
            base[field] = TIMM[0]
            others += [{field: choice} for choice in TIMM[1:]]
        elif field in NESTED:
            base[field] = NESTED[field]
        elif field not in OF_SOME_VARIANTS and (choices := literal(info.annotation)):
            own = choices[0] if info.is_required() else info.default
            if own is not None:
                base[field] = own
            others += [{field: choice} for choice in choices if choice not in {own, None}]
    seen = set()
    for changes in ({}, *others, *MORE.get(name, [])):
        chosen = {**base, **changes}
        if name == "monai":
            chosen["base_channels"] = SMALL[chosen["variant"]]
        config: ComponentConfig = cls.model_validate(chosen)
        if config.digest() not in seen:  # a choice may be the variant's default
            seen.add(config.digest())
            yield config


def literal(annotation: Any) -> tuple[Any, ...]:
    """Return the choices of a field, of an optional one, too."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for part in get_args(annotation) for choice in literal(part))


def marks(config: ComponentConfig) -> list[pytest.MarkDecorator]:
    variant = getattr(config, "variant", "")
    found = []
    if (config.name, variant) in SLOW:
        found.append(pytest.mark.slow)
    if variant in SLOW_3D and config.spatial_dims == 3:
        found.append(pytest.mark.slow)
    if variant == "swin_unetr":
        absent = importlib.util.find_spec("einops") is None
        found.append(pytest.mark.skipif(absent, reason="MONAI's swin_unetr needs einops"))
    return found


def label(config: ComponentConfig) -> str:
    return "-".join(str(value) for value in config.model_dump().values())


CONFIGS = [
    pytest.param(config, id=label(config), marks=marks(config))
    for name in BACKBONES.names()
    for config in variants(name)
]

channels = pytest.mark.parametrize("in_channels", [1, 3])


class Built:
    """A family's backbone for any number of channels, built once each."""

    def __init__(self, config: ComponentConfig) -> None:
        self.config = config
        self.by_channels: dict[int, Backbone] = {}

    def __call__(self, in_channels: int = 1) -> Backbone:
        if in_channels not in self.by_channels:
            with seeded_construction(0, "test"):
                backbone = BACKBONES.build(self.config, in_channels=in_channels)
            self.by_channels[in_channels] = backbone
        backbone = self.by_channels[in_channels].train()
        backbone.zero_grad(set_to_none=True)
        return backbone


@pytest.fixture(scope="module", params=CONFIGS)
def build(request: pytest.FixtureRequest) -> Built:
    """Return what builds a backbone; all tests of a configuration share it."""
    return Built(request.param)


def stir(backbone: Backbone) -> None:
    """Move the weights off zero: a residual branch may start with a scale that lets none pass."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


def images(backbone: Backbone, size: tuple[int, ...] = ODD_SIZE, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, backbone.in_channels, *size[: backbone.spatial_dims])
    return torch.rand(shape, generator=generator)


@channels
@pytest.mark.parametrize("size", [ODD_SIZE, EVEN_SIZE], ids=["odd", "even"])
def test_stages_have_the_declared_channels_and_strides(build, in_channels, size):
    backbone = build(in_channels).eval()
    x_BC = images(backbone, size, batch=1)
    with torch.inference_mode():
        features = backbone(x_BC)
    assert len(features) == len(backbone.stages)
    for feature, stage in zip(features, backbone.stages, strict=True):
        assert feature.shape == (1, stage.channels, *stage.size(tuple(x_BC.shape[2:])))


def test_stages_run_from_fine_to_coarse_and_have_names_of_their_own(build):
    stages = build().stages
    strides = [stage.stride for stage in stages]
    assert strides == sorted(strides)
    assert len({stage.name for stage in stages}) == len(stages)


@channels
def test_every_parameter_receives_a_gradient_through_the_embedding(build, in_channels):
    backbone = build(in_channels)
    stir(backbone)
    embedding = backbone.embed(images(backbone))
    assert embedding.shape == (2, backbone.embedding_channels)
    weights = torch.linspace(-1, 1, embedding.numel()).view_as(embedding)
    (embedding * weights).sum().backward()
    assert without_gradient(backbone) == []


def test_every_parameter_receives_a_gradient_through_the_decoder(build):
    backbone = build()
    stir(backbone)
    with seeded_construction(0, "decoder"):
        decoder = UNetDecoder(backbone, out_channels=2, channels=(4,) * len(backbone.stages))
    x_BC = images(backbone)
    size = tuple(x_BC.shape[2:])
    out = decoder(backbone(x_BC), size)
    assert out.shape == (2, 2, *size)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert without_gradient(backbone) == []
    assert without_gradient(decoder) == []


def test_the_input_is_left_as_it_was(build):
    backbone = build()
    x_BC = images(backbone)
    before = x_BC.clone()
    backbone(x_BC)
    assert torch.equal(x_BC, before)


def test_the_declared_normalisation_is_what_the_network_sees(build):
    backbone = build(3).eval()
    x_BC = images(backbone, ALIGNED_SIZE, batch=1)
    shape = (1, 3, *([1] * backbone.spatial_dims))
    mean, std = (torch.tensor(v).view(shape) for v in (backbone.input_mean, backbone.input_std))
    with torch.inference_mode():
        direct = backbone.extract((x_BC - mean) / std)
        whole = backbone(x_BC)
    assert all(torch.equal(a, b) for a, b in zip(direct, whole, strict=True))


def test_the_state_dict_holds_weights_only(build):
    """Constants of the architecture stay out of checkpoints, and no layer is without use."""
    backbone = build()
    assert all(name.startswith("net.") for name in backbone.state_dict())


def test_images_of_another_shape_are_refused(build):
    backbone = build()
    wrong = torch.zeros(1, 2, *EVEN_SIZE[: backbone.spatial_dims])
    with pytest.raises(ConfigError, match=r"takes images .* of 1 channel\(s\), found shape \(1, 2"):
        backbone(wrong)


def without_gradient(module: torch.nn.Module) -> list[str]:
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is None or not bool(parameter.grad.abs().sum() > 0)
    ]
