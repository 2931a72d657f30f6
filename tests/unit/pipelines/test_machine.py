"""Facts about the machine: gathered from the system, and honest about what was measured."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from medssl.pipelines import machine
from medssl.pipelines.machine import cpu_quota, disk_rate, driver_version, gather, look_at_torch

SMALL = 2**20


def test_the_facts_are_those_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "DISK_BYTES", SMALL)
    found = gather(tmp_path)
    assert 1 <= found.usable_cores <= (os.cpu_count() or 1)
    assert found.memory_gb > 0
    assert found.disk_free_gb == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, rel=0.05)
    assert found.torch.cuda == torch.version.cuda
    assert found.torch.gloo
    assert bool(found.torch.gpus) == torch.cuda.is_available()


def test_a_disk_is_written_and_read_and_left_as_it_was(tmp_path: Path):
    rate = disk_rate(tmp_path, SMALL)
    assert rate is not None
    assert min(rate.write_mb_s, rate.read_mb_s) > 0
    assert rate.read_from in ("disk", "memory", "unknown")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no file system in memory here")
def test_a_file_system_in_memory_is_not_taken_for_a_disk():
    rate = disk_rate(Path("/dev/shm"), SMALL)
    assert rate is not None
    assert rate.read_from in ("memory", "unknown")


def test_a_folder_that_cannot_be_written_has_no_rate(tmp_path: Path):
    assert disk_rate(tmp_path / "missing", SMALL) is None


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5", "550.54.15"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05",
            "580.95.05",
        ),
        ("something else", "unknown"),
        (None, None),
    ],
)
def test_the_driver_s_version_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, version: str | None
):
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "version")
    if text is not None:
        (tmp_path / "version").write_text(text + "\nGCC version: gcc 13.3.0\n")
    assert driver_version() == version


@pytest.mark.parametrize(
    ("text", "quota"), [("250000 100000\n", 2.5), ("max 100000\n", None), (None, None)]
)
def test_a_container_s_share_of_the_cores_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, quota: float | None
):
    monkeypatch.setattr(machine, "_CPU_QUOTA", tmp_path / "cpu.max")
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota() == quota


def test_gpus_are_read_from_torch(monkeypatch: pytest.MonkeyPatch):
    class Properties:
        name, total_memory, major, minor = "card", 80 * 10**9, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    found = look_at_torch()
    assert found.gpus == (machine.Gpu("card", 80.0, (9, 0)),)
    assert found.architectures == ("sm_90",)
