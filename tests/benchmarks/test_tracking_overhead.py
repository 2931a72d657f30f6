"""What tracking costs a training: on against off, in alternating turns, in wall and CPU time.

    make bench PYTEST_ARGS="-k tracking_overhead -s"

A real training step (a small network on one core) with every step logged; off means neither journal
nor MLflow nor samples of the machine. On delivers to a sqlite store every 2 s, as by default, and
samples every 10 s. CPU time counts the delivering thread too, and is what a busy machine cannot
spoil; a training on a GPU or with an idle core does not feel that share.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import pytest
import torch

from medssl.tracking.base import Tracker, TrackingConfig

pytestmark = [
    pytest.mark.timeout(0),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
STEPS = int(os.environ.get("BENCH_STEPS", "300"))


class Training:
    """A convolutional network that goes on training, some 40 ms a step on one core."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = torch.nn.Sequential(
            torch.nn.Conv2d(1, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3),
            torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
            torch.nn.Linear(32, 4),
        )  # fmt: skip
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.01)
        self.images, self.target = torch.randn(16, 1, 64, 64), torch.randint(0, 4, (16,))

    def step(self) -> dict[str, float]:
        loss = torch.nn.functional.cross_entropy(self.network(self.images), self.target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        names = ("train/loss", "train/accuracy", "train/rate", "train/grad_norm", "train/images_s")
        return dict.fromkeys(names, float(loss.detach()))


def timed(training: Training, log: object) -> tuple[float, float, float]:
    """Return wall seconds, CPU seconds of the process, and of this thread alone, of a turn."""
    wall, process, thread = time.perf_counter(), time.process_time(), time.thread_time()
    for step in range(STEPS):
        metrics = training.step()
        if callable(log):
            log(step, metrics)
    return (
        time.perf_counter() - wall, time.process_time() - process, time.thread_time() - thread,
    )  # fmt: skip


def test_tracking_overhead(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    training = Training()
    off, on = [], []
    try:
        Tracker(tmp_path / "first").close()  # MLflow is imported, and its tables are made
        timed(training, None)
        for number in range(ROUNDS):
            off.append(timed(training, None))
            folder = tmp_path / f"run{number}"
            with Tracker(folder, TrackingConfig()) as tracker, tracker.run("pretrain") as run:
                on.append(timed(training, run.log))
    finally:
        torch.set_num_threads(before)
    with capsys.disabled():
        print(f"\n{ROUNDS} turns of {STEPS} steps, {len(off)} off and {len(on)} on:")
        for part, name in enumerate(("wall", "CPU of the process", "CPU of the training thread")):
            ratio = statistics.median(b[part] / a[part] for a, b in zip(off, on, strict=True))
            plain, tracked = (statistics.median(t[part] for t in turns) for turns in (off, on))
            print(f"  {name}: {plain:.2f} s off, {tracked:.2f} s on, ratio {ratio:.4f}")
    assert len(on) == ROUNDS
