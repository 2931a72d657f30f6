"""kill -9 at random cells of a transfer matrix: the predictions of an undisturbed run come out."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from studies import environment, medssl, settings, write_archive, write_config

NUM_KILLS = 10
KEPT = (
    "seed", "preprocessing", "sampling", "backbone", "tasks", "protocols", "splits", "statistics",
)  # fmt: skip
"""Sections that a transfer has as a study has them."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an archive, its index, and a transfer config of 24 cells."""
    place = tmp_path_factory.mktemp("matrix")
    study = settings(write_archive(place / "archive"))
    assert (
        medssl(
            "index", place / "archive" / "images", "--out", place / "index", cwd=place
        ).returncode
        == 0
    )
    kept = (
        "seed",
        "preprocessing",
        "sampling",
        "backbone",
        "tasks",
        "protocols",
        "splits",
        "statistics",
    )
    config = {
        **{key: study[key] for key in kept},
        "index": str(place / "index"),
        "inits": {"random": "random", "other": "random"},
        "matrix": {
            "labelled_patients": [2],
            "seeds": [0, 1, 2],
            "executor": {"name": "local", "num_workers": 2},
        },
        "tracking": {"mlflow": False},
    }  # fmt: skip
    write_config(place / "transfer.yaml", config)
    assert run(place, "whole") == 0
    return place


def start(place: Path, out: str, *changes: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "medssl", "transfer", "transfer.yaml", *changes, "--out", out],
        cwd=place, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


def run(place: Path, out: str, *changes: str) -> int:
    return start(place, out, *changes).wait()


def predictions(place: Path, out: str) -> pd.DataFrame:
    return pd.read_parquet(place / out / "predictions.parquet")


def finished_cells(place: Path, out: str) -> int:
    return len(list((place / out / "cells").glob("[!.]*.parquet")))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_matrix_killed_ten_times_ends_with_the_predictions_of_an_undisturbed_one(place: Path):
    number = finished_cells(place, "whole")
    for cells_done in sorted(random.Random(0).sample(range(number), NUM_KILLS)):
        process = start(place, "killed")
        while finished_cells(place, "killed") < cells_done:
            assert process.poll() is None, "the run ended by itself"
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert run(place, "killed") == 0
    pd.testing.assert_frame_equal(
        predictions(place, "killed"), predictions(place, "whole"), check_exact=True
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workers_of_a_ray_cluster_give_the_predictions_of_local_ones(place: Path):
    pytest.importorskip("ray")
    changes = ["matrix.executor.name=ray", "matrix.executor.num_workers=2"]
    assert run(place, "ray", *changes) == 0
    pd.testing.assert_frame_equal(
        predictions(place, "ray"), predictions(place, "whole"), check_exact=True
    )
