"""Fine-tuning: nothing but the backbone differs between inits; validation chooses the step."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medssl.evaluation.protocols import fine_tune
from medssl.evaluation.protocols.base import Cell, Setting
from medssl.evaluation.protocols.fine_tune import Config, FineTune, predict
from medssl.models.decoders import UNetDecoder
from medssl.pipelines.cells import Evaluation
from medssl.training.settings import TrainingConfig
from training import tiny_backbone

TASKS = ["classification", "segmentation"]


def protocol(
    learning_rates: tuple[float, ...] = (), patience: int | None = None, **training: Any
) -> FineTune:
    settings = TrainingConfig(**{"steps": 4, "global_batch_size": 3, "log_every": 1, **training})
    return FineTune(
        Config(
            training=settings, validation_slices=2, learning_rates=learning_rates, patience=patience
        )
    )


def cell_of(evaluation: Evaluation, task: str, init: str = "random", number: int = 2) -> Cell:
    return next(
        cell for cell in evaluation.cells()
        if (cell.task, cell.init, cell.num_labelled_patients) == (task, init, number)
    )  # fmt: skip


def silent(step: int, metrics: dict[str, float]) -> None:
    """Ignore what is logged."""


class Recorder:
    """Takes the place of the loop: keeps what it is given, and trains nothing."""

    def __init__(self) -> None:
        self.head: dict[str, Tensor] = {}
        self.backbone: dict[str, Tensor] = {}
        self.batches: list[Any] = []
        self.recipe: Any = None

    def __call__(self, state: Any, task: Any, sampler: Any, config: Any, **options: Any) -> None:
        self.head = {k: v.clone() for k, v in state.network.head.state_dict().items()}
        self.backbone = {k: v.clone() for k, v in state.network.backbone.state_dict().items()}
        self.batches = [sampler.batch(step, config.global_batch_size) for step in range(3)]
        self.recipe = (config, options["seed"], options["augmentation"])


def recorded(
    evaluation: Evaluation, cell: Cell, seed_of_weights: int, monkeypatch: pytest.MonkeyPatch
) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(fine_tune, "train", recorder)
    setting = evaluation.setting(cell.task, cell.init)
    setting.new_backbone = lambda seed: tiny_backbone(2, seed_of_weights)
    protocol().run(cell, setting, silent)
    return recorder


def test_validation_patients_who_cannot_choose_are_warned_of(
    evaluation: Evaluation, caplog: pytest.LogCaptureFixture
):
    setting = evaluation.setting("classification", "random")
    setting.score = lambda scan_keys, scores: math.nan  # type: ignore[method-assign]
    protocol((1e-3, 1e-2), steps=1).run(cell_of(evaluation, "classification"), setting, silent)
    assert caplog.messages[-1].startswith("the score of validation patients is undefined")


@pytest.mark.parametrize("task", TASKS)
def test_every_init_gets_the_same_head_batches_and_recipe(
    evaluation: Evaluation, task: str, monkeypatch: pytest.MonkeyPatch
):
    first = recorded(evaluation, cell_of(evaluation, task, "random"), 1, monkeypatch)
    second = recorded(evaluation, cell_of(evaluation, task, "other"), 2, monkeypatch)
    assert any(not torch.equal(first.backbone[k], second.backbone[k]) for k in first.backbone)
    assert all(torch.equal(first.head[name], second.head[name]) for name in first.head)
    for ours, theirs in zip(first.batches, second.batches, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert ours.scan_keys == theirs.scan_keys
    assert first.recipe == second.recipe


def test_the_head_starts_from_the_decoder_that_an_init_brings(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
):
    def drawn(decoder: UNetDecoder) -> str:
        for tensor in decoder.inner_state().values():
            tensor.fill_(0.25)
        return "decoder loaded"

    recorder = Recorder()
    monkeypatch.setattr(fine_tune, "train", recorder)
    for task in TASKS:
        setting = evaluation.setting(task, "random")
        setting.apply_decoder = drawn
        protocol().run(cell_of(evaluation, task), setting, silent)
        quarter = {k for k, v in recorder.head.items() if bool((v == 0.25).all())}
        if task == "segmentation":
            assert {k for k in recorder.head if not k.startswith("out.")} == quarter
            assert setting.report["decoder"] == "decoder loaded"
            assert setting.report_text.endswith("; decoder loaded")
        else:
            assert not quarter
            assert "decoder" not in setting.report


def test_another_seed_gives_another_head_and_other_batches(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
):
    cell = cell_of(evaluation, "classification")
    other = Cell(**{**vars(cell), "seed": 1})
    one, two = (recorded(evaluation, c, 1, monkeypatch) for c in (cell, other))
    assert any(not torch.equal(one.head[name], two.head[name]) for name in one.head)
    assert not torch.equal(one.batches[0].images, two.batches[0].images)


def test_training_sees_labelled_patients_alone(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
):
    cell = cell_of(evaluation, "classification")
    recorder = recorded(evaluation, cell, 1, monkeypatch)
    seen = {key for batch in recorder.batches for key in batch.scan_keys}
    assert seen == set(evaluation.setting(cell.task, cell.init).labelled_scans(cell))


class Scripted:
    """Takes the place of `predict`: gives scripted validation scores, keeps weights and cases."""

    def __init__(self, setting: Setting, good: list[float]) -> None:
        self._setting, self._good = setting, iter(good)
        self.weights: list[Tensor] = []
        self.asked: list[tuple[set[str], int | None]] = []

    def __call__(
        self, network: Any, setting: Setting, scan_keys: Any, max_slices: int | None
    ) -> list[list[float]]:
        self.weights.append(next(network.head.parameters()).detach().clone())
        self.asked.append((set(scan_keys), max_slices))
        share = next(self._good)
        right = [int(setting.task.targets[key][0]) for key in scan_keys]
        return [[share, 1 - share] if target == 0 else [1 - share, share] for target in right]


@pytest.mark.parametrize(
    ("scores", "best"),
    [([0.9, 0.1, 0.1, 0.1], 0), ([0.1, 0.1, 0.9, 0.1], 2), ([0.9, 0.9, 0.9, 0.9], 0)],
)
def test_the_step_is_chosen_on_validation_patients(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch, scores: list[float], best: int
):
    setting = evaluation.setting("classification", "random")
    scripted = Scripted(setting, [*scores, 0.5])
    monkeypatch.setattr(fine_tune, "predict", scripted)
    cell = cell_of(evaluation, "classification")
    protocol(validate_every=1).run(cell, setting, silent)
    *validations, test = scripted.weights
    assert len(validations) == 4
    assert all(not torch.equal(a, b) for a, b in pairwise(validations))
    assert torch.equal(test, validations[best])


def test_validation_looks_at_few_slices_and_the_test_at_whole_scans(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
):
    setting = evaluation.setting("classification", "random")
    scripted = Scripted(setting, [0.5, 0.5])
    monkeypatch.setattr(fine_tune, "predict", scripted)
    protocol().run(cell_of(evaluation, "classification"), setting, silent)
    assert scripted.asked == [
        (set(setting.scans_of(setting.splits.val)), 2),
        (set(setting.scans_of(setting.splits.test)), None),
    ]


@pytest.mark.parametrize("task", TASKS)
def test_a_cell_gives_one_prediction_a_test_scan_and_the_same_again(
    evaluation: Evaluation, task: str
):
    setting, cell, logged = evaluation.setting(task, "random"), cell_of(evaluation, task), []
    first = protocol().run(cell, setting, lambda step, metrics: logged.append((step, metrics)))
    again = protocol().run(cell, evaluation.setting(task, "random"), silent)
    assert [p.scan_key for p in first] == setting.scans_of(setting.splits.test)
    assert all(p.selected and p.layer == "" for p in first)
    np.testing.assert_array_equal([p.scores for p in first], [p.scores for p in again])
    assert {name for _, metrics in logged for name in metrics} >= {"train/loss", "val/score", "lr"}


def test_a_prediction_is_made_without_dropping_or_updating_anything(evaluation: Evaluation):
    setting = evaluation.setting("classification", "random")
    network = fine_tune.build_network(setting.new_backbone(0), setting.task, 0).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    keys = setting.scans_of(setting.splits.test)
    first = predict(network, setting, keys, 3)
    assert first == predict(network, setting, keys, 3)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_same_rates_are_tried_for_every_init_from_the_same_start(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
):
    tried: dict[str, list[tuple[float, Tensor, Any]]] = {}
    for init in ("random", "other"):
        setting = evaluation.setting("classification", init)
        kept = tried.setdefault(init, [])

        def remember(
            state: Any, task: Any, sampler: Any, config: Any, kept: list[Any] = kept, **options: Any
        ) -> None:
            head = next(state.network.head.parameters()).detach().clone()
            kept.append((config.learning_rate, head, (options["seed"], sampler.batch(0, 3))))

        monkeypatch.setattr(fine_tune, "train", remember)
        protocol((1e-3, 1e-2, 1e-4)).run(
            cell_of(evaluation, "classification", init), setting, silent
        )
    assert [rate for rate, *_ in tried["random"]] == [1e-3, 1e-2, 1e-4]
    assert [rate for rate, *_ in tried["other"]] == [1e-3, 1e-2, 1e-4]
    every = [*tried["random"], *tried["other"]]
    assert all(torch.equal(head, every[0][1]) for _, head, _ in every)
    assert len({seed for *_, (seed, _) in every}) == 1
    assert all(torch.equal(batch.images, every[0][2][1].images) for *_, (_, batch) in every)


@pytest.mark.parametrize(
    ("scores", "best"), [([0.1, 0.9, 0.2, 0.3], 1), ([0.1, 0.2, 0.3, 0.9], 3), ([0.9] * 4, 0)]
)
def test_the_rate_is_chosen_on_validation_patients(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch, scores: list[float], best: int
):
    setting = evaluation.setting("classification", "random")
    scripted = Scripted(setting, [*scores, 0.5])
    monkeypatch.setattr(fine_tune, "predict", scripted)
    logged: list[tuple[int, dict[str, float]]] = []
    protocol((1e-3, 1e-2), steps=2, validate_every=1).run(
        cell_of(evaluation, "classification"), setting, lambda *told: logged.append(told)
    )
    *validations, test = scripted.weights
    assert len(validations) == 4
    assert torch.equal(test, validations[best])
    rate = (1e-3, 1e-3, 1e-2, 1e-2)[best]
    assert logged[-1][1]["best_learning_rate"] == rate
    steps = [step for step, metrics in logged if "val/score" in metrics]
    assert steps == [1, 2, 3, 4]  # of one journal


@pytest.mark.parametrize(
    ("scores", "made"),
    [([0.9, 0.1, 0.1, 0.1, 0.1], 3), ([0.1, 0.9, 0.1, 0.95, 0.1], 5), ([0.1, 0.9, 0.9, 0.9], 4)],
)
def test_a_training_ends_when_validation_is_in_vain(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch, scores: list[float], made: int
):
    setting = evaluation.setting("classification", "random")
    # By this metric the scripted share of the right class is the score.
    setting.score = lambda keys, found: found[0][target]  # type: ignore[method-assign]
    target = int(setting.task.targets[setting.scans_of(setting.splits.val)[0]][0])
    scripted = Scripted(setting, [*scores[:made], 0.5])
    monkeypatch.setattr(fine_tune, "predict", scripted)
    protocol(patience=2, steps=5, validate_every=1).run(
        cell_of(evaluation, "classification"), setting, silent
    )
    assert len(scripted.weights) == made + 1


def test_the_backbone_is_frozen_first_and_has_a_rate_of_its_own(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
):
    setting = evaluation.setting("classification", "random")
    seen: list[tuple[Tensor, Tensor]] = []

    def look(network: Any, setting: Setting, keys: Any, max_slices: int | None) -> Any:
        parts = (network.backbone, network.head)
        seen.append(tuple(next(part.parameters()).detach().clone() for part in parts))
        return [[0.5, 0.5] for _ in keys]

    monkeypatch.setattr(fine_tune, "predict", look)
    protocol(steps=4, validate_every=1, frozen_steps=2, backbone_scale=0.1).run(
        cell_of(evaluation, "classification"), setting, silent
    )
    start = next(setting.new_backbone(0).parameters())
    backbones, heads = zip(*seen[:4], strict=True)
    assert [torch.equal(weights, start) for weights in backbones] == [True, True, False, False]
    assert not torch.equal(heads[0], heads[1])
    moved = (backbones[2] - start).abs().max()
    assert 0 < moved <= 0.11 * (heads[2] - heads[1]).abs().max()


def test_patience_needs_validations():
    with pytest.raises(
        ValueError, match="patience counts validations, and training.validate_every"
    ):
        protocol(patience=2)


def test_the_budget_is_told():
    assert protocol().config.budget() == "1 training of 4 steps"
    several = protocol((1e-3, 1e-2), patience=2, validate_every=1)
    assert several.config.budget() == "2 trainings of up to 4 steps"
