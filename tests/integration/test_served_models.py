"""A registered backbone as MLflow serves it: another process, no pickle, real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from exports import MONAI_3D, make_checkpoint
from medssl.pipelines import publish
from medssl.pipelines.serving import SERVING_FILE, ScanFeatures, serving_facts
from medssl.transforms.preprocessing import PreprocessingConfig
from samples import PLANTED, linear_volume, real_data, write_dicom_series
from studies import ROOT

# MLflow's own tables use a loader that SQLAlchemy 2.1 calls deprecated.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

PREPARED = PreprocessingConfig(spacing_mm=(2.0, 2.0, 2.0)).model_dump(mode="json")
TIMEOUT = 400  # seconds for one command, on a busy machine


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint, and a registry that holds it as heart@candidate."""
    place = tmp_path_factory.mktemp("served")
    fields = {name: PREPARED[name] for name in ("spacing_mm", "orientation", "intensity")}
    make_checkpoint(place / "checkpoint", MONAI_3D, preprocessing=PREPARED, **fields)
    store = f"sqlite:///{place / 'mlflow.db'}"
    (version,) = publish.run(place / "checkpoint", "heart", store=store)
    assert version.aliases == ("candidate",)
    return place


def surroundings(place: Path) -> dict[str, str]:
    """Return the environment of somebody who has nothing but the packages and the registry."""
    home = place / "home"
    home.mkdir(exist_ok=True)
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}/usr/bin{os.pathsep}/bin",
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{place / 'mlflow.db'}",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def run(place: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=place, env=surroundings(place), capture_output=True, text=True,
        timeout=TIMEOUT, check=False,
    )  # fmt: skip


def expected(place: Path, paths: list[Path]) -> list[list[float]]:
    folder = place / "checkpoint"
    (folder / SERVING_FILE).write_text(json.dumps(serving_facts(PREPARED, None)))
    table = pd.DataFrame({"path": [str(path) for path in paths]})
    return list(ScanFeatures(folder).answer(table)["features"])


def predicted(place: Path, paths: list[Path]) -> tuple[list[dict[str, Any]], str]:
    """Return what ``mlflow models predict`` says of files, and all it printed."""
    table = place / "paths.csv"
    pd.DataFrame({"path": [str(path) for path in paths]}).to_csv(table, index=False)
    answer = place / "answer.json"
    command = [
        sys.executable, "-m", "mlflow", "models", "predict", "-m", "models:/heart@candidate",
        "-i", str(table), "-t", "csv", "-o", str(answer), "--env-manager", "local",
    ]  # fmt: skip
    done = run(place, command)
    assert done.returncode == 0, done.stderr
    content = json.loads(answer.read_text())
    return content["predictions"], done.stdout + done.stderr


def test_mlflow_predicts_on_a_real_nifti_and_a_real_dicom_series(place):
    paths = [
        real_data("hippocampus", "images", "hippocampus_001.nii.gz"),
        real_data("dicom", "sag_mprage"),
    ]
    answers, _ = predicted(place, paths)
    assert [(each["row"], each["scan"]) for each in answers] == [(0, 0), (1, 0)]
    for answer, wanted in zip(answers, expected(place, paths), strict=True):
        np.testing.assert_allclose(answer["features"], wanted, rtol=1e-4, atol=1e-5)


def test_mlflow_predicts_on_a_series_and_says_nothing_of_its_patient(place, tmp_path):
    write_dicom_series(linear_volume((30, 26, 12)), np.eye(4), tmp_path / "series")
    answers, printed = predicted(place, [tmp_path / "series"])
    assert len(answers) == 1
    assert not [word for word in PLANTED if word in printed + json.dumps(answers)]


PYTHON_CALL = """
import mlflow, numpy, torch
images = numpy.random.default_rng(1).random((2, 1, 48, 40, 40), dtype="float32")
model = mlflow.pyfunc.load_model("models:/heart@candidate")
features = numpy.stack(model.predict({"image": images})["features"])
program = mlflow.pytorch.load_model("models:/heart@candidate")
with torch.no_grad():
    wanted = program(torch.from_numpy(images))["embedding"].numpy()
assert features.shape == wanted.shape and features.shape[0] == 2
numpy.testing.assert_allclose(features, wanted, atol=1e-5)
example = model.predict(mlflow.models.Model.load("models:/heart@candidate").load_input_example())
assert len(example) == 2
print("equal")
"""


def test_the_program_and_the_weights_answer_alike_without_any_pickle(place):
    done = run(place, [sys.executable, "-W", "error::UserWarning:medssl", "-c", PYTHON_CALL])
    assert done.stdout.endswith("equal\n"), done.stderr


def test_nothing_in_the_model_is_pickled_and_its_packages_are_named(place):
    (folder,) = (place / "mlartifacts" / "models").glob("m-*/artifacts")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pth", ".pt"))]
    assert {"data/model.pt2", "artifacts/checkpoint/backbone.safetensors"} <= names
    packages = (folder / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in packages] == ["medssl", "mlflow", "torch"]
