from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.vision_transformer import interpolate_embeddings

from medssl.errors import ConfigError, WeightsError
from medssl.models.backbones.base import Backbone, ImagenetWeights
from medssl.models.backbones.torchvision import (
    HEAD,
    LAYOUTS,
    RGB_MEAN,
    RGB_STD,
    Config,
    TorchvisionBackbone,
    interpolate_positions,
)
from medssl.models.build import build_backbone
from medssl.models.inits.base import LoadReport, load_strict
from medssl.models.inits.imagenet import Config as ImagenetConfig

RESNET_NODES = ("relu", "layer1", "layer2", "layer3", "layer4")
NODES: dict[str, tuple[str, ...]] = {
    "resnet18": RESNET_NODES,
    "resnet34": RESNET_NODES,
    "resnet50": RESNET_NODES,
    "densenet121": (
        "features.relu0",
        "features.denseblock1",
        "features.denseblock2",
        "features.denseblock3",
        "relu",
    ),
    "efficientnet_b0": tuple(f"features.{n}" for n in (1, 2, 3, 5, 8)),
    "convnext_tiny": tuple(f"features.{n}" for n in (1, 3, 5, 7)),
    "vit_b_16": (*(f"encoder.layers.encoder_layer_{n}" for n in (2, 5, 8)), "encoder.ln"),
    "swin_t": ("features.1", "features.3", "features.5", "permute"),
}
"""Where torchvision's own network computes what each stage returns."""

VIT_SIDE = 64
SLOW = {"resnet34", "resnet50", "convnext_tiny", "vit_b_16"}


class Published:
    """torchvision's whole network with random weights, and a file of them."""

    def __init__(self, variant: str, folder: Path) -> None:
        self.variant = variant
        with drawn_later():
            torch.manual_seed(0)
            self.net: Any = models.get_model(variant, weights=None)
            draw(self.net)
        self.state = dict(self.net.state_dict())
        content = folder / "made.pth"
        torch.save(self.state, content)
        digits = hashlib.sha256(content.read_bytes()).hexdigest()[:8]
        self.file = content.rename(folder / f"{variant}-{digits}.pth")
        self.weights = ImagenetWeights(self.file.name, digits)

    def backbone(self, in_channels: int) -> Backbone:
        """Return a backbone with these weights, given to it by its own adaptation."""
        with drawn_later():
            backbone = TorchvisionBackbone(Config(variant=self.variant), in_channels)
        load_strict(backbone, backbone.adapt_imagenet(self.state).state, self.file.name)
        return backbone.eval()

    def features(self, x_BC: Tensor) -> list[Tensor]:
        """Return what torchvision's network computes for images in [0, 1] at our stages."""
        net = self.net
        if self.variant == "vit_b_16":
            with drawn_later():
                net = models.vit_b_16(image_size=VIT_SIDE)
            net.load_state_dict(interpolate_embeddings(VIT_SIDE, 16, copy.copy(self.state)))
        nodes = {node: f"{n}" for n, node in enumerate(NODES[self.variant])}
        extractor = create_feature_extractor(net.eval(), nodes)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (RGB_MEAN, RGB_STD))
        with torch.inference_mode():
            found = extractor((x_BC - mean) / std)
        features = [found[f"{n}"] for n in range(len(nodes))]
        if self.variant == "vit_b_16":
            grid = (VIT_SIDE // 16, VIT_SIDE // 16)
            return [x[:, 1:].transpose(1, 2).unflatten(2, grid) for x in features]
        if self.variant == "swin_t":
            return [*(x.permute(0, 3, 1, 2) for x in features[:-1]), features[-1]]
        return features


def draw(net: nn.Module) -> None:
    """Give every weight and statistic a value, so that no layer is an identity."""
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim >= 2 and tensor[0].numel() > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif tensor.is_floating_point():
                tensor.normal_(float(name.endswith("weight")), 0.1)


@contextmanager
def drawn_later() -> Iterator[None]:
    """Construct networks whose weights are replaced anyway without drawing them: it takes long."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        for name in ("trunc_normal_", "normal_", "kaiming_normal_", "kaiming_uniform_", "uniform_"):
            patch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor.data.zero_())
        yield


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS],
)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return Published(request.param, tmp_path_factory.mktemp(request.param))


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


def test_every_stage_equals_torchvisions_own_output(published, monkeypatch):
    monkeypatch.setitem(TorchvisionBackbone.imagenet, published.variant, published.weights)
    backbone, report = load(published)
    assert report.percent == 100
    assert report.unexpected == HEAD[published.variant]
    assert report.adapted == ()
    assert {f"net.{name}" for name in published.state if name not in HEAD[published.variant]} == (
        set(backbone.state_dict())
    )
    x_BC = noise(3, VIT_SIDE, VIT_SIDE)
    for ours, theirs in zip(features(backbone, x_BC), published.features(x_BC), strict=True):
        assert difference(ours, theirs) < 1e-5


def test_grey_images_give_the_features_of_their_copy_in_three_channels(published):
    """At every stage and voxel, also where the network pads, for equal channels of any number."""
    x_BC = noise(1, 65, 48)
    wanted = features(published.backbone(3), x_BC.expand(-1, 3, -1, -1))
    channels = (1, 2, 4) if published.variant in {"resnet18", "swin_t"} else (1,)
    for in_channels in channels:
        backbone = published.backbone(in_channels)
        found = features(backbone, x_BC.expand(-1, in_channels, -1, -1))
        for ours, theirs in zip(found, wanted, strict=True):
            assert difference(ours, theirs) < 1e-4
        del backbone, found


def load(published: Published) -> tuple[Backbone, LoadReport]:
    config = Config(variant=published.variant)
    init = ImagenetConfig(path=published.file)
    with drawn_later():
        return build_backbone(config, init, in_channels=3, seed=0)


# ------------------------------------------------------------------------------ what is declared


@pytest.mark.parametrize("variant", LAYOUTS)
def test_declared_files_are_torchvisions_own(variant):
    weights = models.get_model_weights(variant).IMAGENET1K_V1
    declared = TorchvisionBackbone.imagenet[variant]
    assert declared.url == weights.url
    assert weights.url.endswith(f"/{declared.file_name}")
    assert declared.file_name.endswith(f"-{declared.sha256}.pth")
    transforms = weights.transforms()
    assert (tuple(transforms.mean), tuple(transforms.std)) == (RGB_MEAN, RGB_STD)


def test_resnet50_stays_at_the_first_file():
    assert TorchvisionBackbone.imagenet["resnet50"].file_name == "resnet50-0676ba61.pth"


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ("features.denseblock1.denselayer2.norm.1.weight", "norm1.weight"),
        ("features.denseblock1.denselayer2.conv.2.weight", "conv2.weight"),
    ],
)
def test_names_of_old_densenet_files_are_understood(old, now):
    backbone = TorchvisionBackbone(Config(variant="densenet121"))
    state = {f"{name}": torch.zeros(1, 3, 1, 1) for name in (*HEAD["densenet121"], old)}
    state["features.conv0.weight"] = torch.zeros(64, 3, 7, 7)
    found = backbone.adapt_imagenet(state).state
    name = f"net.features.denseblock1.denselayer2.{now}"
    assert name in found
    assert name in backbone.state_dict()


def test_names_of_old_transformer_files_are_understood(old_vit):
    state, backbone = old_vit
    found = backbone.adapt_imagenet(state).state
    assert set(found) == set(backbone.state_dict())
    first = "encoder.layers.encoder_layer_0.mlp"
    assert found[f"net.{first}.3.bias"] is state[f"{first}.linear_2.bias"]


@pytest.fixture
def old_vit():
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        whole = models.vit_b_16().state_dict()
        backbone = TorchvisionBackbone(Config(variant="vit_b_16"), 3)
    state = {
        name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): tensor
        for name, tensor in whole.items()
    }
    assert state.keys() != whole.keys()
    return state, backbone


@pytest.mark.parametrize("variant", ["resnet18", "efficientnet_b0"])
def test_a_missing_stem_or_classifier_is_named(variant):
    backbone = TorchvisionBackbone(Config(variant=variant))
    head = {name: torch.zeros(1) for name in HEAD[variant]}
    with pytest.raises(WeightsError, match=r"no stem of three channels: net\..*weight is missing"):
        backbone.adapt_imagenet(head)
    with pytest.raises(WeightsError, match=r"classifier's .*bias are missing"):
        backbone.adapt_imagenet({})


# -------------------------------------------------------------------------------------- details


@pytest.mark.parametrize("side", [3, 14, 20])
def test_positions_are_interpolated_as_torchvision_does(side):
    embedding = torch.randn(1, 1 + 14 * 14, 8, generator=torch.Generator().manual_seed(0))
    theirs = interpolate_embeddings(side * 16, 16, {"encoder.pos_embedding": embedding.clone()})
    ours = interpolate_positions(embedding, (side, side))
    torch.testing.assert_close(ours, theirs["encoder.pos_embedding"])


def test_positions_follow_the_shape_of_the_image():
    embedding = torch.arange(10.0).view(1, 10, 1)  # a 3 x 3 grid of 1 to 9, row by row
    found = interpolate_positions(embedding, (3, 5))
    assert found[0, 0, 0] == 0
    rows = found[0, 1:, 0].view(3, 5)
    torch.testing.assert_close(rows[:, 0], torch.tensor([1.0, 4.0, 7.0]))
    torch.testing.assert_close(rows[:, -1], torch.tensor([3.0, 6.0, 9.0]))


def test_features_in_training_do_not_depend_on_chance():
    """Stochastic depth is off: all else that differs in training is the batch norm's."""
    backbone = TorchvisionBackbone(Config(variant="efficientnet_b0", norm="group")).train()
    x_BC = noise(1, 64, 64)
    with torch.no_grad():
        assert torch.equal(backbone(x_BC)[-1], backbone(x_BC)[-1])


def test_random_stems_start_without_an_opinion_on_borders():
    backbone = TorchvisionBackbone(Config(variant="resnet18"), 2)
    weight = backbone.net.conv1.weight
    assert weight.shape == (64, 3, 7, 7)
    assert not bool(weight[:, -1].any())
    assert bool(weight[:, :-1].any())


def test_weights_made_with_another_norm_are_refused():
    backbone = TorchvisionBackbone(Config(variant="resnet18", norm="group"))
    with pytest.raises(ConfigError, match=r"resnet18-f37072fd\.pth was trained with batch norm.*"):
        _ = backbone.imagenet_weights


@pytest.mark.parametrize("variant", ["convnext_tiny", "vit_b_16", "swin_t"])
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_networks_of_layer_norm_take_no_other(variant, norm):
    with pytest.raises(ConfigError, match=f"norm: {norm} takes the place .*{variant} has layer no"):
        TorchvisionBackbone(Config(variant=variant, norm=norm))
