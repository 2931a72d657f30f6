from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from monai.networks.nets.densenet import DenseNet
from monai.networks.nets.segresnet import SegResNet
from pydantic import ValidationError
from torch import Tensor, nn

from medssl.errors import ConfigError, MachineError
from medssl.models.backbones.monai import Config, MonaiBackbone

needs_einops = pytest.mark.skipif(
    importlib.util.find_spec("einops") is None, reason="MONAI's swin_unetr needs einops"
)


def build(**settings: Any) -> MonaiBackbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MonaiBackbone(Config.model_validate(settings)).eval()


def copied(backbone: MonaiBackbone, whole: nn.Module, prefix: str = "") -> nn.Module:
    """Return MONAI's whole network with the backbone's weights, its other layers at random."""
    state = {f"{prefix}{name}": t for name, t in backbone.net.state_dict().items()}
    left = whole.load_state_dict(state, strict=False)
    assert left.unexpected_keys == []
    assert len(state) + len(left.missing_keys) == len(whole.state_dict())
    return whole.eval()


def normalised(*size: int) -> tuple[Tensor, Tensor]:
    x_BC = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(1))
    return x_BC, (x_BC - 0.5) / 0.5


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_densenet_ends_where_monai_pools(spatial_dims):
    backbone = build(variant="densenet", spatial_dims=spatial_dims, base_channels=8)
    whole = DenseNet(spatial_dims, 1, 3, init_features=8, growth_rate=4)
    x_BC, x = normalised(*(32,) * spatial_dims)
    with torch.inference_mode():
        whole = copied(backbone, whole)
        wanted = whole.class_layers.out(backbone.embed(x_BC))
        torch.testing.assert_close(wanted, whole(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_segresnet_is_monais_encoder(spatial_dims):
    backbone = build(variant="segresnet", spatial_dims=spatial_dims, base_channels=8)
    whole = SegResNet(spatial_dims, init_filters=8)
    x_BC, x = normalised(*(17, 16, 16)[:spatial_dims])
    with torch.inference_mode():
        _, wanted = copied(backbone, whole).encode(x)
        for ours, theirs in zip(backbone(x_BC), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


@needs_einops
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_swin_unetr_is_monais_encoder(spatial_dims):
    from monai.networks.nets.swin_unetr import SwinUNETR

    backbone = build(variant="swin_unetr", spatial_dims=spatial_dims, base_channels=12)
    whole = SwinUNETR(1, 2, feature_size=12, spatial_dims=spatial_dims)
    x_BC, x = normalised(*(32,) * spatial_dims)
    with torch.inference_mode():
        wanted = copied(backbone, whole, "swinViT.").swinViT(x)
        for ours, theirs in zip(backbone(x_BC), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_swin_unetr_without_einops_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"needs the package einops .* pip install einops"):
        build(variant="swin_unetr")


@pytest.mark.parametrize("variant", ["resnet", "densenet", "segresnet"])
@pytest.mark.parametrize("norm", ["group", "instance", "batch"])
def test_the_chosen_norm_is_everywhere(variant, norm):
    backbone = build(variant=variant, norm=norm, base_channels=8, spatial_dims=2)
    kinds = {type(m) for m in backbone.modules() if "Norm" in type(m).__name__}
    assert kinds == {nn.BatchNorm2d if norm == "batch" else nn.GroupNorm}
    alone = {
        m.num_groups == m.num_channels for m in backbone.modules() if isinstance(m, nn.GroupNorm)
    }
    if norm == "instance":
        assert alone == {True}


def test_swin_unetr_takes_no_other_norm():
    with pytest.raises(ConfigError, match="norm: group takes the place .* swin_unetr has layer no"):
        build(variant="swin_unetr", norm="group")


def test_segresnet_has_eight_groups_of_its_own():
    backbone = build(variant="segresnet", base_channels=16, spatial_dims=2)
    assert {m.num_groups for m in backbone.modules() if isinstance(m, nn.GroupNorm)} == {8}


def test_old_configs_mean_the_same():
    assert Config().model_dump(mode="json") == {
        "name": "monai",
        "variant": "resnet",
        "depth": 18,
        "spatial_dims": 3,
        "base_channels": 64,
        "stem_stride": 2,
    }
    assert Config(depth=10, base_channels=4, stem_stride=1).stem_stride == 1
    assert Config(shortcut="B") == Config()
    assert Config(shortcut="A").model_dump()["shortcut"] == "A"


def test_a_resolved_config_states_the_variants_defaults_and_reads_back():
    config = Config(variant="swin_unetr")
    assert config.model_dump() == {
        "name": "monai",
        "variant": "swin_unetr",
        "spatial_dims": 3,
        "base_channels": 48,
    }
    assert Config.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 121}, r"no resnet of depth 121: choose one of 10, 18, 34, 50"),
        ({"variant": "densenet", "depth": 18}, r"no densenet of depth 18: choose one of 121, 169"),
        ({"variant": "segresnet", "depth": 18}, r"no segresnet of depth 18: leave depth out"),
        ({"variant": "densenet", "stem_stride": 1}, r"stem_stride: densenet has no such setting"),
        ({"variant": "swin_unetr", "base_channels": 16}, r"of swin_unetr are multiples of 12, fou"),
        ({"variant": "segresnet", "base_channels": 12}, r"of segresnet are multiples of 8, found"),
        ({"variant": "unet"}, r"'resnet', 'densenet', 'swin_unetr' or 'segresnet'"),
    ],
)
def test_settings_that_do_not_fit_the_variant_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(settings)
