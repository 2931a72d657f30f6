"""What a stranger needs to do a run again, and what must not travel with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from medssl.reports.contents import read_contents
from medssl.reports.html import build_report
from medssl.reports.reproduce import (
    config_to_show,
    digests,
    kind_of,
    seeds,
    steps,
    without_places,
)
from medssl.tracking.privacy import PUBLIC_CONFIG


def commands(folder: Path) -> list[str]:
    found = steps(read_contents(folder))
    return [line for step in found for line in step.commands.splitlines()]


def test_the_steps_lead_from_the_code_to_the_report(light_run: Path):
    assert commands(light_run) == [
        "git checkout 0123456789abcdef0123456789abcdef01234567",
        "make setup",
        "medssl datasets fetch hippocampus",
        "medssl study config.yaml --out runs/hippocampus",
        "medssl report RUN_FOLDER",
    ]


def test_code_that_no_commit_holds_is_said_to_be_so(light_run: Path):
    file = light_run / "provenance.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "git_commit": f"{facts['git_commit']}+changes"}))
    first = steps(read_contents(light_run))[0]
    assert "the code had changes that no commit holds" in first.words
    assert "+changes" not in first.commands


def test_a_folder_without_configuration_gets_no_steps(tmp_path: Path):
    (tmp_path / "results.csv").write_text("init\n")
    assert steps(read_contents(tmp_path)) == []


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"tasks": [], "workspace": "data", "inits": {}}, "study"),
        ({"tasks": [], "index": "data/index", "inits": {}}, "transfer"),
        ({"pretext": {"name": "rotation"}}, "pretrain"),
        ({"runs": ["a", "b"]}, "compare"),
    ],
)
def test_the_command_is_told_by_the_configuration(config, kind):
    assert kind_of(config) == kind


def test_a_run_that_is_no_study_starts_with_its_index(light_run: Path):
    (light_run / "config.yaml").write_text("index: data/index\npretext: {name: rotation}\n")
    assert "medssl index FOLDER_OF_THE_SCANS" in commands(light_run)
    assert "medssl pretrain config.yaml --out runs/hippocampus" in commands(light_run)


def test_seeds_and_digests_are_told_in_full(light_run: Path):
    contents = read_contents(light_run)
    assert seeds(contents) == "0 for splits, puzzles and pretraining; 0, 1, 2 for the cells"
    assert dict(digests(contents)) == {
        "configuration": "ab" * 32,
        "weights of imagenet": "579344248a93" + "0" * 52,
    }


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("/archive/oncology/miller/scans/", "…/scans"),
        ("~/scans", "…/scans"),
        (r"D:\archive\miller\scans", "…/scans"),
        (r"\\server\share\scans", "…/scans"),
        ("sqlite:////home/miller/mlflow.db", "sqlite://…"),
        ("http://mlflow.hospital.example:5000", "http://…"),
        ("data/workspace", "data/workspace"),
        (3, 3),
    ],
)
def test_of_a_place_only_its_last_name_is_left(place, shown):
    assert without_places({"here": [place]}) == {"here": [shown]}


def test_no_place_of_the_configuration_reaches_the_page(light_run: Path):
    config = yaml.safe_load((light_run / "config.yaml").read_text())
    config["index"] = {"folder": "/archive/oncology/miller/scans"}
    config["tracking"] = {"uri": "http://mlflow.hospital.example:5000"}
    (light_run / "config.yaml").write_text(yaml.safe_dump(config))
    page = build_report(light_run).read_text(encoding="utf-8")
    assert "…/scans" in page
    for word in ("archive", "oncology", "miller", "hospital.example"):
        assert word not in page


def test_the_page_shows_the_public_copy_of_the_configuration(light_run: Path):
    config = yaml.safe_load((light_run / "config.yaml").read_text())
    config["index"] = {"folder": "../miller", "exclude": ["miller*"], "public_salt": "of miller"}
    (light_run / "config.yaml").write_text(yaml.safe_dump(config))
    (light_run / PUBLIC_CONFIG).write_text("index: {folder: (withheld)}\n")
    page = build_report(light_run).read_text(encoding="utf-8")
    assert "index: {folder: (withheld)}" in page
    assert "miller" not in page


def test_the_configuration_without_places_is_yaml_of_the_same_keys(light_run: Path):
    contents = read_contents(light_run)
    assert yaml.safe_load(config_to_show(contents)) == contents.config
