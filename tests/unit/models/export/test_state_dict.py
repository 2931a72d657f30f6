from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exports import MONAI_3D, make_backbone, make_subject
from medssl.errors import WeightsError
from medssl.models.backbones.base import Backbone
from medssl.models.export.state_dict import StateDict

RESNET18 = {"name": "torchvision", "variant": "resnet18"}


def exported(folder: Path, backbone: Backbone) -> tuple[Path, dict[str, Any]]:
    subject = make_subject(backbone, licence="CC-BY-4.0")
    facts = StateDict().write(subject, folder)
    (name,) = StateDict().files(subject)
    return folder / name, facts


def grey_in_colour(images: Tensor) -> Tensor:
    """Return what torchvision's own transforms hand its models for a grey image."""
    from torchvision.transforms.functional import normalize

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return normalize(images.expand(-1, 3, -1, -1), mean, std)


@pytest.fixture(scope="module")
def resnet18() -> Backbone:
    return make_backbone(RESNET18)


def test_torchvision_loads_the_file_strictly_and_answers_alike(
    tmp_path: Path, resnet18: Backbone
) -> None:
    from torchvision import models

    file, facts = exported(tmp_path, resnet18)
    assert file.name == "torchvision_resnet18.safetensors"
    assert facts["head_left_out"] == ["fc.weight", "fc.bias"]
    model = models.resnet18()
    model.fc = nn.Identity()
    model.load_state_dict(load_file(file), strict=True)
    images = torch.rand(2, 1, 61, 47, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = model.eval()(grey_in_colour(images)), resnet18.embed(images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize(
    ("variant", "node"),
    [pytest.param("vit_b_16", "encoder.ln", marks=pytest.mark.slow), ("swin_t", "norm")],
)
def test_torchvision_loads_transformers_strictly_and_finds_the_same_tokens(
    tmp_path: Path, variant: str, node: str, in_channels: int
) -> None:
    from torchvision import models
    from torchvision.models.feature_extraction import create_feature_extractor

    backbone = make_backbone({"name": "torchvision", "variant": variant}, in_channels)
    file, facts = exported(tmp_path, backbone)
    model = models.get_model(variant)
    part = facts["head_left_out"][0].partition(".")[0]
    assert part == {"vit_b_16": "heads", "swin_t": "head"}[variant]
    setattr(model, part, nn.Identity())
    model.load_state_dict(load_file(file), strict=True)
    images = torch.rand(1, in_channels, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = create_feature_extractor(model.eval(), [node])(grey_in_colour(images))[node]
        wanted = backbone(images)[-1]
    tokens = found[:, 1:] if variant == "vit_b_16" else found.flatten(1, 2)
    torch.testing.assert_close(tokens.mT, wanted.flatten(2), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_usage_of_a_vision_transformer_finds_the_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torchvision's own answer is the class token, which is another thing."""
    backbone = make_backbone({"name": "torchvision", "variant": "vit_b_16"})
    exported(tmp_path, backbone)
    usage = StateDict().usage(make_subject(backbone))
    assert "`model(x)` is the class token, and medssl's embedding is the mean of the" in usage
    assert "takes images of 224 x 224 voxels alone" in usage
    blocks = [block.partition("```")[0] for block in usage.split("```python\n")[1:]]
    names = {"images": torch.rand(1, 1, 224, 224, generator=torch.Generator().manual_seed(0))}
    monkeypatch.chdir(tmp_path)
    Path("use.py").write_text("\n".join([blocks[0], "model.eval()", *blocks[1:]]))
    made = runpy.run_path("use.py", init_globals=names)
    with torch.no_grad():
        wanted = backbone.embed(names["images"])
        class_token = made["model"](made["x"])
    torch.testing.assert_close(made["embedding"].detach(), wanted, rtol=1e-4, atol=1e-4)
    assert float((class_token - wanted).abs().max()) > 0.1


def test_a_stem_with_an_inside_channel_becomes_one_of_three_channels(tmp_path: Path) -> None:
    from torchvision import models

    backbone = make_backbone(RESNET18)
    net: Any = backbone.net
    if not backbone.inside_channel:
        grey = net.conv1.weight.detach()
        offset = 0.2 * torch.randn(grey.shape, generator=torch.Generator().manual_seed(4))
        net.conv1 = nn.Conv2d(2, 64, 7, stride=2, padding=3, bias=False)
        net.conv1.weight = nn.Parameter(torch.cat([grey, offset], dim=1))
        backbone.inside_channel = True
    file, _ = exported(tmp_path, backbone)
    model = models.resnet18()
    model.fc = nn.Identity()
    model.load_state_dict(load_file(file), strict=True)
    images = torch.rand(1, 1, 40, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = model.eval()(grey_in_colour(images)), backbone.embed(images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_timm_loads_the_file_strictly_and_answers_alike(tmp_path: Path) -> None:
    import timm

    backbone = make_backbone({"name": "timm", "variant": "efficientnet_lite0"})
    file, facts = exported(tmp_path, backbone)
    model = timm.create_model(facts["model"], features_only=True, in_chans=facts["channels"])
    model.load_state_dict(load_file(file), strict=True)
    images = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(facts[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        found = model.eval()((images - mean) / std)
        wanted = backbone(images)
    assert facts["model"] == "tf_efficientnet_lite0"
    for ours, theirs in zip(wanted, found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_monai_runs_the_code_of_the_usage_and_answers_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = make_backbone(MONAI_3D)
    exported(tmp_path, backbone)
    usage = StateDict().usage(make_subject(backbone))
    load, normalise = (block.partition("```")[0] for block in usage.split("```python\n")[1:])
    names = {"images": torch.rand(1, 1, 40, 33, 35, generator=torch.Generator().manual_seed(0))}
    monkeypatch.chdir(tmp_path)
    Path("use.py").write_text(load + normalise)
    made = runpy.run_path("use.py", init_globals=names)
    with torch.no_grad():
        found, wanted = made["model"].eval()(made["x"]), backbone.embed(names["images"])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_file_says_what_it_is(tmp_path: Path, resnet18: Backbone) -> None:
    file, _ = exported(tmp_path, resnet18)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {
            "format": "pt", "library": "torchvision", "model": "resnet18", "licence": "CC-BY-4.0",
        }  # fmt: skip


def test_a_file_that_the_library_does_not_load_strictly_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_first(state: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        save_file(dict(list(state.items())[1:]), file, metadata)

    monkeypatch.setattr("medssl.models.export.state_dict.save_file", without_first)
    with pytest.raises(WeightsError, match="monai does not load it strictly into resnet10"):
        exported(tmp_path, make_backbone(MONAI_3D))


def test_a_grey_normalisation_that_differs_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = make_backbone(MONAI_3D)
    backbone.input_mean = (0.3,)  # no longer what the network itself subtracts
    with pytest.raises(WeightsError, match="output embedding differs from the backbone's by"):
        exported(tmp_path, backbone)


def test_two_channels_have_no_model_in_torchvision() -> None:
    backbone = make_backbone(RESNET18, in_channels=2)
    with pytest.raises(WeightsError, match="takes three channels, and backbone .* takes 2"):
        StateDict().check(make_subject(backbone))


def test_colour_keeps_its_own_stem(tmp_path: Path) -> None:
    backbone = make_backbone(RESNET18, in_channels=3)
    file, facts = exported(tmp_path, backbone)
    assert facts["mean"] == [0.485, 0.456, 0.406]
    stem: Any = backbone.state_dict()["net.conv1.weight"]
    assert torch.equal(load_file(file)["conv1.weight"], stem)
