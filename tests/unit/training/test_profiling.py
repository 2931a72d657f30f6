"""Profiles: every instant of a step belongs to one part, and what is trained stays the same."""

from __future__ import annotations

import csv
import getpass
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medssl.config import validate_config
from medssl.errors import ConfigError
from medssl.evaluation.protocols.fine_tune import Config as FineTuneConfig
from medssl.scans.store import Store
from medssl.training.profiling import (
    PARTS,
    Profile,
    advice,
    cleaned,
    parts_of,
    table_in_words,
)
from training import CPU, Training, blob_store, configured, pretext_task

NAMES = [*PARTS.values(), "device idle"]


def stretch(name: str, start: float, end: float, tid: int = 1) -> dict[str, Any]:
    return {
        "ph": "X", "cat": "user_annotation", "name": f"medssl: {name}", "pid": 1, "tid": tid,
        "ts": start, "dur": end - start,
    }  # fmt: skip


def launched(number: int, at: float, name: str, start: float, end: float) -> list[dict[str, Any]]:
    """Return a launch, from a thread of autograd's, and the device's work."""
    cat = "gpu_memcpy" if "Memcpy" in name else "kernel"
    args = {"correlation": number}
    return [
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 1, "tid": 2, "ts": at, "dur": 1,
         "args": args},
        {"cat": cat, "name": name, "pid": 0, "tid": 7, "ts": start, "dur": end - start,
         "args": args},
    ]  # fmt: skip


ON_CPU = [
    stretch("step", 0, 100),
    stretch("wait for data", 0, 40),
    stretch("copy", 30, 40),
    stretch("forward", 40, 60),
    stretch("backward", 60, 90),
    stretch("forward", 10, 20, tid=9),  # of another thread
    stretch("step", 200, 300),
    stretch("optimizer", 200, 300),
]


def test_on_a_cpu_each_instant_belongs_to_its_innermost_stretch():
    found = parts_of(ON_CPU)
    assert found.steps == 2
    assert {part: round(1e6 * value) for part, value in found.seconds.items() if value} == {
        "waiting for data": 30, "host-to-device copies": 10, "forward": 20, "backward": 30,
        "optimizer": 100, "other": 10,
    }  # fmt: skip
    assert "device idle" not in found.seconds


ON_GPU = [
    stretch("step", 0, 100),
    stretch("wait for data", 0, 20),
    *launched(1, 10, "Memcpy HtoD (Pinned -> Device)", 12, 30),
    stretch("forward", 20, 40),
    *launched(2, 25, "conv", 25, 60),  # 25 to 30 hides the copy
    stretch("backward", 40, 50),
    *launched(3, 45, "dgrad", 60, 90),  # from autograd's own thread
    stretch("optimizer", 50, 55),
    *launched(4, 52, "adam", 120, 140),  # after the host is done with the step
    *launched(5, 110, "validation", 105, 118),
]


def test_on_a_gpu_each_instant_belongs_to_what_the_device_did_then():
    found = parts_of(ON_GPU)
    assert {part: round(1e6 * value) for part, value in found.seconds.items() if value} == {
        "waiting for data": 12, "host-to-device copies": 13, "forward": 35, "backward": 30,
        "optimizer": 20, "device idle": 10,
    }  # fmt: skip


def test_waiting_behind_a_busy_device_costs_nothing():
    hidden = [
        stretch("step", 0, 100), stretch("forward", 0, 10), *launched(1, 5, "conv", 10, 100),
        stretch("wait for data", 20, 90),
    ]  # fmt: skip
    assert parts_of(hidden).shares["waiting for data"] == 0


@given(st.lists(st.floats(0.001, 10), min_size=len(NAMES), max_size=len(NAMES)))
def test_shares_add_up_to_a_hundred(seconds: list[float]):
    found = Profile(3, dict(zip(NAMES, seconds, strict=True)))
    assert sum(found.shares.values()) == pytest.approx(1)
    assert sum(round(10 * percent) for _, percent, _ in found.rows()) == 1000


def test_a_trace_keeps_nothing_that_names_the_machine():
    trace = {
        "host_name": "ward-3", "traceName": "/home/ada/run/trace.json", "displayTimeUnit": "ms",
        "traceEvents": [
            {"ph": "M", "name": "process_name", "args": {"name": "ada-python"}},
            {"ph": "X", "name": "kernel", "args": {"kernel_file": "/tmp/ada/k.py", "block": 4}},
        ],
    }  # fmt: skip
    assert cleaned(trace) == {
        "displayTimeUnit": "ms",
        "traceEvents": [{"ph": "X", "name": "kernel", "args": {"block": 4}}],
    }


# ---------------------------------------------------------------------------------------- advice


def shares(**of: float) -> dict[str, float]:
    named = {name.replace("_", " "): share for name, share in of.items()}
    rest = 1 - sum(named.values())
    return {**dict.fromkeys(NAMES, 0.0), "forward": rest / 2, "backward": rest / 2, **named}


FASTEST = {"precision": "bf16", "channels_last": True, "compile": True}
WAITING = shares(waiting_for_data=0.5)


@pytest.mark.parametrize(
    ("found", "device", "settings", "told"),
    [
        (WAITING, "cuda", {}, "Reading bounds this run (50% of a step waits). Raise training.num"),
        (WAITING, "cuda", {}, "(now 0; 4 cores are usable), or keep the scans on the device"),
        (WAITING, "cuda", {"num_workers": 3}, "3 workers read on 4 cores already: keep the scans"),
        (shares(**{"host-to-device_copies": 0.2}), "cuda", {}, "Copies to the device bound this"),
        (shares(device_idle=0.4), "cuda", {}, "The device idles 40% of a step: the host cannot"),
        (shares(device_idle=0.4), "cuda", {}, "global_batch_size, or set training.compile=true."),
        (shares(device_idle=0.4), "cuda", FASTEST, "micro_batch_size or global_batch_size."),
        (shares(augmentation=0.3, puzzle=0.1), "cpu", {}, "(augmentation 30%, puzzle 10%). Vary"),
        (shares(), "cuda", {}, "The network bounds this run (100% of a step). Set training.preci"),
        (shares(), "cuda", {"precision": "bf16"}, "Set training.channels_last=true."),
        (shares(), "cuda", {**FASTEST, "compile": False}, "Set training.compile=true."),
        (shares(), "cuda", FASTEST, "more GPUs (torchrun) are."),
        (shares(), "cuda", {"recompute": True}, "training.recompute=false is faster"),
        (shares(), "cpu", {}, "A GPU, a smaller backbone or smaller crops make it faster"),
        (shares(), "cpu", {"precision": "bf16"}, "training.precision=fp32 is faster on a CPU"),
    ],
)
def test_the_advice_names_what_bounds_and_what_to_change(
    found: dict[str, float], device: str, settings: dict[str, Any], told: str
):
    assert told in advice(found, configured(**settings), device, 4)


def test_the_table_fits_a_screen():
    lines = table_in_words(parts_of(ON_CPU), configured(), CPU).splitlines()
    assert len(lines) <= 24
    assert "forward                   10.0 %        0.01" in lines
    assert lines[0].startswith("2 steps of 4 images on cpu, 0.1 ms a step")


# ------------------------------------------------------------------------------- of real trainings


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return blob_store(tmp_path_factory.mktemp("store"))


def profiled(store: Store, folder: Path | None, steps: int, **settings: Any) -> Training:
    training = Training(store, pretext_task("rotation", 2), configured(steps=steps, **settings))
    training.run(training.state(), profile=folder)
    return training


def test_a_training_is_the_same_with_a_profile_and_without(store: Store, tmp_path: Path):
    task = pretext_task("rotation", 2)
    plain, recorded = (
        Training(store, task, configured(steps=14, profile=wanted)) for wanted in (False, True)
    )
    ours = plain.run(plain.state(), profile=tmp_path / "not wanted").network.state_dict()
    theirs = recorded.run(recorded.state(), profile=tmp_path / "wanted").network.state_dict()
    assert plain.logged == recorded.logged
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [path.name for path in tmp_path.iterdir()] == ["wanted"]


def test_a_profile_is_a_trace_a_table_and_a_csv(store: Store, tmp_path: Path):
    profiled(store, tmp_path, 14, profile=True, micro_batch_size=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["profile.csv", "profile.txt", "trace.json"]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    found = parts_of(events)
    assert found.steps == 5
    assert sum(event.get("name") == "medssl: forward" for event in events) == 10
    assert all(found.seconds[part] > 0 for part in ("forward", "backward", "puzzle", "optimizer"))
    rows = list(csv.DictReader((tmp_path / "profile.csv").read_text().splitlines()))
    assert sum(float(row["percent"]) for row in rows) == pytest.approx(100)
    assert rows[0]["part"] == "waiting for data"
    assert "bounds this run" in (tmp_path / "profile.txt").read_text()


def test_a_profile_names_neither_user_nor_machine_nor_folder(store: Store, tmp_path: Path):
    profiled(store, tmp_path, 14, profile=True)
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert not {"host_name", "traceName"} & trace.keys()
    for private in (str(tmp_path), str(Path.home()), str(Path.cwd()), f'"{socket.gethostname()}"'):
        assert private not in text
    assert f"/{getpass.getuser()}/" not in text


def test_a_short_training_is_profiled_as_far_as_it_goes(store: Store, tmp_path: Path):
    profiled(store, tmp_path, 4, profile=True)
    assert parts_of(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]).steps == 1


def test_too_few_steps_for_a_profile_are_told(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    profiled(store, tmp_path, 3, profile=True)
    assert "a profile needs 4 steps; 3 are left, and none is made" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_training_that_ends_early_leaves_no_half_profile(store: Store, tmp_path: Path):
    def stop() -> None:
        raise KeyboardInterrupt

    training = Training(
        store, pretext_task("rotation", 2), configured(steps=14, checkpoint_every=9, profile=True)
    )
    with pytest.raises(KeyboardInterrupt):
        training.run(training.state(), profile=tmp_path, save=stop)
    assert not list(tmp_path.iterdir())


def test_a_profile_of_fine_tuning_is_refused():
    content = {"name": "fine_tune", "training": {"steps": 5, "profile": True}}
    with pytest.raises(ConfigError, match="profile records a pretraining; leave it out here"):
        validate_config(content, FineTuneConfig)
