"""A study whose every place and free text names somebody: MLflow's whole store names nobody."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from samples import NAME, PATIENT_ID, UID_ROOT
from studies import medssl, settings, write_archive, write_config

ACCOUNT, PATIENT = "jdoe", "MUSTERMANN"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_account_place_or_patient_is_in_the_mlflow_store(tmp_path: Path) -> None:
    home = tmp_path / "homes" / ACCOUNT
    archive = write_archive(home / PATIENT)
    table = archive / "labels.csv"
    table.write_text(table.read_text().replace("patient,label", f"{PATIENT}_id,{PATIENT}_class"))
    content = settings(archive, include_images=False)
    content["index"] |= {
        "folder": "given on the command line",
        "exclude": [f"{PATIENT}*"],
        "public_salt": f"salt of {PATIENT}",
    }
    content["inits"].pop("inpainting")
    content["protocols"] = content["protocols"][:1]
    content["tasks"][1] |= {"id_column": f"{PATIENT}_id", "label_column": f"{PATIENT}_class"}
    content["tracking"] = {"system_seconds": 0.5}
    place = tmp_path / "work"
    place.mkdir()
    config = write_config(place / "tiny.yaml", content)
    account = {"HOME": str(home), "USER": ACCOUNT, "LOGNAME": ACCOUNT, "LNAME": ACCOUNT}
    done = medssl("study", config, f"index.folder={archive / 'images'}", cwd=place, **account)
    assert done.returncode == 0, done.stderr

    store = {
        path.relative_to(place): path.read_bytes()
        for path in (place / "runs").rglob("*")
        if path.is_file() and ("mlartifacts" in path.parts or path.name.startswith("mlflow.db"))
    }
    names = {path.name for path in store}
    assert {"mlflow.db", "config.public.yaml", "report.html", "backbone.safetensors"} <= names
    assert not {"config.yaml", "provenance.json", "journal.jsonl", "predictions.parquet"} & names
    planted = (ACCOUNT, PATIENT, NAME, PATIENT_ID, UID_ROOT, str(archive))
    for path, content_found in store.items():
        for secret in planted:
            assert secret.encode() not in content_found, f"{secret} is in {path}"
    (public,) = (text for path, text in store.items() if path.name == "config.public.yaml")
    shown = yaml.safe_load(public)
    assert shown["index"]["folder"] == shown["index"]["public_salt"] == "(withheld)"
    assert list(shown["inits"]) == ["random", "rotation"]
    assert shown["backbone"]["depth"] == 10
    kept = (place / "runs" / "tiny" / "config.yaml").read_text()
    assert PATIENT in kept  # the run folder keeps it whole
    assert b"mlflow.user" not in store[Path("runs/mlflow.db")]
    assert b"mlflow.source" not in store[Path("runs/mlflow.db")]
