"""A run that only pretrains: its folder and its report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from medssl.config import validate_config
from medssl.pipelines import index as indexing
from medssl.pipelines import pretrain, pretraining
from medssl.scans.building import IndexConfig
from medssl.scans.splits import Splits
from medssl.tracking.journal import read_journal
from studies import settings, write_archive


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of two steps."""
    place = tmp_path_factory.mktemp("pretrain")
    whole = settings(write_archive(place / "archive"))
    index = indexing.run(validate_config(whole["index"], IndexConfig), place / "index")
    training = {"steps": 2, "global_batch_size": 4, "validate_every": 1, "log_every": 1}
    content = {
        **{name: whole[name] for name in ("preprocessing", "sampling", "backbone", "splits")},
        "index": str(index.folder),
        "pretext": {"name": "rotation"},
        "training": training,
        "validation_batches": 1,
        "include_images": True,
        "tracking": {"mlflow": False},
    }
    return pretrain.run(validate_config(content, pretrain.PretrainConfig), place / "run")


def text_of(page: str) -> str:
    body = re.sub(r"<style.*?</style>|<pre.*?</pre>|<[^>]*>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", body)


def test_the_page_asks_and_tells_what_the_run_did(run_folder):
    page = text_of((run_folder / "report.html").read_text(encoding="utf-8"))
    assert "What did pretraining on these scans learn?" in page
    assert "ImageNet" not in page
    assert (
        "One backbone (monai) started from random weights and was trained with the pretext task "
        "rotation for 2 steps of 4 images; no label was read."
    ) in page
    assert "patients of the test side took no part" in page
    assert "Every number here is in journal.jsonl" in page
    for word in ("To the verdict", "labelled subsets", "predictions.parquet", "fine-tuning"):
        assert word not in page


def test_the_folder_and_the_page_say_what_was_trained_on(run_folder):
    facts = json.loads((run_folder / "data.json").read_text())
    splits = Splits.read(run_folder / "splits.json")
    assert facts["pretraining_pool"] == facts["splits"]["train"] == len(splits.train)
    assert facts["test_patients_in_pool"] == 0
    page = text_of((run_folder / "report.html").read_text(encoding="utf-8"))
    assert f"Patients in the pretraining pool {len(splits.train)}" in page


def test_no_pixel_of_a_patient_is_handed_to_tracking(run_folder):
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    assert "data:image" in page  # the config lets pictures into the report
    records = [record for record, _ in read_journal(run_folder / "journal.jsonl")]
    handed = [run_folder / record["path"] for record in records if record["kind"] == "artifact"]
    files = [file for path in handed for file in (path.rglob("*") if path.is_dir() else [path])]
    assert run_folder / "report_without_images.html" in files
    assert {file.suffix for file in files} <= {".html", ".json", ".safetensors", ".yaml"}
    assert b"data:image" not in (run_folder / "report_without_images.html").read_bytes()


def test_one_of_several_pretrainings_has_a_profile_of_its_own(tmp_path: Path):
    places = {
        label: pretraining.profile_folder(tmp_path / "checkpoints" / label, label)
        for label in ("backbone", "rotation")
    }
    assert places == {
        "backbone": tmp_path / "profile",
        "rotation": tmp_path / "profile" / "rotation",
    }
