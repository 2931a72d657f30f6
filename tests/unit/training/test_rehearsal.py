"""Rehearsals: the loop's own steps on noise, measured, and told when memory runs out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from medssl.models.backbones import BACKBONES
from medssl.pretext import PRETEXT_TASKS
from medssl.training import rehearsal
from medssl.training.rehearsal import (
    MEASURED_STEPS,
    Scene,
    free_memory,
    line_through,
    random_crops,
    rehearse,
    sizes_to_try,
)
from medssl.training.step import Step
from medssl.transforms.sampling import SampleRequest
from training import CPU, CROP, EVERY_TASK, FLIPPED, SETTINGS, configured


def scene(name: str = "rotation", dims: int = 2, **settings: Any) -> Scene:
    backbone = {"depth": 10, "spatial_dims": dims, "base_channels": 8, "stem_stride": 1}
    return Scene(
        BACKBONES.config_class("monai")(**backbone),
        PRETEXT_TASKS.config_class(name).model_validate(SETTINGS[name]),
        SampleRequest(dims, CROP[dims], "axial" if dims == 2 else None),
        configured(**settings), FLIPPED, seed=3, device=CPU, threads=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("configured", "tried"),
    [
        (1, [1, 2]),
        (2, [2, 4]),
        (3, [3, 6]),
        (4, [2, 4]),
        (8, [2, 4, 8]),
        (256, [4, 16, 64, 128, 256]),
    ],
)
def test_at_least_two_sizes_are_tried_and_one_image_only_if_configured(
    configured: int, tried: list[int]
):
    assert sizes_to_try(configured) == tried


def test_memory_is_foreseen_along_the_line_through_the_two_largest():
    assert line_through({2: 999, 4: 100, 8: 140}, 16) == 220
    assert line_through({4: 100, 8: 140}, 2) == 80
    assert line_through({4: 100, 8: 90}, 16) == 90  # noise: more images never take less


@pytest.mark.parametrize(("name", "dims"), EVERY_TASK)
def test_every_task_can_be_rehearsed(name: str, dims: int):
    found = rehearse(scene(name, dims))
    assert set(found.peaks) == {2, 4}
    assert len(found.step_seconds) == MEASURED_STEPS
    assert min(found.step_seconds) > 0
    assert found.validation_seconds > 0
    assert not found.failed


def test_whole_steps_are_timed_with_all_their_micro_batches(monkeypatch: pytest.MonkeyPatch):
    sizes = []
    backward = Step.backward

    def watched(step: Step, sample: Any) -> None:
        sizes.append(len(sample.images))
        backward(step, sample)

    monkeypatch.setattr(Step, "backward", watched)
    rehearse(scene(global_batch_size=8, micro_batch_size=4))
    assert sizes == [2] * 2 + [4] * 2 * (1 + MEASURED_STEPS)


def test_slow_steps_are_measured_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rehearsal, "PATIENCE_S", 0.0)
    assert len(rehearse(scene()).step_seconds) == 1


def test_a_training_state_on_disk_is_weights_moments_and_average():
    plain, averaged = (rehearse(scene(ema_decay=decay)) for decay in (0, 0.9))
    weights = averaged.state_bytes - plain.state_bytes
    assert plain.state_bytes == pytest.approx(3 * weights, rel=0.02)  # and AdamW's two moments
    assert 0 < plain.checkpoint_bytes < weights


def test_more_than_is_free_is_foreseen_and_not_tried(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rehearsal, "free_memory", lambda device: 10)
    grown = iter([100, 200])
    monkeypatch.setattr(rehearsal, "_peak", lambda device: next(grown))
    found = rehearse(scene(global_batch_size=8))
    assert (found.peaks, found.foreseen_bytes, found.step_seconds) == ({2: 100, 4: 200}, 400, [])


def test_far_too_large_a_batch_is_foreseen_from_small_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rehearsal, "free_memory", lambda device: 1000)
    grown = iter([100, 130])
    monkeypatch.setattr(rehearsal, "_peak", lambda device: next(grown))
    found = rehearse(scene(global_batch_size=4096))
    wanted = 130 + (4096 - 16) * 30 / (16 - 4)
    assert (set(found.peaks), found.foreseen_bytes) == ({4, 16}, int(wanted))


def test_twice_the_batch_is_not_tried_where_it_might_not_fit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rehearsal, "free_memory", lambda device: 1000)
    monkeypatch.setattr(rehearsal, "_peak", lambda device: 600)
    found = rehearse(scene(global_batch_size=2))
    assert (set(found.peaks), found.failed, found.foreseen_bytes) == ({2}, False, 0)
    assert found.validation_seconds > 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception):
    backward = Step.backward

    def hungry(step: Step, sample: Any) -> None:
        if len(sample.images) == 8:
            raise error
        backward(step, sample)

    monkeypatch.setattr(Step, "backward", hungry)
    found = rehearse(scene(global_batch_size=8))
    assert found.failed
    assert set(found.peaks) == {2, 4}


def test_other_errors_are_not_taken_for_missing_memory(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Step, "backward", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        rehearse(scene())


def test_crops_of_noise_have_the_shape_that_is_asked_for():
    request = SampleRequest(2, (6, 5), "axial", num_neighbours=1, num_sequences=2, mask="organs")
    crops = random_crops(request, 3, 0, CPU)
    assert crops.images.shape == (3, 6, 6, 5)
    assert crops.masks is not None
    assert crops.masks.shape == (3, 6, 5)
    assert 0 <= float(crops.images.min()) < float(crops.images.max()) <= 1
    assert random_crops(replace(request, mask=None), 3, 0, CPU).masks is None


def test_a_container_s_limit_counts_as_the_machine_s_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=900))
    monkeypatch.setattr(rehearsal, "_CGROUP", tmp_path)
    assert free_memory(CPU) == 900
    (tmp_path / "memory.max").write_text("500\n")
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 100\n")
    assert free_memory(CPU) == 300  # files that are cached make room
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) == 900
