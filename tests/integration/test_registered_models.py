"""A study's backbones in a real model registry: versions, aliases, lineage, and searches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from earlier_versions import register_checkpoint
from exports import MONAI_2D, PATIENT_KEY, make_checkpoint
from medssl.errors import MachineError
from medssl.models.checkpoints import load_contract
from medssl.pipelines import publish
from medssl.tracking import registry
from medssl.tracking.base import Tracker, TrackingConfig
from medssl.tracking.recipes import RECIPES, filled
from medssl.tracking.registry import resolve

# MLflow's own tables use a loader that SQLAlchemy 2.1 calls deprecated.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

INDEX, SPLITS = "a" * 64, "5" * 64  # the index is the one of `make_contract`
LABELS = ("rotation", "inpainting")


@dataclass(frozen=True)
class Study:
    """A study that was delivered, and registered twice.

    Attributes:
        folder: its run folder.
        before: the URI of a checkpoint that an older medssl registered.
        first, second: what the two registrations returned, by label.
    """

    folder: Path
    before: str
    first: dict[str, Any]
    second: dict[str, Any]

    @property
    def client(self) -> Any:
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=f"sqlite:///{self.folder.parent / 'mlflow.db'}")

    def version(self, label: str) -> Any:
        return self.client.get_model_version("heart", self.first[label].uri.rpartition("/")[2])

    def run(self, name: str) -> Any:
        (found,) = self.search(f"attributes.run_name = '{name}'")
        return found

    def search(self, filter_string: str, order_by: str = "") -> list[Any]:
        experiment = self.client.get_experiment_by_name("medssl").experiment_id
        orders = [order_by] if order_by else None
        return list(self.client.search_runs([experiment], filter_string, order_by=orders))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    patch = pytest.MonkeyPatch()
    place = tmp_path_factory.mktemp("registered")
    folder = place / "runs" / "ours"
    with patch.context() as context:
        context.delenv("MLFLOW_TRACKING_URI", raising=False)
        context.setenv("MEDSSL_CACHE", str(place / "cache"))
        context.chdir(place)
        context.setattr(publish, "write_program", copied_program)  # capturing takes its time
        write_run(folder)
        before = register_checkpoint(folder / "checkpoints" / "rotation", "older", "champion")
        first, second = (
            dict(zip(sorted(LABELS), publish.run(folder, "heart"), strict=True)) for _ in range(2)
        )
        registry._resolved.cache_clear()
        yield Study(folder, before, first, second)
    registry._resolved.cache_clear()


def copied_program(subject: Any, file: Path) -> float:
    raise publish.WeightsError(f"{subject.title} is not captured in this test ({file.name}).")


def write_run(folder: Path) -> None:
    """Write a run folder as a study leaves it, and deliver its journal."""
    config = TrackingConfig(flush_seconds=0.1)
    with Tracker(folder, config) as tracker, tracker.run("study", params={"seed": 1}) as handle:
        handle.inputs({"index": INDEX, "splits": SPLITS}, "evaluation")
        for number, label in enumerate(LABELS):
            checkpoint = folder / "checkpoints" / label
            make_checkpoint(
                checkpoint, {**MONAI_2D, "base_channels": 4 + 4 * number}, pretext={"name": label}
            )
            with tracker.run(f"pretrain/{label}", parent="study") as run:
                run.inputs({"index": INDEX}, "pretraining")
                run.tag("health", f"step 9: {('healthy', 'suspicious')[number]}: solved early")
        for label, score in (("rotation", 0.7), ("inpainting", 0.8), ("rotation", 0.9)):
            params = {"init": label, "protocol": "linear_probe", "task": "segmentation"}
            name = f"cell/{label}-{score}"
            with tracker.run(name, parent="study", params=params) as run:
                run.log(0, {"val/score": score})
        with pytest.raises(ZeroDivisionError), tracker.run("cell/failing", parent="study"):
            raise ZeroDivisionError
    content = {"tracking": {}, "sampling": {"crop_size": [24, 24]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    provenance = {"config_digest": "c" * 64, "data": {"splits": SPLITS, "index": INDEX}}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    pd.DataFrame(
        {
            "task": ["segmentation"] * 2, "init": list(LABELS), "reference": ["imagenet"] * 2,
            "verdict": ["better", "no difference shown"],
        }
    ).to_csv(folder / "comparisons.csv", index=False)  # fmt: skip


def test_every_init_is_a_version_and_a_second_registration_adds_none(study):
    assert sorted(version.uri for version in study.first.values()) == [
        "models:/heart/1", "models:/heart/2",
    ]  # fmt: skip
    assert {v.uri for v in study.second.values()} == {v.uri for v in study.first.values()}
    assert [v.is_new for v in [*study.first.values(), *study.second.values()]] == [
        True, True, False, False,
    ]  # fmt: skip
    assert len(study.client.search_model_versions("name = 'heart'")) == 2


def test_aliases_name_candidates_and_the_best_of_the_verdicts(study):
    aliases = dict(study.client.get_registered_model("heart").aliases)
    rotation = study.first["rotation"].uri.rpartition("/")[2]
    assert str(aliases.pop("candidate_inpainting")) != rotation
    assert {name: str(version) for name, version in aliases.items()} == {
        "candidate_rotation": rotation, "best_for_segmentation": rotation,
    }  # fmt: skip


def test_a_version_belongs_to_its_pretraining_and_says_what_it_saw(study):
    version, pretraining = study.version("rotation"), study.run("pretrain/rotation")
    contract = load_contract(study.folder / "checkpoints" / "rotation")
    assert version.run_id == pretraining.info.run_id
    expected = {
        "pretraining_run_id": pretraining.info.run_id,
        "study_run_id": study.run("study").info.run_id,
        "weights_sha256": contract.weights_sha256,
        "index_digest": INDEX,
        "splits_digest": SPLITS,
        "config_digest": "c" * 64,
        "lineage": "random → rotation",
        "best_for_segmentation": "rotation better than imagenet in 1 of 1 comparisons, never worse",
    }
    assert {name: version.tags.get(name) for name in expected} == expected


def test_the_pretraining_shows_the_model_it_made(study):
    (output,) = study.run("pretrain/rotation").outputs.model_outputs
    logged = study.client.get_logged_model(output.model_id)
    assert (logged.status, logged.tags["index_digest"]) == ("READY", INDEX)


def test_a_registered_model_names_no_place_and_no_account(study):
    version = study.version("rotation")
    said = json.dumps([dict(version.tags), version.description])
    model = study.client.get_logged_model(version.tags["logged_model_id"])
    said += json.dumps(dict(model.tags))
    assert str(study.folder) not in said
    assert PATIENT_KEY not in said
    folder = Path(model.artifact_location)
    code = yaml.safe_load((folder / "MLmodel").read_text())["flavors"]["python_function"]
    assert code["model_code_path"] == "served_model.py"
    assert code["artifacts"]["checkpoint"]["uri"] == "artifacts/checkpoint"


def test_a_whole_model_and_an_older_checkpoint_resolve_to_the_same_files(study):
    for uri in ("models:/heart@best_for_segmentation", study.before, "models:/older@champion"):
        found = resolve(uri)
        for name in registry.FILES:
            wanted = (study.folder / "checkpoints" / "rotation" / name).read_bytes()
            assert (found / name).read_bytes() == wanted, uri
        assert not (found / "data").exists()  # the rest of the model is not downloaded


def test_a_checkpoint_whose_run_is_elsewhere_gets_a_run_of_its_own(study, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(study.folder / "checkpoints" / "rotation", copied)
    (version,) = publish.run(copied, "alone")
    assert (version.aliases, version.pretraining_run) == (("candidate",), "")
    found = study.client.get_model_version("alone", "1")
    run = study.client.get_run(found.run_id)
    assert (run.info.run_name, run.info.status) == ("register/alone", "FINISHED")


def test_an_upload_that_fails_leaves_no_version_and_can_be_repeated(study, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    copied = tmp_path / "copied"
    shutil.copytree(study.folder / "checkpoints" / "rotation", copied)

    def broken(*_: Any) -> None:
        raise ConnectionResetError

    with monkeypatch.context() as context:
        context.setattr(MlflowClient, "log_model_artifacts", broken)
        with pytest.raises(MachineError, match=r"could not do it \(ConnectionResetError\)"):
            publish.run(copied, "again")
    assert study.client.search_model_versions("name = 'again'") == []
    (failed,) = study.search("attributes.run_name = 'register/again'")
    assert failed.info.status == "FAILED"
    logged = study.client.search_logged_models([failed.info.experiment_id])
    assert [m.status for m in logged if m.source_run_id == failed.info.run_id] == ["FAILED"]
    assert publish.run(copied, "again")[0].uri == "models:/again/1"


def names(runs: list[Any]) -> list[str]:
    return sorted(run.info.run_name for run in runs)


def by_recipe(study: Study, name: str) -> list[Any]:
    weights = load_contract(study.folder / "checkpoints" / "rotation").weights_sha256
    recipe = RECIPES[name]
    values = {
        "runs_on_index": {"index": INDEX},
        "run_of_model": {"weights": str(weights)},
        "models_of_index": {"digest": INDEX},
        "best_probe": {"task": "segmentation"},
        "cells_of_study": {"study": study.run("study").info.run_id},
    }.get(name, {})
    wanted = filled(name, **values)
    if recipe.where == "versions":
        return list(study.client.search_model_versions(f"name = 'heart' and {wanted}"))
    return study.search(wanted, recipe.order_by)


PRETRAININGS = ["pretrain/inpainting", "pretrain/rotation"]
CELLS = ["cell/failing", "cell/inpainting-0.8", "cell/rotation-0.7", "cell/rotation-0.9"]
ANSWERS: dict[str, Callable[[list[Any]], object]] = {
    "runs_on_index": lambda found: names(found) == [*PRETRAININGS, "study"],
    "run_of_model": lambda found: [v.tags["pretext"] for v in found] == ["rotation"],
    "models_of_index": lambda found: len(found) == 2,
    "best_probe": lambda found: [r.info.run_name for r in found] == CELLS[:0:-1][:1] + CELLS[1:3],
    "failed_cells": lambda found: names(found) == ["cell/failing"],
    "suspicious": lambda found: names(found) == ["pretrain/inpainting"],
    "cells_of_study": lambda found: names(found) == [*CELLS, *PRETRAININGS],
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_search_recipe_finds_what_it_says(study, name):
    found = by_recipe(study, name)
    assert ANSWERS[name](found), names(found) if RECIPES[name].where == "runs" else found


def test_a_value_with_a_quote_makes_no_filter():
    with pytest.raises(ValueError, match="holds no quote"):
        filled("best_probe", task="a' or 'b")
