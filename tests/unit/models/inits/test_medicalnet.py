"""MedicalNet's files, made here with the names and sections of the published ones.

The published files cannot be had without a network: that these names are theirs follows from
MONAI's own loader, which the first test runs on the same file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import resnet as monai_resnet

from hostile_weights import hostile_files
from medssl.errors import ConfigError, WeightsError
from medssl.models.backbones.base import Backbone
from medssl.models.backbones.monai import Config as BackboneConfig
from medssl.models.build import build_backbone
from medssl.models.inits.base import LoadReport
from medssl.models.inits.medicalnet import SHORTCUTS, Config

State = dict[str, torch.Tensor]


def monai_network(depth: int) -> torch.nn.Module:
    """Return the network that MONAI loads MedicalNet's weights into."""
    bias, shortcut = monai_resnet.get_medicalnet_pretrained_resnet_args(depth)
    assert shortcut == SHORTCUTS[depth]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return getattr(monai_resnet, f"resnet{depth}")(
            spatial_dims=3, n_input_channels=1, feed_forward=False, conv1_t_stride=2,
            shortcut_type=shortcut, bias_downsample=bias,
        )  # fmt: skip


def published(network: torch.nn.Module, **more: torch.Tensor) -> dict[str, Any]:
    """Return a network's tensors as MedicalNet stores them."""
    state = {
        f"module.{name}": tensor
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    return {"epoch": 0, "batch_id": 0, "state_dict": {**state, **more}}


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return monai_network(10).eval()


@pytest.fixture(scope="module")
def file(network: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("medicalnet") / "resnet_10_23dataset.pth"
    torch.save(published(network), path)
    return path


def load(path: Path, in_channels: int = 1, **settings: Any) -> tuple[Backbone, LoadReport]:
    backbone = BackboneConfig(**{"depth": 10, **settings})
    return build_backbone(backbone, Config(path=path), in_channels=in_channels, seed=0)


def test_the_network_is_monais(file, network):
    backbone, report = load(file)
    assert report.percent == 100
    assert [name for name, _ in report.adapted] == ["num_batches_tracked"]
    x_BCXYZ = torch.rand(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = backbone.eval().embed(x_BCXYZ)
        theirs = network((x_BCXYZ - 0.5) / 0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [18, 34, 50])
def test_every_depth_loads_wholly_and_answers_as_monais(tmp_path, depth):
    theirs = monai_network(depth).eval()
    torch.save(published(theirs), tmp_path / "resnet.pth")
    backbone, report = load(tmp_path / "resnet.pth", depth=depth, shortcut=SHORTCUTS[depth])
    assert report.percent == 100
    x_BCXYZ = torch.rand(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(
            backbone.eval().embed(x_BCXYZ), theirs(2 * x_BCXYZ - 1), rtol=1e-4, atol=1e-5
        )


def test_shortcuts_of_type_a_pass_gradients_on():
    """MONAI's own detach them, which leaves most of the first layers' gradient out."""
    config = BackboneConfig(depth=10, spatial_dims=2, base_channels=4, shortcut="A")
    from medssl.models.backbones.monai import MonaiBackbone

    net = MonaiBackbone(config).net
    x_BC = torch.rand(1, 4, 8, 8, requires_grad=True)
    shortened = net.layer2[0].downsample(x_BC)
    shortened.sum().backward()
    assert shortened.shape == (1, 8, 4, 4)
    assert x_BC.grad is not None
    assert float(x_BC.grad.sum()) == 4 * 16


def test_the_decoder_is_left_out(network, tmp_path):
    content = published(network, **{"module.conv_seg.0.bias": torch.zeros(32)})
    torch.save(content, tmp_path / "resnet_10.pth")
    _, report = load(tmp_path / "resnet_10.pth")
    assert report.unexpected == ("module.conv_seg.0.bias",)
    assert report.percent == 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spatial_dims": 2}, "spatial_dims is 2, must be 3"),
        ({"base_channels": 16}, "base_channels is 16, must be 64"),
        ({"stem_stride": 1, "base_channels": 4}, "base_channels is 4, .* stem_stride is 1, must"),
        ({"depth": 18}, "shortcut is 'B', must be 'A'"),
        ({"in_channels": 2}, "in_channels is 2, must be 1"),
    ],
)
def test_a_backbone_that_they_do_not_belong_to_is_refused(file, settings, message):
    with pytest.raises(ConfigError, match=message):
        load(file, **settings)


def test_a_backbone_of_another_family_is_refused(file):
    from medssl.models.backbones.torchvision import Config as TorchvisionConfig

    with pytest.raises(ConfigError, match=r"name is 'torchvision', must be 'monai'"):
        build_backbone(
            TorchvisionConfig(variant="resnet18"), Config(path=file), in_channels=1, seed=0
        )


def test_a_file_of_other_shortcuts_is_refused(network, tmp_path):
    content = published(network)
    for name in [n for n in content["state_dict"] if ".downsample." in n]:
        del content["state_dict"][name]
    torch.save(content, tmp_path / "resnet_18.pth")
    with pytest.raises(WeightsError, match=r"shortcuts of type A.* Set backbone\.shortcut=A"):
        load(tmp_path / "resnet_18.pth")


def test_a_file_without_its_section_is_refused(network, tmp_path):
    torch.save(published(network)["state_dict"], tmp_path / "resnet_10.pth")
    with pytest.raises(WeightsError, match=r"no section 'state_dict' of tensors"):
        load(tmp_path / "resnet_10.pth")


def test_a_hostile_file_is_refused_and_not_run(tmp_path):
    for content in hostile_files(tmp_path / "ran").values():
        (tmp_path / "resnet_10.pth").write_bytes(content)
        with pytest.raises(WeightsError, match=r"holds more than tensors"):
            load(tmp_path / "resnet_10.pth")
    assert not (tmp_path / "ran").exists()
