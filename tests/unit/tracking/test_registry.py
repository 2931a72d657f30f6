"""Checkpoints in a real model registry: MLflow's own, in a sqlite file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from earlier_versions import register_checkpoint
from medssl.errors import ConfigError, DataError, MachineError, WeightsError
from medssl.models.backbones.monai import Config as BackboneConfig
from medssl.models.build import build_backbone
from medssl.models.checkpoints import (
    Contract,
    find_checkpoint,
    load_backbone,
    load_contract,
    save_checkpoint,
)
from medssl.models.inits.checkpoint import Config as CheckpointConfig
from medssl.models.inits.random import Config as RandomConfig
from medssl.tracking import registry
from medssl.tracking.registry import check_name, resolve

SMALL = BackboneConfig(depth=10, spatial_dims=2, base_channels=4)

# MLflow's own tables use a loader that SQLAlchemy 2.1 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def write_checkpoint(folder: Path, seed: int) -> Path:
    backbone, _ = build_backbone(SMALL, RandomConfig(), in_channels=1, seed=seed)
    contract = Contract(
        spacing_mm=(1.0, 1.0, 1.0),
        orientation="RAS",
        axis_order="CXY",
        intensity={"kind": "percentile"},
        in_channels=1,
        spatial_dims=2,
        backbone=SMALL.model_dump(mode="json"),
        init={"name": "imagenet"},
        pretext={"name": "rotation"},
        index_digest="0",
        store_digest="0",
        patients=(),
        seed=seed,
        steps=1,
        package_versions={},
    )
    save_checkpoint(folder, backbone, contract)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with a registry: model heart with versions 1 and 2, and one that is none."""
    place = tmp_path_factory.mktemp("registry")
    patch = pytest.MonkeyPatch()
    for name, seed in (("first", 1), ("second", 2)):
        write_checkpoint(place / name, seed)
    with patch.context() as context:
        surroundings(context, place)
        assert register_checkpoint(place / "first", "heart", "tried") == "models:/heart/1"
        assert register_checkpoint(place / "second", "heart", "champion") == "models:/heart/2"
        add_what_is_no_checkpoint(place)
        yield place


def surroundings(patch: pytest.MonkeyPatch, place: Path) -> None:
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")
    patch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    patch.setenv("MEDSSL_CACHE", str(place / "cache"))


def add_what_is_no_checkpoint(place: Path) -> None:
    client = new_client()
    experiment = client.get_experiment_by_name("medssl")
    run = client.create_run(experiment.experiment_id)
    (place / "note.txt").write_text("a model of another project")
    client.log_artifact(run.info.run_id, str(place / "note.txt"), "model")
    client.create_registered_model("other")
    client.create_model_version("other", f"runs:/{run.info.run_id}/model", run_id=run.info.run_id)


def new_client() -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient()


@pytest.fixture(autouse=True)
def _fresh(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    surroundings(monkeypatch, place)
    registry._resolved.cache_clear()


@pytest.mark.parametrize(
    ("uri", "folder"),
    [
        ("models:/heart@champion", "second"),
        ("models:/heart@tried", "first"),
        ("models:/heart/1", "first"),
        ("models:/heart/2", "second"),
    ],
)
def test_a_model_is_the_checkpoint_that_was_registered(place, uri, folder):
    found = resolve(uri)
    for name in registry.FILES:
        assert (found / name).read_bytes() == (place / folder / name).read_bytes()


def test_the_init_loads_a_model_under_its_contract(place):
    path = Path("models:/heart@champion")
    _, report = build_backbone(SMALL, CheckpointConfig(path=path), in_channels=1, seed=0)
    assert report.percent == 100
    assert report.source == "checkpoint 'models:/heart@champion' (imagenet → rotation)"
    assert report.sha256 == load_contract(place / "second").weights_sha256
    with pytest.raises(WeightsError, match='orientation: found "RAS", wanted "LPS"'):
        build_backbone(
            SMALL, CheckpointConfig(path=path), in_channels=1, seed=0,
            expected={"orientation": "LPS"},
        )  # fmt: skip


def test_a_config_takes_a_model_as_text():
    config = CheckpointConfig.model_validate({"path": "models:/heart@champion"})
    assert find_checkpoint(config.path) == resolve("models:/heart@champion")


def test_a_model_is_downloaded_once(monkeypatch):
    first = resolve("models:/heart/2")
    registry._resolved.cache_clear()  # as another process
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", lambda **_: pytest.fail("again"))
    assert resolve("models:/heart/2") == resolve("models:/heart@champion") == first


def test_an_alias_that_moves_keeps_its_version_within_a_process():
    """One run must not use two sets of weights."""
    before = resolve("models:/heart@tried")
    new_client().set_registered_model_alias("heart", "tried", "2")
    try:
        assert resolve("models:/heart@tried") == before
        registry._resolved.cache_clear()  # as another process
        assert resolve("models:/heart@tried") == resolve("models:/heart/2") != before
    finally:
        new_client().set_registered_model_alias("heart", "tried", "1")


def test_a_download_that_was_cut_short_is_made_again(place):
    found = resolve("models:/heart/1")
    (found / "contract.json").unlink()
    registry._resolved.cache_clear()
    assert (resolve("models:/heart/1") / "contract.json").is_file()
    assert [path.name for path in (place / "cache" / "models").glob(".part-*")] == []


# ----------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/heart@chmpion", r"no alias 'chmpion'\. Its aliases: champion, tried\. Set it in"),
        ("models:/heart/7", r"has no version 7\. Its versions: 1, 2\. Give one of them"),
        ("models:/haert@champion", r"no model 'haert'\. There are: heart, other\. Register it"),
        (
            "models:/heart",
            r"'models:/heart' is not of the form models:/NAME@ALIAS or models:/NAME/",
        ),
        ("models:/heart/latest", r"is not of the form"),
    ],
)
def test_a_uri_that_leads_nowhere_names_what_there_is(uri, message):
    with pytest.raises(ConfigError, match=message):
        resolve(uri)
    with pytest.raises(ConfigError, match=message):
        load_contract(Path(uri))


def test_a_model_of_another_project_is_refused(place):
    with pytest.raises(DataError, match=r"models:/other/1: this version holds no backbone\.safe"):
        resolve("models:/other/1")
    assert not list((place / "cache" / "models").glob(".part-*"))


def test_without_a_registry_the_variable_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        MachineError, match=r"MLFLOW_TRACKING_URI is not set, and there is no runs/"
    ):
        resolve("models:/heart@champion")


def test_the_database_of_the_runs_here_is_the_registry(place, monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    shutil.copy(place / "mlflow.db", tmp_path / "runs" / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert (resolve("models:/heart/1") / "contract.json").is_file()


def test_a_server_that_does_not_answer_is_named_without_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://anna:secret@127.0.0.1:9")
    with pytest.raises(MachineError, match=r"registry \(http://127\.0\.0\.1\) could not") as raised:
        resolve("models:/heart@champion")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("a/b", None), ("a@b", None), ("a:b", None), ("a ", None), ("", "x"),
        ("a", "b/c"), ("a", ""), ("a", "b c"), ("a", "latest"), ("a", "v3"),
    ],
)  # fmt: skip
def test_a_name_that_makes_no_uri_is_refused(name, alias):
    with pytest.raises(ConfigError, match=r"makes no URI of the form models:/NAME@ALIAS"):
        check_name(name, alias)


def test_a_cached_checkpoint_that_was_exchanged_whole_is_refused(place):
    """Weights and contract agree with one another, and are not those that were registered."""
    found = resolve("models:/heart/1")
    for name in registry.FILES:
        shutil.copy(place / "second" / name, found / name)
    registry._resolved.cache_clear()  # as another process
    try:
        with pytest.raises(DataError, match=r"models:/heart/1: .* registered was [0-9a-f]{12}\."):
            load_backbone(Path("models:/heart/1"))
    finally:
        shutil.rmtree(found)
