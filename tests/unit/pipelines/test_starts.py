"""What is said of an init before, while and after it is loaded, where 2D weights went to 3D."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from exports import make_backbone, make_contract
from medssl.config import ComponentConfig, validate_config
from medssl.models.backbones.base import Backbone
from medssl.models.checkpoints import save_checkpoint
from medssl.models.inits.base import LoadReport
from medssl.models.inits.checkpoint import CheckpointInit
from medssl.models.inits.checkpoint import Config as CheckpointConfig
from medssl.pipelines import compare, pretrain, study, transfer
from medssl.pipelines.export import run as export
from medssl.pipelines.sections import StatisticsConfig
from medssl.pipelines.starts import start_in_words
from medssl.pretext.rotation import Config as RotationConfig
from studies import settings, write_archive
from tests.unit.reports.run_folder import write_run

FLAT = {"name": "monai", "depth": 10, "spatial_dims": 2, "base_channels": 4}
INFLATED = {"name": "inflated", "backbone": FLAT}
IMAGENET = ComponentConfig(name="imagenet")
ROTATION = RotationConfig()
EARLIER = {
    "init": {"name": "imagenet"}, "pretext": {"name": "jigsaw"}, "steps": 10, "seed": 0,
    "index_digest": "a" * 64, "weights_sha256": "b" * 64,
}  # fmt: skip
LINEAGE = "inflated ImageNet → jigsaw → rotation"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_backbone(INFLATED)


@pytest.fixture(scope="module")
def checkpoint(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint that went on from one that began at ImageNet."""
    folder = tmp_path_factory.mktemp("starts") / "gone_on"
    contract = make_contract(backbone, init={"name": "checkpoint"}, history=(EARLIER,))
    save_checkpoint(folder, backbone, contract)
    return folder


@pytest.mark.parametrize(
    ("family", "init", "pretext", "wanted"),
    [
        ("inflated", IMAGENET, None, "inflated ImageNet"),
        ("inflated", IMAGENET, ROTATION, "rotation from inflated ImageNet"),
        ("slicewise", IMAGENET, None, "slice-by-slice ImageNet"),
        ("timm", IMAGENET, ROTATION, "rotation from imagenet"),
        ("inflated", ComponentConfig(name="random"), None, "random"),
    ],
)
def test_a_start_is_put_into_words(family, init, pretext, wanted):
    assert start_in_words(ComponentConfig(name=family), init, pretext) == wanted


def test_a_checkpoint_is_told_with_its_lineage(checkpoint):
    start = CheckpointConfig(path=checkpoint)
    said = start_in_words(ComponentConfig(name="inflated"), start, ROTATION)
    assert said == f"rotation from checkpoint 'gone_on' ({LINEAGE})"


def test_the_load_report_of_a_checkpoint_says_that_it_began_at_inflated_weights(
    checkpoint, backbone
):
    report: LoadReport = CheckpointInit(CheckpointConfig(path=checkpoint)).apply(backbone)
    assert report.source == f"checkpoint 'gone_on' ({LINEAGE})"
    assert report.origin == report.to_dict()["origin"] == "from inflated ImageNet"
    assert "(100 %), from inflated ImageNet, sha256" in str(report)


def test_a_checkpoint_that_began_at_random_weights_has_no_such_origin(backbone, tmp_path):
    save_checkpoint(tmp_path / "own", backbone, make_contract(backbone))
    report = CheckpointInit(CheckpointConfig(path=tmp_path / "own")).apply(backbone)
    assert report.origin == ""


def test_plans_of_all_commands_say_it(checkpoint, tmp_path, monkeypatch):
    for module in (study, transfer):
        monkeypatch.setattr(module, "check_inits", lambda *_: None)  # needs ImageNet's file
    content: dict[str, Any] = settings(write_archive(tmp_path / "archive", 7))
    content |= {
        "backbone": INFLATED,
        "sampling": {"crop_size": [16, 16, 8]},
        "inits": {
            "random": {"init": "random"},
            "imagenet": {"init": "imagenet"},
            "continual": {"init": "imagenet", "pretext": {"name": "inpainting", "block": 4}},
            "ours": {"init": {"name": "checkpoint", "path": str(checkpoint)}},
        },
    }
    config = validate_config(content, study.StudyConfig)
    wanted = {
        "random": "random",
        "imagenet": "inflated ImageNet",
        "continual": "inpainting from inflated ImageNet",
        "ours": f"checkpoint 'gone_on' ({LINEAGE})",
    }
    assert study.plan(config)["inits"] == wanted

    index = study.indexing.run(config.index, tmp_path / "index")
    shared = {name: content[name] for name in ("preprocessing", "sampling", "backbone")}
    shared["index"] = str(index.folder)
    evaluated = ("tasks", "protocols", "matrix", "splits", "statistics")
    given = {label: start["init"] for label, start in content["inits"].items()}
    matrix = {**shared, **{name: content[name] for name in evaluated}, "inits": given}
    found = transfer.plan(validate_config(matrix, transfer.TransferConfig))
    assert found["inits"] == {**wanted, "continual": "inflated ImageNet"}

    alone = {**shared, **content["pretrain"], **content["inits"]["continual"]}
    planned = pretrain.plan(validate_config(alone, pretrain.PretrainConfig))
    assert planned["init"] == "inflated ImageNet"


def test_the_model_card_of_an_export_says_it(checkpoint, tmp_path):
    card = export(checkpoint, ["program"], tmp_path / "out", image_size=(32, 32, 8)).folder
    assert f"| How they came about | {LINEAGE} |" in (card / "MODEL_CARD.md").read_text()


def test_runs_that_are_compared_keep_what_their_inits_started_from(tmp_path):
    """Two runs, each with inits of the same labels; one of them is in 3D."""
    flat = write_run(tmp_path / "flat")
    table = pd.read_parquet(flat / "predictions.parquet")
    kept = (table["protocol"] == "fine_tune") & (table["num_labelled_patients"] == 3)
    table[kept & table["init"].isin(["random", "imagenet"])].to_parquet(
        flat / "predictions.parquet"
    )  # a quarter of a minute less
    deep = tmp_path / "deep"
    shutil.copytree(flat, deep)
    facts = json.loads((deep / "provenance.json").read_text())
    facts["inits"]["imagenet"]["origin"] = "inflated ImageNet"
    (deep / "provenance.json").write_text(json.dumps(facts))
    statistics = StatisticsConfig(num_resamples=200)
    compare.run([flat, deep], tmp_path / "both", statistics=statistics)
    noted = json.loads((tmp_path / "both" / "provenance.json").read_text())["inits"]
    assert noted["imagenet (deep)"]["origin"] == "inflated ImageNet"
    assert "origin" not in noted["imagenet"]
    assert "imagenet (deep)" in set(pd.read_csv(tmp_path / "both" / "comparisons.csv")["init"])
    page = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    assert "imagenet (deep) (inflated ImageNet)" in page
