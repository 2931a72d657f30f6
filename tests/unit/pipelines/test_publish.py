"""Which aliases a study's backbones get, and that a registry that is away stops nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from medssl.errors import ConfigError, MachineError, WeightsError
from medssl.pipelines import publish
from medssl.pipelines.publish import alias_of, best_by_verdict, facts_of
from medssl.tracking.base import TrackingConfig
from medssl.tracking.publishing import Published

BETTER, WORSE, NONE = "better", "worse", "no difference shown"


def study_with(folder: Path, verdicts: dict[str, list[str]], task: str = "liver") -> Path:
    """Write the comparisons of a study: for every init its verdicts, at growing label numbers."""
    rows = [
        {"task": task, "init": init, "reference": "imagenet", "verdict": verdict, "effect": effect}
        for init, found in verdicts.items()
        for effect, verdict in enumerate(found)
    ]
    folder.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "comparisons.csv", index=False)
    return folder


@pytest.mark.parametrize(
    ("verdicts", "init", "reason"),
    [
        ({"rotation": [BETTER, NONE], "jigsaw": [NONE, NONE]}, "rotation", "in 1 of 2 comparisons"),
        ({"rotation": [BETTER, BETTER], "jigsaw": [BETTER, NONE]}, "rotation", "in 2 of 2 compar"),
        ({"rotation": [BETTER, WORSE], "jigsaw": [BETTER, NONE]}, "jigsaw", "in 1 of 2 compar"),
        ({"rotation": [BETTER], "jigsaw": [BETTER]}, "", "the verdicts do not choose between"),
        ({"rotation": [NONE], "jigsaw": [WORSE]}, "", "no init was shown to be better than imag"),
    ],
)
def test_the_best_init_is_named_by_verdicts_alone(tmp_path, verdicts, init, reason):
    (choice,) = best_by_verdict(study_with(tmp_path, verdicts)).values()
    assert choice.init == init
    assert reason in choice.reason


def test_effects_on_test_patients_choose_nothing(tmp_path):
    study_with(tmp_path, {"rotation": [BETTER], "jigsaw": [BETTER]})
    table = pd.read_csv(tmp_path / "comparisons.csv")
    table["effect"] = [0.9, 0.01]
    table.to_csv(tmp_path / "comparisons.csv", index=False)
    assert best_by_verdict(tmp_path)["liver"].init == ""


def test_a_run_without_comparisons_names_nothing(tmp_path):
    assert best_by_verdict(tmp_path) == {}


@pytest.mark.parametrize(
    ("task", "alias"),
    [("liver", "best_for_liver"), ("liver/lesion 2", "best_for_liver_lesion_2")],
)
def test_an_alias_holds_only_what_mlflow_takes(task, alias):
    assert alias_of("best_for", task) == alias


def study_of_two(folder: Path) -> Path:
    for label in ("jigsaw", "rotation"):
        (folder / "checkpoints" / label).mkdir(parents=True)
        (folder / "checkpoints" / label / "contract.json").write_text("{}")
    return study_with(folder, {"rotation": [BETTER], "jigsaw": [NONE]})


def test_every_init_of_a_study_is_a_candidate_and_the_best_says_why(tmp_path, monkeypatch):
    asked: list[Any] = []

    def keep(checkpoint: Path, name: str, aliases: list[str], notes: dict[str, str], _: Any) -> Any:
        asked.append((checkpoint.name, name, aliases, notes))

    monkeypatch.setattr(publish, "_publish", keep)
    publish.run(study_of_two(tmp_path), "heart")
    why = "rotation better than imagenet in 1 of 1 comparisons, never worse"
    assert asked == [
        ("jigsaw", "heart", ["candidate_jigsaw"], {}),
        (
            "rotation", "heart", ["candidate_rotation", "best_for_liver"], {"best_for_liver": why},
        ),
    ]  # fmt: skip


def test_one_alias_for_a_whole_study_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot name the 2 versions of a study\. Leave --alias"):
        publish.run(study_of_two(tmp_path), "heart", "champion")


def test_what_is_no_checkpoint_is_refused_before_a_registry_is_asked(tmp_path):
    with pytest.raises(WeightsError, match="is empty, and should hold"):
        publish.run(tmp_path, "heart")


def test_nothing_is_registered_unless_a_config_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(publish, "run", lambda *_: pytest.fail("registered"))
    assert publish.after_run(tmp_path, TrackingConfig()) == []


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (MachineError("MLflow's model registry could not do it."), "registry could not do it."),
        (RuntimeError("http://anna:secret@server"), "RuntimeError."),
    ],
)
def test_a_registry_that_is_away_fails_no_run_and_says_what_to_repeat(
    monkeypatch, tmp_path, caplog, problem, told
):
    def away(*_: Any) -> list[Published]:
        raise problem

    monkeypatch.setattr(publish, "run", away)
    assert publish.after_run(tmp_path / "ours", TrackingConfig(register_as="heart")) == []
    assert "The run is complete" in caplog.text
    assert told in caplog.text
    assert "secret" not in caplog.text
    assert f"medssl weights register {tmp_path / 'ours'} heart" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"register_as": "a/b"}, "makes no URI of the form models:/NAME@ALIAS"),
        ({"register_as": "heart", "mlflow": False}, "register_as needs mlflow: true"),
    ],
)
def test_a_name_that_cannot_be_registered_is_refused_in_the_config(settings, message):
    with pytest.raises(ValueError, match=message):
        TrackingConfig(**settings)


def test_a_version_is_told_by_its_aliases():
    version = Published("models:/heart/3", ("candidate", "best_for_liver"), True, "")
    assert facts_of(version) == {
        "alias": "models:/heart@candidate, models:/heart@best_for_liver",
        "pretraining_run": "not in this MLflow",
        "new": True,
    }
