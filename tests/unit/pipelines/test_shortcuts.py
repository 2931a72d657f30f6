"""The audit finds planted shortcuts, names them, and finds none where there is none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medssl.errors import DataError
from medssl.models.heads import PooledHead
from medssl.pipelines import shortcuts
from medssl.pipelines.pretrain import PretrainConfig
from medssl.pipelines.pretraining import Pretraining, PretrainSection
from medssl.pipelines.sections import SamplingConfig
from medssl.pipelines.shortcuts import Audit, audit_task, facts_of
from medssl.pretext.base import ClassificationTask, PretextBatch, PretextConfig, PretextTask
from medssl.pretext.rotation import Config as RotationConfig
from medssl.pretext.rotation import Rotation
from medssl.reports.shortcuts import NO_SHORTCUT, NOT_JUDGED, REFERENCE, SHORTCUT, UNDECIDED
from medssl.scans.splits import Splits
from medssl.scans.store import Store
from medssl.transforms.sampling import SampleRequest
from stores import make_store
from training import CPU, SETTINGS, blobs, configured, tiny_backbone

SPLITS = Splits(0, ("a", "b", "c", "d"), ("e", "f"), ("g",))


class TaskConfig(PretextConfig):
    """Configuration of the tasks that these tests make up."""

    name: str = "made_up"


class MadeUp(ClassificationTask):
    """A task of a few classes whose puzzles a subclass makes."""

    num_classes = 2

    def __init__(self) -> None:
        super().__init__(TaskConfig(), 2)
        self.chance_level = 1 / self.num_classes
        self.healthy_range = (0.6, 0.99)

    def change(self, images: Tensor, label: Tensor) -> Tensor:
        raise NotImplementedError

    def make_batch(self, images: Tensor, generator: torch.Generator) -> PretextBatch:
        order = torch.rand(len(images), generator=generator).argsort()
        target = order % self.num_classes
        inputs = self.change(images.clone(), target.reshape(-1, 1, 1, 1))
        return PretextBatch(inputs, target, self.name)

    def build_head(self, backbone: Any) -> nn.Module:
        return PooledHead(backbone.stages[-1].channels, self.num_classes)

    def panels(self, batch: PretextBatch, output: Any | None) -> list[Any]:
        return []


class WrittenIntoTheBorder(MadeUp):
    """Writes the answer into the outer voxels of the puzzle."""

    def change(self, images: Tensor, label: Tensor) -> Tensor:
        inner = images[:, :, 1:-1, 1:-1].clone()
        images = label.float().expand_as(images).clone()
        images[:, :, 1:-1, 1:-1] = inner
        return images


class Brighter(MadeUp):
    """Makes the images of one class brighter: told by their mean alone."""

    def change(self, images: Tensor, label: Tensor) -> Tensor:
        return 0.3 * images + 0.6 * label


class SwappedInside(MadeUp):
    """Swaps neighbouring columns inside: told by detail alone, as blocks keep what they hold."""

    def change(self, images: Tensor, label: Tensor) -> Tensor:
        inner = images[:, :, 2:-2, 2:-2].unflatten(2, (-1, 2))
        changed = images.clone()
        changed[:, :, 2:-2, 2:-2] = inner.flip(3).flatten(2, 3)
        return torch.where(label > 0, changed, images)


class OfAir(Brighter):
    """Counts no puzzle."""

    def make_batch(self, images: Tensor, generator: torch.Generator) -> PretextBatch:
        batch = super().make_batch(images, generator)
        batch.extras["weight"] = torch.zeros(len(images))
        return batch


class Padded(Rotation):
    """Turns crops that are padded: the zeros turn with them."""

    def request(self, base: SampleRequest) -> SampleRequest:
        return base


@dataclass(frozen=True)
class Job(Pretraining):
    """A pretraining of a task that no registry knows."""

    made_up: PretextTask | None = None

    def task(self) -> PretextTask:
        return self.made_up or super().task()


def job(task: PretextTask | None = None, name: str = "rotation", **training: Any) -> Job:
    """Return a pretraining on 2D crops, of a made-up task or of one by name."""
    backbone = tiny_backbone(2).config
    sections = configured(global_batch_size=8, learning_rate=3e-3, **{"steps": 20, **training})
    section = PretrainSection.model_validate({"training": sections.model_dump()})
    data = {
        "backbone": backbone.model_dump(), "init": "random", "pretext": SETTINGS[name],
    }  # fmt: skip
    config = PretrainConfig.model_validate(
        {"index": ".", "preprocessing": {}, "sampling": {"crop_size": [16, 16]}, **data,
         "training": sections.model_dump()}
    )  # fmt: skip
    return Job(
        "backbone", config.backbone, config.init, config.pretext, section,
        SamplingConfig(crop_size=(16, 16), plane="axial", min_foreground=0.0), 3, CPU, made_up=task,
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Seven scans of blobs; not to be changed."""
    return make_store(tmp_path_factory.mktemp("blobs"), blobs(7))


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Seven scans whose neighbouring columns differ, on a slope: its darkest rows pass for air."""
    scans = {}
    for number, letter in enumerate("abcdefg"):
        volume = np.full((20, 20, 8), 0.2) + 0.02 * number
        volume += 0.03 * np.arange(20)[:, np.newaxis]
        volume[1::2] += 0.1
        scans[f"{letter}1"] = volume
    return make_store(tmp_path_factory.mktemp("stripes"), scans)


def audited(store: Store, task: PretextTask | None = None, **settings: Any) -> Audit:
    """Return the audit of a task, on few puzzles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shortcuts, "MIN_PUZZLES", 96)
        return audit_task("it", job(task, **settings), store, SPLITS)


@pytest.fixture(scope="module")
def leaking(store: Store) -> Audit:
    """The audit of a task that writes its answer into the border."""
    return audited(store, WrittenIntoTheBorder())


def test_an_answer_in_the_border_is_found_and_named(leaking: Audit):
    verdicts = leaking.verdicts()
    assert verdicts["everything"] == REFERENCE
    assert verdicts["border"] == SHORTCUT
    assert any(
        note.startswith("border (the outer 2 voxels, 44% of a view): take crops")
        for note in leaking.notes
    )


def test_a_task_that_writes_its_answer_into_constant_scans_is_found(leaking: Audit):
    assert leaking.verdicts()["constant"] == SHORTCUT
    assert any("the label reaches the network without any image" in n for n in leaking.notes)


def test_an_answer_in_the_brightness_is_found_by_mean_and_deviation(store: Store):
    audit = audited(store, Brighter())
    assert audit.verdicts()["mean_deviation"] == SHORTCUT
    row = {row.shortcut: row for row in audit.rows}["mean_deviation"]
    assert row.low > row.trivial == 0.5
    assert row.share > 0.5


def test_a_task_of_detail_has_no_shortcut(stripes: Store):
    audit = audited(stripes, SwappedInside(), steps=40)
    verdicts = audit.verdicts()
    assert audit.rows[0].value > 0.8  # the whole puzzle was learnt
    assert verdicts.pop("everything") == REFERENCE
    assert set(verdicts.values()) == {NO_SHORTCUT}
    assert len(audit.notes) == 1  # on intervals


def test_padding_that_turns_with_the_image_is_found_on_constant_scans(tmp_path: Path):
    flat = {key: volume[:, :8] for key, volume in blobs(7).items()}
    padded = Padded(RotationConfig(views=4), 2)
    audit = audited(make_store(tmp_path, flat), padded)
    assert audit.verdicts()["constant"] == SHORTCUT
    honest = audited(make_store(tmp_path / "whole", blobs(7)), steps=10)
    assert honest.verdicts()["constant"] == NO_SHORTCUT


def test_constant_scans_stay_at_chance(store: Store):
    row = audited(store, steps=8).rows[-1]
    assert row.shortcut == "constant"
    assert row.value == pytest.approx(0.25, abs=0.1)
    assert row.verdict == NO_SHORTCUT


def test_a_constant_store_has_the_shapes_of_the_real_one(store: Store):
    constant = shortcuts._ConstantStore(store)
    key = store.scan_keys[0]
    region = (slice(2, 9), slice(0, 5), slice(3, 4))
    for part in (None, region):
        real, seen = store.read(key, part), constant.read(key, part)
        assert seen.shape == real.shape
        assert seen.dtype == real.dtype
        assert np.unique(seen).tolist() == [0.5]


def test_nothing_is_judged_where_the_task_itself_is_not_learnt(tmp_path: Path):
    noise = np.random.default_rng(0)
    scans = {f"{letter}1": noise.random((20, 20, 8)) for letter in "abcdefg"}
    audit = audited(make_store(tmp_path, scans), steps=2)
    assert audit.verdicts()["border"] == UNDECIDED
    assert math.isnan(audit.rows[0].share)
    assert any("was not learnt in these steps" in note for note in audit.notes)


def test_a_task_that_restores_is_shown_beside_its_trivial_answer(store: Store):
    audit = audited(store, name="inpainting", steps=8)
    assert [row.shortcut for row in audit.rows] == ["everything", "thumbnail", "constant"]
    for row in audit.rows:
        assert row.metric == "masked_l1"
        assert row.low < row.value < row.high
    assert audit.rows[0].trivial > 0.01
    assert audit.rows[-1].trivial == pytest.approx(0, abs=1e-3)
    assert audit.rows[-1].verdict == NOT_JUDGED
    assert "Student's t" in audit.notes[0]


def test_an_audit_is_the_same_twice(store: Store):
    first, second = (facts_of([audited(store, steps=3)]) for _ in range(2))
    assert first == second


def test_puzzles_none_of_which_counts_are_refused(store: Store):
    with pytest.raises(DataError, match=r"pretext made_up: none of \d+ puzzles of validation"):
        audited(store, OfAir(), steps=1)


def test_no_validation_patient_is_refused(store: Store):
    with pytest.raises(DataError, match="there are no scans to sample for 'validation'"):
        audit_task("it", job(), store, Splits(0, ("a",), (), ()))


def test_patients_held_out_take_no_part_in_training(store: Store, monkeypatch: pytest.MonkeyPatch):
    seen: set[str] = set()
    train = shortcuts.train

    def spy(state: Any, task: Any, sampler: Any, *rest: Any, **named: Any) -> None:
        seen.update(sampler.scan_keys)
        train(state, task, sampler, *rest, **named)

    monkeypatch.setattr(shortcuts, "train", spy)
    audited(store, steps=1)
    assert seen == {"a1", "b1", "c1", "d1"}


def test_a_silhouette_is_taken_of_images_as_prepared(store: Store, monkeypatch):
    asked: list[Any] = []
    train = shortcuts.train

    def spy(*arguments: Any, augmentation: Any, **named: Any) -> None:
        asked.append(augmentation)
        train(*arguments, augmentation=augmentation, **named)

    monkeypatch.setattr(shortcuts, "train", spy)
    audited(store, steps=1)
    assert [config.brightness > 0 for config in asked] == [True, True, False, True, True, True]


def test_a_probe_is_scored_with_means_that_fit_its_weights(store: Store):
    """One step moves the running means of batch norm a tenth of the way: they are taken anew."""
    samplers = shortcuts._samplers(job(), store, SPLITS)
    probe = shortcuts.ShortcutOnly(job().task(), shortcuts.EVERYTHING)
    network = shortcuts.build_network(tiny_backbone(2), probe, seed=0)
    norm = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    means: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, inputs: means.append(inputs[0].mean((0, 2, 3))))
    shortcuts._settle(job(), probe, network, samplers.pool, configured(global_batch_size=8))
    assert len(means) == 10
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))


def test_progress_runs_to_the_end_of_every_probe(store: Store):
    told: list[tuple[Any, ...]] = []
    audit_task("it", job(steps=3), store, SPLITS, steps=2, progress=lambda *args: told.append(args))
    ends = [args[0] for args in told if args[1] == args[2] == 2]
    assert ends == [f"it: {name}" for name in (
        "everything", "border", "body_mask", "mean_deviation", "thumbnail", "constant"
    )]  # fmt: skip


def test_a_probe_takes_the_configs_steps_up_to_two_hundred_and_its_schedule_cut():
    long = job(steps=1000, warmup_steps=100, frozen_steps=50)
    cut = shortcuts._training(long, None)
    assert (cut.steps, cut.warmup_steps, cut.frozen_steps) == (200, 20, 10)
    assert shortcuts._training(job(steps=30), None).steps == 30
    assert shortcuts._training(job(steps=30, warmup_steps=3), 60).warmup_steps == 3
