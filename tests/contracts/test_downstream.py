"""What every downstream task must do. A new task is tested by existing."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from labelled_scans import NAMES, SETTINGS, build_task, write_folder
from medssl.config import validate_config
from medssl.downstream import DOWNSTREAM_TASKS
from medssl.downstream.base import DownstreamTask
from medssl.errors import ConfigError
from medssl.evaluation.metrics import METRICS, metric_for
from medssl.pipelines.prepare import prepare
from medssl.scans.index import Index
from medssl.scans.store import Store
from medssl.training.network import Network, build_network
from medssl.transforms.cases import CaseReader
from medssl.transforms.preprocessing import PreprocessingConfig
from medssl.transforms.sampling import CropSampler, Sample, SampleRequest
from training import tiny_backbone

CROP = {2: (12, 12), 3: (10, 10, 10)}
every_task = pytest.mark.parametrize("name", DOWNSTREAM_TASKS.names())
DENSE = ("segmentation", "landmarks")
both_dims = pytest.mark.parametrize("dims", [2, 3])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return one folder of labelled scans for each number of dimensions."""
    found = {dims: tmp_path_factory.mktemp(f"scans{dims}d") for dims in (2, 3)}
    for dims, folder in found.items():
        write_folder(folder, dims)
    return found


def stored(task: DownstreamTask, folder: Path) -> Store:
    """Return the prepared scans with what the task keeps beside them."""
    return prepare(
        Index.open(folder / "index"),
        PreprocessingConfig(crop_foreground=False),
        folder / f"store-{task.config.name}",
        masks=type(task).masks(task.config),
    )


def request_of(task: DownstreamTask) -> SampleRequest:
    return task.request(SampleRequest(task.spatial_dims, CROP[task.spatial_dims]))


def sample_of(task: DownstreamTask, folder: Path, size: int = 3) -> Sample:
    store = stored(task, folder)
    return CropSampler(store, sorted(task.targets), request_of(task), 1, "test").batch(0, size)


def trained_on_all(name: str, folder: Path, dims: int) -> DownstreamTask:
    task = build_task(name, folder, dims)
    return task.for_training(sorted(task.targets))


def network_of(task: DownstreamTask) -> Network:
    return build_network(tiny_backbone(task.spatial_dims), task, seed=0)


@every_task
def test_a_key_that_the_config_does_not_know_is_refused(name):
    config = {"name": name, **SETTINGS[name], "no_such_key": 1}
    with pytest.raises(ConfigError, match="no_such_key"):
        validate_config(config, DOWNSTREAM_TASKS.config_class(name))


@every_task
@both_dims
def test_every_labelled_scan_has_a_target_by_its_key(folders, name, dims):
    task = build_task(name, folders[dims], dims)
    accepted = set(Index.open(folders[dims] / "index").accepted["scan_key"])
    assert set(task.targets) == accepted
    assert task.labels.num_labelled == len(NAMES)
    for target in task.targets.values():
        assert all(isinstance(number, float) for number in target)
        if task.answer == "labels":
            assert len(target) == task.num_outputs
            assert all(number in (0, 1) or math.isnan(number) for number in target)
        elif task.answer == "class" and not task.dense:
            assert 0 <= target[0] < task.num_outputs
    for scan_key in task.targets:
        assert task.stratum(scan_key) is None or isinstance(task.stratum(scan_key), int)


@every_task
@both_dims
def test_the_primary_metric_is_one_of_those_there_are(folders, name, dims):
    task = build_task(name, folders[dims], dims)
    assert task.metric in METRICS
    assert metric_for(task.kind).name in METRICS


@every_task
@both_dims
def test_the_network_answers_and_every_backbone_parameter_gets_a_gradient(folders, name, dims):
    task = trained_on_all(name, folders[dims], dims)
    network = network_of(task)
    batch = task.batch_of(sample_of(task, folders[dims]), torch.Generator())
    output = network(batch)
    assert output.shape[:2] == (3, task.num_outputs)
    assert output.shape[2:] == (CROP[dims] if task.dense else ())
    loss = task.loss(output, batch)
    assert loss.ndim == 0
    loss.backward()
    assert [n for n, p in network.backbone.named_parameters() if p.grad is None] == []
    for value in task.metrics(output, batch).values():
        assert value.ndim == 0
        assert torch.isfinite(value)


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        # Decoders in 3D take a quarter of a minute each.
        pytest.param(name, dims, marks=[pytest.mark.slow] if dims == 3 and name in DENSE else [])
        for name in DOWNSTREAM_TASKS.names()
        for dims in (2, 3)
    ],
)
def test_one_batch_can_be_overfitted(folders, name, dims):
    task = trained_on_all(name, folders[dims], dims)
    network = network_of(task)
    batch = task.batch_of(sample_of(task, folders[dims]), torch.Generator())
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss = task.loss(network(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@every_task
@both_dims
def test_bfloat16_gives_a_finite_loss(folders, name, dims):
    task = trained_on_all(name, folders[dims], dims)
    network = network_of(task)
    batch = task.batch_of(sample_of(task, folders[dims]), torch.Generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task.loss(network(batch), batch)
    assert torch.isfinite(loss)


@every_task
@both_dims
def test_a_whole_case_gets_as_many_scores_as_there_are_answers(folders, name, dims):
    task = trained_on_all(name, folders[dims], dims)
    network = network_of(task).eval()
    store = stored(task, folders[dims])
    known = sorted(task.targets)
    for case in CaseReader(store, known[:2], request_of(task)):
        with torch.inference_mode():
            logits = task.infer(network, case.images, CROP[dims])
            scores = task.score_case(logits, case)
        assert len(scores) == len(task.classes)
        assert all(isinstance(score, float) for score in scores)


@every_task
@both_dims
def test_the_digest_changes_with_the_labels_and_with_nothing_else(folders, name, dims):
    task, again = (build_task(name, folders[dims], dims) for _ in range(2))
    assert task.digest == again.digest
    first = min(task.targets)
    again.targets = {**again.targets, first: (*again.targets[first], 7.0)}
    assert task.digest != again.digest


@every_task
@both_dims
def test_a_task_can_be_sent_to_another_process(folders, name, dims):
    task = trained_on_all(name, folders[dims], dims)
    there = pickle.loads(pickle.dumps(task))  # noqa: S301  (just dumped)
    assert there.targets.keys() == task.targets.keys()


@every_task
@both_dims
def test_loss_and_metrics_never_wait_for_the_device(folders, name, dims):
    """A tensor on the meta device has no values: whoever asks for one gets an error."""
    task = trained_on_all(name, folders[dims], dims)
    batch = task.batch_of(sample_of(task, folders[dims]), torch.Generator())
    output = network_of(task)(batch).to("meta")
    nowhere = replace(batch, inputs=batch.inputs.to("meta"), target=batch.target.to("meta"))
    assert task.loss(output, nowhere).ndim == 0
    assert all(value.ndim == 0 for value in task.metrics(output, nowhere).values())
