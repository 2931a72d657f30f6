"""Two processes equal one: the same crops, none twice, the same losses and weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from medssl.scans.store import Store
from starts_again import RESTARTS
from training import EVERY_TASK, Training, blob_store, configured, pretext_task
from two_processes import SETTINGS

TESTS = Path(__file__).parents[1]


def torchrun(*arguments: str | Path, cwd: Path, **settings: str) -> subprocess.Popen[str]:
    """Start a command in two processes of this machine; the network is not used."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # fmt: skip
    options = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         *options, *map(str, arguments)],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return blob_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def pair(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of every task."""
    out = tmp_path_factory.mktemp("pair")
    process = torchrun(TESTS / "two_processes.py", store.folder, out, cwd=out)
    _, printed = process.communicate(timeout=500)
    assert process.returncode == 0, printed
    return out


@pytest.mark.parametrize(("name", "dims"), EVERY_TASK)
def test_two_processes_equal_one(store: Store, pair: Path, name: str, dims: int):
    first, second = (
        torch.load(pair / f"{name}-{dims}-{rank}.pt", weights_only=True) for rank in range(2)
    )
    settings: dict[str, Any] = {**SETTINGS, "micro_batch_size": 4}
    training = Training(store, pretext_task(name, dims), configured(**settings))
    seen: list[str] = []
    state = training.run(training.state(), seen=seen)

    assert sorted(first["seen"] + second["seen"]) == sorted(seen)
    assert len(set(first["seen"]) & set(second["seen"])) == 0
    assert first["micro_batches"] == state.micro_batches == 2
    assert first["logged"] == second["logged"]
    for (_, ours), (_, theirs) in zip(first["logged"], training.logged, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    wanted = state.network.state_dict()
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
        assert torch.allclose(value, wanted[key], atol=1e-4), key


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_find_different_states_refuse_to_go_on(pair: Path, rank: int):
    told = (pair / f"apart-{rank}.txt").read_text()
    assert "from step 0 to step 5" in told
    assert "Give an --out that every machine sees as the same folder." in told


@pytest.mark.slow
def test_processes_meet_again_however_often_one_is_killed(tmp_path: Path):
    process = torchrun(TESTS / "starts_again.py", cwd=tmp_path, max_restarts=str(RESTARTS))
    out, printed = process.communicate(timeout=150)
    assert process.returncode == 0, printed
    assert out.splitlines() == [f"start {n}: 2 processes" for n in range(RESTARTS + 1)]
