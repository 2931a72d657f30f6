"""Kinds of config files: told apart by their keys, described by schemas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medssl.errors import ConfigError
from medssl.pipelines.kinds import KINDS, load_any, schema, write_schemas
from studies import ROOT, settings, write_config

CONFIGS = sorted(
    path
    for path in (ROOT / "configs").glob("*/*.yaml")
    if path.parent.name != "cluster"  # files of Kubernetes: test_cluster_configs.py
)
FOLDERS = {"index": "index", "pretrain": "pretrain", "transfer": "transfer", "studies": "study"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_that_comes_with_medssl_is_right_and_of_its_folders_kind(path: Path):
    assert load_any(path)[0] == FOLDERS[path.parent.name]


def test_the_smallest_configs_are_told_apart(tmp_path: Path):
    index = write_config(tmp_path / "a.yaml", {"folder": "scans"})
    prepare = {"index": "data/index", "preprocessing": {"spacing_mm": [1, 1, 1]}}
    assert load_any(index)[0] == "index"
    assert load_any(write_config(tmp_path / "b.yaml", prepare))[0] == "prepare"
    study = write_config(tmp_path / "c.yaml", settings(tmp_path))
    assert load_any(study)[0] == "study"


def test_overrides_reach_the_config(tmp_path: Path):
    path = write_config(tmp_path / "a.yaml", {"folder": "scans"})
    assert load_any(path, ["limits.seconds=3"])[1].model_dump()["limits"]["seconds"] == 3


def test_a_mistake_is_explained_in_the_words_of_the_kind(tmp_path: Path):
    content = settings(tmp_path) | {"protocls": []}
    with pytest.raises(ConfigError, match=r"protocls: unknown key .*Did you mean 'protocols'\?"):
        load_any(write_config(tmp_path / "study.yaml", content))


def test_a_file_without_any_known_key_is_of_no_kind(tmp_path: Path):
    path = write_config(tmp_path / "other.yaml", {"colour": "red"})
    with pytest.raises(ConfigError) as refused:
        load_any(path)
    assert str(refused.value) == (
        "other.yaml has none of the keys of a config file (index, prepare, pretrain, transfer, "
        "study). Start from a file in configs/."
    )


def test_an_unknown_kind_has_no_schema():
    with pytest.raises(ConfigError) as refused:
        schema("train")
    assert str(refused.value) == (
        "there is no kind of config 'train'. There are: index, prepare, pretrain, transfer, study."
    )


def test_schemas_are_written_one_a_kind(tmp_path: Path):
    write_schemas(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{kind}.json" for kind in KINDS}
    for kind in KINDS:
        content = json.loads((tmp_path / f"{kind}.json").read_text())
        assert set(content["properties"]) == set(KINDS[kind].model_fields)
        assert content["additionalProperties"] is False


def test_the_schemas_in_configs_are_current(tmp_path: Path):
    write_schemas(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_text() == (ROOT / "configs" / "schema" / path.name).read_text()
