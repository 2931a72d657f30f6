"""Pretraining that goes on from other weights: what the contract remembers, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evaluations import make_evaluation
from medssl.config import ComponentConfig, validate_config
from medssl.errors import LeakageError, WeightsError
from medssl.evaluation.protocols.base import Cell
from medssl.models.checkpoints import Contract, lineage, load_contract, read_weights
from medssl.models.inits.checkpoint import Config as CheckpointConfig
from medssl.models.inits.foreign import Config as ForeignConfig
from medssl.pipelines import study as studies_pipeline
from medssl.pipelines.cells import Evaluation
from medssl.pipelines.leakage import overlap_with_pretraining
from medssl.pipelines.pretraining import Pretraining, PretrainSection, pretrain_backbone
from medssl.pipelines.study import StudyConfig
from medssl.pipelines.transfer import (
    checkpoint_digests,
    pretexts_of,
)
from medssl.pretext import PRETEXT_TASKS
from medssl.tracking.base import Tracker, TrackingConfig
from studies import settings

SECTION = validate_config(
    {
        "training": {"steps": 1, "global_batch_size": 2, "validate_every": 1, "log_every": 1},
        "validation_batches": 1,
    },
    PretrainSection,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("continual")


@pytest.fixture(scope="module")
def evaluation(place: Path) -> Evaluation:
    return make_evaluation(place)


def pretrain(
    evaluation: Evaluation, folder: Path, init: ComponentConfig, pretext: dict[str, Any], seed: int
) -> Path:
    task = PRETEXT_TASKS.config_class(pretext["name"]).model_validate(pretext)
    job = Pretraining(
        folder.name, evaluation.backbone, init, task, SECTION, evaluation.sampling, seed,
        torch.device("cpu"),
    )  # fmt: skip
    with (
        Tracker(folder.parent / f"run-{folder.name}", TrackingConfig(mlflow=False)) as tracker,
        tracker.run("pretrain") as handle,
    ):
        pretrain_backbone(
            job, evaluation.index, evaluation.store, evaluation.splits, folder, handle,
            lambda *_: None, None,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def chain(place: Path, evaluation: Evaluation) -> tuple[Path, Path]:
    """Return two checkpoints: random → rotation, and rotation gone on with by inpainting."""
    first = pretrain(
        evaluation, place / "first", ComponentConfig(name="random"), {"name": "rotation"}, 1
    )
    second = pretrain(
        evaluation, place / "second", CheckpointConfig(path=first),
        {"name": "inpainting", "block": 4}, 2,
    )  # fmt: skip
    return first, second


def test_the_contract_remembers_every_pretraining_before(chain):
    first, second = map(load_contract, chain)
    assert first.history == ()
    (before,) = second.history
    assert before["pretext"]["name"] == "rotation"
    assert before["init"]["name"] == "random"
    assert before["seed"] == 1
    assert before["weights_sha256"] == second.init["sha256"] == first.weights_sha256
    assert lineage(first) == "random → rotation"
    assert lineage(second) == "random → rotation → inpainting"


def test_the_weights_went_on_from_those_before(chain):
    """One step at a small rate leaves them near; a random start would be far away."""
    first, second = (read_weights(path, load_contract(path)) for path in chain)
    name = "net.layer4.0.conv2.weight"
    assert not torch.equal(first[name], second[name])
    assert float((first[name] - second[name]).norm() / first[name].norm()) < 0.2


def test_patients_of_every_pretraining_stay_recorded(place, evaluation, chain):
    """Also those whom this study knows nothing of, or does not train on."""
    from medssl.models.checkpoints import CONTRACT_FILE, WEIGHTS_FILE

    elsewhere = place / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / WEIGHTS_FILE).write_bytes((chain[0] / WEIGHTS_FILE).read_bytes())
    contract = load_contract(chain[0]).model_copy(update={"patients": ("f" * 16,)})
    (elsewhere / CONTRACT_FILE).write_text(contract.model_dump_json())
    gone_on = pretrain(
        evaluation, place / "gone_on", CheckpointConfig(path=elsewhere), {"name": "rotation"}, 3
    )
    assert load_contract(gone_on).patients == tuple(sorted({*evaluation.splits.train, "f" * 16}))


def test_a_test_patient_two_pretrainings_back_is_found(evaluation, chain, place):
    leaking = leaking_copy(chain[1], place / "leaking", evaluation)
    inits = {"continued": CheckpointConfig(path=leaking)}
    with pytest.raises(LeakageError, match=r"'continued' was pretrained on scans of 1 of the \d+"):
        overlap_with_pretraining(inits, evaluation.splits, allowed=False)
    assert overlap_with_pretraining(inits, evaluation.splits, allowed=True) == 1


def leaking_copy(checkpoint: Path, folder: Path, evaluation: Evaluation) -> Path:
    """Return a copy of a checkpoint that also saw one of the test patients."""
    import shutil

    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    contract = load_contract(folder)
    patients = (*contract.patients, evaluation.splits.test[0])
    leaking: Contract = contract.model_copy(update={"patients": patients})
    (folder / "contract.json").write_text(leaking.model_dump_json())
    return folder


def test_a_study_refuses_such_a_start_before_it_pretrains(
    evaluation, chain, place, tmp_path, monkeypatch
):
    leaking = leaking_copy(chain[0], tmp_path / "leaking", evaluation)
    content = settings(
        place / "archive",
        inits={
            "random": {"init": "random"},
            "continued": {
                "init": {"name": "checkpoint", "path": str(leaking)}, "pretext": "rotation",
            },
        },
        tracking={"mlflow": False},
    )  # fmt: skip
    config = validate_config(content, StudyConfig)
    gathered = (evaluation.index, evaluation.tasks, evaluation.splits, evaluation.store)
    monkeypatch.setattr(studies_pipeline, "gather", lambda *_: gathered)
    monkeypatch.setattr(
        studies_pipeline, "pretrain_backbone", lambda *_: pytest.fail("it pretrained")
    )
    with pytest.raises(LeakageError, match="'continued' was pretrained on scans of 1 of the"):
        studies_pipeline.run(config, tmp_path / "run")


def test_the_matrix_takes_the_chain_as_an_init_of_its_own(evaluation, chain):
    inits = {
        "random": ComponentConfig(name="random"),
        "first": CheckpointConfig(path=chain[0]),
        "second": CheckpointConfig(path=chain[1]),
    }
    both = dataclasses.replace(evaluation, inits=inits, pretexts=pretexts_of(inits))
    assert both.pretexts == {"random": "", "first": "rotation", "second": "inpainting"}
    cells: list[Cell] = both.cells()
    assert {cell.init for cell in cells} == set(inits)
    reports = {label: both.new_backbone(label, seed=0)[1] for label in inits}
    assert reports["first"].source == "checkpoint 'first' (random → rotation)"
    assert reports["second"].source == ("checkpoint 'second' (random → rotation → inpainting)")
    digests = checkpoint_digests(inits)
    assert digests["checkpoint first"] != digests["checkpoint second"]


def test_a_file_of_weights_that_states_no_hash_is_pinned_all_the_same(tmp_path):
    file = tmp_path / "weights.pt"
    file.write_bytes(b"before")
    inits = {"theirs": ForeignConfig(path=file), "random": ComponentConfig(name="random")}
    before = checkpoint_digests(inits)
    assert set(before) == {"weights theirs"}
    file.write_bytes(b"after")
    assert checkpoint_digests(inits) != before


def test_the_report_shows_where_each_init_came_from(evaluation, chain):
    from medssl.reports.facts import init_rows

    both = dataclasses.replace(evaluation, inits={"second": CheckpointConfig(path=chain[1])})
    _, report = both.new_backbone("second", seed=0)
    contents = SimpleNamespace(provenance={"inits": {"second": report.to_dict()}})
    (row,) = init_rows(contents)  # type: ignore[arg-type]
    assert row["source"] == "checkpoint 'second' (random → rotation → inpainting)"


def test_scans_prepared_otherwise_are_refused_as_a_place_to_go_on(place, evaluation, chain):
    contract = load_contract(chain[0]).model_copy(update={"orientation": "LPS"})
    other = place / "other_orientation"
    other.mkdir()
    for name, content in (
        ("backbone.safetensors", (chain[0] / "backbone.safetensors").read_bytes()),
        ("contract.json", contract.model_dump_json().encode()),
    ):
        (other / name).write_bytes(content)
    with pytest.raises(WeightsError, match='orientation: found "LPS", wanted "RAS"'):
        pretrain(evaluation, place / "never", CheckpointConfig(path=other), {"name": "rotation"}, 4)
    assert not (place / "never" / "contract.json").exists()
