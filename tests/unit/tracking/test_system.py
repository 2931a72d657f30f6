"""Samples of the machine: their names, the GPUs' counters, and where they are written."""

# ruff: noqa: N802  (the names of the driver's functions are NVIDIA's)
from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from medssl.errors import MachineError
from medssl.tracking.base import Tracker, TrackingConfig
from medssl.tracking.journal import JOURNAL_NAME, read_journal
from medssl.tracking.nvml import Gpus
from medssl.tracking.system import Machine, Sampler


def test_samples_have_the_names_that_mlflow_shows_as_system_metrics(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    time.sleep(0.05)
    found = machine.sample()
    assert {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_megabytes",
        "system/system_memory_usage_percentage",
        "system/process_memory_megabytes",
        "system/disk_usage_percentage",
        "system/disk_available_megabytes",
        "system/network_receive_megabytes",
        "system/network_transmit_megabytes",
    } <= found.keys()
    assert 0 < found["system/system_memory_usage_percentage"] < 100
    assert found["system/process_memory_megabytes"] > 0


class Driver:
    """A driver with two GPUs, the second of which tells no power."""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, number: int, handle: Any) -> int:
        handle._obj.value = 100 + number
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> int:
        memory._obj.total, memory._obj.used = 80_000_000_000, 20_000_000_000
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle: ctypes.c_void_p, busy: Any) -> int:
        busy._obj.gpu = handle.value - 10
        return 0

    def nvmlDeviceGetPowerUsage(self, handle: ctypes.c_void_p, power: Any) -> int:
        power._obj.value = 350_000
        return 0 if handle.value == 100 else 3

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: ctypes.c_void_p, limit: Any) -> int:
        limit._obj.value = 700_000
        return 0


def test_gpus_are_asked_through_the_library_of_their_driver() -> None:
    assert Gpus(load=lambda name: Driver()).sample() == {
        "gpu_0_memory_usage_megabytes": 20_000.0,
        "gpu_0_memory_usage_percentage": 25.0,
        "gpu_0_utilization_percentage": 90.0,
        "gpu_0_power_usage_watts": 350.0,
        "gpu_0_power_usage_percentage": 50.0,
        "gpu_1_memory_usage_megabytes": 20_000.0,
        "gpu_1_memory_usage_percentage": 25.0,
        "gpu_1_utilization_percentage": 91.0,
    }


def test_without_a_driver_there_are_no_gpus() -> None:
    assert Gpus(load=lambda name: ctypes.CDLL("no-such-library.so")).sample() == {}


def samples(folder: Path, run: str) -> list[int]:
    journal = read_journal(folder / JOURNAL_NAME)
    return [r["step"] for r, _ in journal if (r["kind"], r["run"]) == ("system", run)]


def test_every_open_run_has_its_samples_and_a_resumed_one_counts_on(tmp_path: Path) -> None:
    config = TrackingConfig(mlflow=False, system_seconds=0.02)
    for _ in range(2):
        already = len(samples(tmp_path, "pretrain"))
        with (
            Tracker(tmp_path, config) as tracker,
            tracker.run("study"),
            tracker.run("pretrain", parent="study"),
        ):
            limit = time.monotonic() + 60
            while len(samples(tmp_path, "pretrain")) < already + 2:
                assert time.monotonic() < limit
                time.sleep(0.02)
    for run in ("study", "pretrain"):
        found = samples(tmp_path, run)
        assert found == list(range(len(found)))


def test_samples_can_be_switched_off(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackingConfig(mlflow=False, system_seconds=None))
    assert tracker._sampler is None
    tracker.close()


def test_a_sample_that_cannot_be_written_ends_neither_training_nor_sampling(tmp_path: Path) -> None:
    calls = []

    def write(values: dict[str, float]) -> None:
        calls.append(values)
        raise MachineError("no space left on the disk")

    sampler = Sampler(tmp_path, 0.01, write)
    sampler.start()
    limit = time.monotonic() + 60
    while len(calls) < 3:
        assert time.monotonic() < limit
        time.sleep(0.01)
    sampler.finish()
    assert not sampler.is_alive()


def test_a_machine_that_tells_nothing_costs_training_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise AttributeError("a driver without this function")

    monkeypatch.setattr("medssl.tracking.system.Machine", refuse)
    with (
        Tracker(tmp_path, TrackingConfig(mlflow=False, system_seconds=0.01)) as tracker,
        tracker.run("study") as run,
    ):
        run.log(1, {"loss": 1.0})
    assert samples(tmp_path, "study") == []
    assert tracker._sampler is not None
    assert not tracker._sampler.is_alive()


def test_a_machine_that_does_not_answer_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    monkeypatch.setattr("medssl.tracking.system.Machine", lambda folder: answers.wait(60))
    monkeypatch.setattr("medssl.tracking.system._PATIENCE_SECONDS", 0.1)
    tracker = Tracker(tmp_path, TrackingConfig(mlflow=False, system_seconds=0.01))
    started = time.monotonic()
    tracker.close()
    assert time.monotonic() - started < 30
    answers.set()
