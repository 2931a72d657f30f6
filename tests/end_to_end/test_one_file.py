"""A new task is one new file: nothing else in the package is edited."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from samples import PATIENT_ID
from studies import ROOT, environment, medssl, settings, write_archive, write_config

pytestmark = pytest.mark.timeout(600)

NUM_PATIENTS = 8

# Predicts whether a number in a table (an age, a volume, a blood value) lies above a limit.
THRESHOLD = '''"""Threshold: whether a number in a table lies above a limit."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.downstream.base import DownstreamBatch, DownstreamConfig, DownstreamTask
from medssl.models.backbones.base import Backbone
from medssl.models.heads import PooledHead
from medssl.scans.index import Index
from medssl.scans.labels import read_label_table
from medssl.transforms.sampling import Sample


class Config(DownstreamConfig):
    """Configuration of the threshold task."""

    name: Literal["threshold"] = "threshold"
    table: Path
    by: Literal["scan", "series", "patient"] = "patient"
    id_column: str
    value_column: str
    above: float


class Threshold(DownstreamTask):
    """Tell whether the number of a scan lies above the limit."""

    kind = "classification"
    metric = "auc"
    dense = False
    num_outputs = 2

    def __init__(self, config: Config, spatial_dims: int, index: Index) -> None:
        super().__init__(config, spatial_dims, index)
        values = read_label_table(
            index, config.table, by=config.by, id_column=config.id_column,
            label_column=config.value_column,
        )
        self.classes = (f"up to {config.above:g}", f"above {config.above:g}")
        self.targets = {key: float(float(value) > config.above) for key, value in values.items()}

    def build_head(self, backbone: Backbone) -> nn.Module:
        return PooledHead(backbone.embedding_channels, self.num_outputs)

    def batch_of(self, sample: Sample, generator: torch.Generator) -> DownstreamBatch:
        target = torch.tensor([int(self.targets[key]) for key in sample.scan_keys])
        return DownstreamBatch(sample.images, target.to(sample.images.device))

    def forward(self, backbone: Backbone, head: nn.Module, batch: DownstreamBatch) -> Tensor:
        return head(backbone.embed(batch.inputs))

    def loss(self, output: Tensor, batch: DownstreamBatch) -> Tensor:
        return functional.cross_entropy(output.float(), batch.target)

    def metrics(self, output: Tensor, batch: DownstreamBatch) -> dict[str, Tensor]:
        return {"accuracy": (output.argmax(1) == batch.target).float().mean()}

    def case_scores(self, logits: Tensor, masks: Tensor | None) -> list[float]:
        return logits.float().softmax(1).mean(0).tolist()
'''


def documented_task() -> str:
    """Return the pretext task that CONTRIBUTING.md works through."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    section = page.split("## Add a pretext task in one file")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy package and tests, and add the two files."""
    place = tmp_path_factory.mktemp("one_file") / "checkout"
    for folder in ("medssl", "tests"):
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    (place / "medssl" / "pretext" / "corner.py").write_text(documented_task())
    (place / "medssl" / "downstream" / "threshold.py").write_text(THRESHOLD)
    return place


def test_the_copy_is_what_runs(checkout: Path, tmp_path: Path):
    """The installed package must not win over the copy, or the tests below would prove nothing."""
    where = subprocess.run(
        [sys.executable, "-c", "import medssl; print(medssl.__file__)"],
        cwd=tmp_path, env=environment(PYTHONPATH=str(checkout)), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(checkout)


def test_the_documented_file_meets_the_projects_own_style(checkout: Path):
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "medssl/pretext/corner.py"],
        cwd=checkout, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(("kind", "name"), [("pretext", "corner"), ("downstream", "threshold")])
def test_the_command_line_names_it(checkout: Path, tmp_path: Path, kind: str, name: str):
    with_it = medssl("list", kind, "--json", cwd=tmp_path, PYTHONPATH=str(checkout))
    assert with_it.returncode == 0, with_it.stderr
    assert name in json.loads(with_it.stdout)
    without = medssl("list", kind, "--json", cwd=tmp_path)
    assert name not in json.loads(without.stdout)


@pytest.mark.slow
def test_a_study_with_both_ends_in_a_report_that_shows_them(checkout: Path, tmp_path: Path):
    archive = write_archive(tmp_path / "archive", NUM_PATIENTS)
    rows = [f"{PATIENT_ID}-{number},{40 + 5 * number}" for number in range(NUM_PATIENTS)]
    (archive / "ages.csv").write_text("\n".join(["patient,age", *rows]) + "\n")
    task = {
        "name": "threshold", "table": str(archive / "ages.csv"), "id_column": "patient",
        "value_column": "age", "above": 57.5,
    }  # fmt: skip
    content = settings(
        archive,
        inits={"random": {"init": "random"}, "ours": {"init": "random", "pretext": "corner"}},
        tasks=[task],
        matrix={"labelled_patients": ["all"], "seeds": [0]},
        include_images=True,
        tracking={"mlflow": False},
    )
    config = write_config(tmp_path / "one_file.yaml", content)
    done = medssl("study", config, cwd=tmp_path, PYTHONPATH=str(checkout))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tiny"
    contract = json.loads((run / "checkpoints" / "ours" / "contract.json").read_text())
    assert contract["pretext"] == {"name": "corner"}
    report = re.sub(r"base64,[A-Za-z0-9+/=]+", "", (run / "report.html").read_text())
    assert "corner" in report
    assert "threshold" in report
    assert (run / "figures" / "pretext_ours.png").is_file()
    # The package that lacks the two files says what is wrong.
    refused = medssl("study", config, cwd=tmp_path)
    assert refused.returncode == 2
    assert "there is no pretext task 'corner'" in refused.stderr
    assert "there is no downstream task 'threshold'" in refused.stderr


@pytest.mark.slow
def test_the_contract_tests_check_it(checkout: Path):
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/contracts/test_pretext.py", "-k", "corner", "-q",
         "-p", "no:cacheprovider"],
        cwd=checkout, env=environment(PYTHONPATH=str(checkout)), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed is not None
    assert int(passed[1]) >= 20  # ten claims, in 2D and 3D
