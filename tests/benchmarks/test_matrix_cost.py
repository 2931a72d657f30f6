"""What a transfer matrix costs as its cells grow in number: features are paid once.

    make bench PYTEST_ARGS="-k matrix_cost -s"

Two checkpoints, one task, linear probes of two numbers of labelled patients; seeds make the cells.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finished_studies import finished_study
from medssl.evaluation.protocols.base import Setting
from medssl.executors.local import Config as LocalConfig
from medssl.pipelines.cells import Evaluation
from medssl.pipelines.finished import evaluation_of, inits_of, study_of
from medssl.pipelines.run_folder import RunFolder
from medssl.pipelines.transfer import evaluate
from medssl.tracking.base import Tracker, TrackingConfig

pytestmark = pytest.mark.timeout(0)

SEEDS = (1, 4, 16)


def of_checkpoints(run: Path, seeds: int) -> Evaluation:
    """Return an evaluation whose features do not depend on the seed, in this process."""
    config = study_of(run)
    inits = {name: init for name, init in inits_of(config, run).items() if name != "random"}
    evaluation = evaluation_of(config, run, inits)
    matrix = config.matrix.model_copy(
        update={"seeds": tuple(range(seeds)), "executor": LocalConfig(num_workers=0)}
    )
    (probe,) = (protocol for protocol in config.protocols if protocol.name == "linear_probe")
    section = config.model_copy(
        update={"matrix": matrix, "protocols": (probe,), "allow_test_patients_in_pretraining": True}
    )
    tasks = {name: task for name, task in evaluation.tasks.items() if name == "segmentation"}
    return dataclasses.replace(evaluation, section=section, tasks=tasks)


def test_matrix_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_study(tmp_path)
    computed: list[str] = []
    compute = Setting._computed_features

    def counted(self: Setting, *sizes: Any) -> Any:
        computed.append(self.init)
        return compute(self, *sizes)

    monkeypatch.setattr(Setting, "_computed_features", counted)
    numbers, seconds = [], []
    for seeds in SEEDS:
        evaluation = of_checkpoints(run, seeds)
        out = tmp_path / f"run-{seeds}"
        computed.clear()
        with Tracker(out, TrackingConfig(mlflow=False)) as tracker, tracker.run("study") as handle:
            folder = RunFolder(out, evaluation.section, "medssl study")
            begun = time.perf_counter()
            evaluate(evaluation, out, tracker, handle, folder, lambda *_: None)
            seconds.append(time.perf_counter() - begun)
        numbers.append(len(evaluation.cells()))
        assert sorted(computed) == sorted(evaluation.inits)  # once each
    slope, intercept = np.polyfit(numbers, seconds, 1)
    with capsys.disabled():
        print("\ncells: " + ", ".join(map(str, numbers)))
        print("seconds: " + ", ".join(f"{value:.1f}" for value in seconds))
        print(f"fitted: {intercept:.1f} s + {1000 * slope:.0f} ms a cell")
        for number, value in zip(numbers, seconds, strict=True):
            line = intercept + slope * number
            print(f"  {number} cells: {value / line:.2f} of the line, {value / number:.2f} s each")
    assert slope > 0
