"""The data of a run in MLflow: digests as dataset inputs, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medssl.tracking.base import Tracker, TrackingConfig, sync
from medssl.tracking.datasets import dataset_inputs, short_digest

# MLflow's own tables use a loader that SQLAlchemy 2.1 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

DIGESTS = {"index": "a" * 64, "splits": "b" * 64}


def inputs_of(record: dict[str, Any]) -> list[Any]:
    return dataset_inputs({"digests": DIGESTS, "context": "pretraining", **record})


def test_a_digest_is_cut_to_what_mlflow_holds_and_kept_whole_in_the_source():
    first, _ = inputs_of({})
    assert first.dataset.digest == short_digest("a" * 64) == "a" * 36
    assert first.dataset.source == f'{{"digest": "{"a" * 64}"}}'
    assert [(tag.key, tag.value) for tag in first.tags] == [("mlflow.data.context", "pretraining")]


def test_a_name_that_is_a_path_is_not_sent():
    (found,) = inputs_of({"digests": {"/data/DOE_JANE/labels.csv": "c" * 64}})
    assert found.dataset.name == "(withheld)"


@pytest.mark.slow
def test_inputs_reach_the_run_once_however_often_they_are_delivered(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "runs" / "study"
    config = TrackingConfig(flush_seconds=0.1)
    for _ in range(2):  # the second time as a run that is resumed
        with Tracker(folder, config) as tracker, tracker.run("study") as handle:
            handle.inputs(DIGESTS, "evaluation")
    (folder / "tracking.json").unlink()  # as if the process died before it noted the delivery
    assert sync(folder, config).undelivered == 0
    (run,) = runs_on(folder, DIGESTS["index"])
    found = {(each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs}
    assert found == {(name, short_digest(digest)) for name, digest in DIGESTS.items()}
    assert len(run.inputs.dataset_inputs) == 2
    assert runs_on(folder, "d" * 64) == []


def runs_on(folder: Path, digest: str) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("medssl").experiment_id
    return list(client.search_runs([experiment], f"dataset.digest = '{short_digest(digest)}'"))
