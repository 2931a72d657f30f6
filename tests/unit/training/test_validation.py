"""Validation puzzles: the same every time, scored without touching the network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medssl.scans.store import Store
from medssl.training.network import build_network
from medssl.training.validation import ValidationPuzzles
from training import CPU, Training, blob_store, configured, pretext_task, tiny_backbone


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return blob_store(tmp_path_factory.mktemp("store"))


def puzzles_of(name: str, store: Store, num_batches: int = 2) -> ValidationPuzzles:
    training = Training(store, pretext_task(name, 2), configured())
    return ValidationPuzzles(
        training.task, training.sampler(), num_batches, training.config, 0, CPU
    )


def test_puzzles_are_the_same_every_time(store: Store):
    puzzles = puzzles_of("jigsaw", store)
    (first,), (second,) = puzzles.batches(1), puzzles.batches(1)
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.target, second.target)
    assert not torch.equal(first.inputs, puzzles.batches(0)[0].inputs)


def test_the_confusion_matrix_counts_the_puzzles_of_all_batches(store: Store):
    puzzles = puzzles_of("rotation", store, num_batches=3)
    network = build_network(tiny_backbone(2), puzzles.task, seed=0)
    scores = puzzles.score(network)
    confusion = scores.confusions[""]
    assert confusion.sum() == 3 * 4 * 2  # batches, images, views
    accuracy = float(confusion.diagonal().sum() / confusion.sum())
    assert scores.metrics["accuracy"] == pytest.approx(accuracy)


def test_scoring_leaves_weights_and_gradients_as_they_are(store: Store):
    puzzles = puzzles_of("multi", store)
    network = build_network(tiny_backbone(2), puzzles.task, seed=0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    puzzles.score(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())


def test_several_tasks_are_each_scored_and_their_gradients_compared(store: Store):
    puzzles = puzzles_of("multi", store)
    scores = puzzles.score(build_network(tiny_backbone(2), puzzles.task, seed=0))
    assert {"rotation_accuracy", "inpainting_masked_l1"} <= scores.metrics.keys()
    assert -1 <= scores.metrics["gradient_cosine_rotation_inpainting"] <= 1
    assert set(scores.confusions) == {"rotation_"}


def test_answers_that_need_no_network_are_scored_too(store: Store):
    found = puzzles_of("inpainting", store).baselines()
    assert found["biharmonic_fill_l1"] > 0


def test_examples_come_with_answers(store: Store, tmp_path: Path):
    puzzles = puzzles_of("multi", store)
    network = build_network(tiny_backbone(2), puzzles.task, seed=0)
    assert [batch.task for batch, _ in puzzles.examples(network)] == ["rotation", "inpainting"]


def test_scores_are_taken_in_full_precision(store: Store, monkeypatch: pytest.MonkeyPatch):
    training = Training(store, pretext_task("inpainting", 2), configured(precision="bf16"))
    puzzles = ValidationPuzzles(training.task, training.sampler(), 1, training.config, 0, CPU)
    seen: list[bool] = []
    metrics = type(training.task).metrics

    def watched(task: object, output: object, batch: object) -> object:
        seen.append(torch.is_autocast_enabled("cpu"))
        return metrics(task, output, batch)

    monkeypatch.setattr(type(training.task), "metrics", watched)
    puzzles.score(build_network(tiny_backbone(2), training.task, seed=0))
    assert seen == [False]


def test_the_network_and_what_needs_none_meet_the_same_puzzles(store: Store):
    """A small validation is filled whole, so that the two numbers can be compared."""
    puzzles = puzzles_of("inpainting", store, num_batches=3)
    found = puzzles.baselines()["biharmonic_fill_l1"]
    each = [puzzles.task.baselines(batch) for n in range(3) for batch in puzzles.batches(n)]
    assert found == pytest.approx(sum(one["biharmonic_fill_l1"] for one in each) / 3, rel=1e-5)


def test_slow_baselines_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch):
    puzzles, asked = puzzles_of("inpainting", store, num_batches=3), []
    monkeypatch.setattr("medssl.training.validation.BASELINE_VOXELS", 1)
    monkeypatch.setattr(type(puzzles.task), "baselines", lambda *_: asked.append(1) or {})
    assert puzzles.baselines() == {}
    assert len(asked) == 1
