"""kill -9 at random moments of a training: it ends with the weights of an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from medssl.scans.store import Store
from medssl.training.state import TrainingState, saved_states
from training import CPU, Training, blob_store, configured, pretext_task

NUM_KILLS = 20
NUM_STEPS = 24


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return blob_store(tmp_path_factory.mktemp("store"))


def train_in(folder: Path, training: Training) -> TrainingState:
    """Take up what a folder holds, and train to the end; a state is saved after every step."""
    state = training.state()
    state.resume(folder, CPU)
    return training.run(state, save=lambda: state.save(folder))


def killed_after(seconds: float, folder: Path, training: Training) -> bool:
    """Train in a process of its own that is killed; return whether it was still at work."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train_in(folder, training)
            code = 0
        finally:
            os._exit(code)  # without pytest's own clean-up
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), "the training failed by itself"
    return status == signal.SIGKILL


@pytest.mark.parametrize(
    ("name", "dims", "num_workers"),
    [
        ("rotation", 2, 0),
        pytest.param("multi", 2, 0, marks=pytest.mark.slow),
        pytest.param("multi", 2, 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_training_killed_twenty_times_ends_as_an_undisturbed_one(
    store: Store, tmp_path: Path, name: str, dims: int, num_workers: int
):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a child has none of its parent's threads, and would wait for them
    try:
        settings = configured(steps=NUM_STEPS, checkpoint_every=1, num_workers=num_workers)
        training = Training(store, pretext_task(name, dims), settings)
        wanted = train_in(tmp_path / "undisturbed", training)
        begun = time.monotonic()
        train_in(tmp_path / "timed", training)
        duration = time.monotonic() - begun

        folder, moments = tmp_path / "killed", random.Random(0)
        kills = 0
        for _ in range(NUM_KILLS):
            kills += killed_after(moments.uniform(0.02, duration / 5), folder, training)
        found = train_in(folder, training)
    finally:
        torch.set_num_threads(threads)

    assert kills >= 1
    assert len(saved_states(folder)) == 2
    assert found.step == wanted.step == NUM_STEPS
    ours, theirs = found.network.state_dict(), wanted.network.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
