"""Low shot: the draws, which no init and no label fraction changes, and how they are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from medssl.errors import LabelError
from medssl.evaluation.matrix import collect, write_cell
from medssl.evaluation.protocols.base import Cell
from medssl.evaluation.protocols.low_shot import Config, LowShot, draw
from medssl.pipelines.cells import Evaluation


def cell_of(evaluation: Evaluation, init: str = "random") -> Cell:
    return Cell("classification", init, "low_shot", len(evaluation.splits.train), 1.0, 0)


def test_a_draw_takes_one_scan_of_each_training_patient_under_its_class(evaluation: Evaluation):
    setting = evaluation.setting("classification", "random")
    order = draw(setting, 0)
    owners = [setting.store.entry(key).patient_key for scans in order for key in scans]
    assert sorted(owners) == sorted(setting.splits.train)
    for label, scans in enumerate(order):
        assert {setting.task.targets[key] for key in scans} == {(float(label),)}


def test_draws_differ_and_are_the_same_for_every_init(evaluation: Evaluation):
    one, other = (evaluation.setting("classification", init) for init in ("random", "other"))
    assert [draw(one, sample) for sample in range(5)] == [
        draw(other, sample) for sample in range(5)
    ]
    assert len({str(draw(one, sample)) for sample in range(5)}) > 1


def test_every_size_is_learnt_from_every_draw(evaluation: Evaluation, tmp_path: Path):
    setting = evaluation.setting("classification", "random")
    told: list[tuple[int, dict[str, float]]] = []
    protocol = LowShot(Config(num_samples=3, max_slices=2))
    cell = cell_of(evaluation)
    predictions = protocol.run(cell, setting, lambda *given: told.append(given))
    write_cell(tmp_path, cell, predictions, setting, pretext="", backbone="monai")
    table = collect(tmp_path, [cell])
    assert set(table["seed"]) == {0, 1, 2}
    most = min(len(scans) for scans in draw(setting, 0))
    sizes = [k for k in (1, 2, 4, 8) if k <= most]
    assert set(table["num_labelled_patients"]) == {2 * size for size in sizes}
    shares = table["num_labelled_patients"] / len(setting.splits.train)
    assert list(table["label_fraction"]) == list(shares)
    selected = table[table["selected"]].groupby(["seed", "num_labelled_patients"])["scan_key"]
    assert set(selected.count()) == {len(setting.scans_of(setting.splits.test))}
    assert {step for step, _ in told} == set(sizes)
    assert told[0][1].keys() == {"val/score_of_draw_0"}


def test_sizes_above_the_rarest_class_are_left_out_and_none_is_an_error(evaluation: Evaluation):
    setting = evaluation.setting("classification", "random")
    with pytest.raises(LabelError) as refused:
        LowShot(Config(scans_per_class=(50,))).run(cell_of(evaluation), setting, lambda *_: None)
    most = min(len(scans) for scans in draw(setting, 0))
    assert str(refused.value).endswith(
        f"of task 'classification' has {most} training patients, and 50 are asked for. Lower "
        "scans_per_class, or leave low_shot out."
    )


def test_a_seeded_init_is_another_one_in_every_draw(evaluation: Evaluation):
    setting = evaluation.setting("classification", "random")
    built: list[int] = []
    new_backbone = setting.new_backbone
    setting.new_backbone = lambda seed: built.append(seed) or new_backbone(seed)
    LowShot(Config(num_samples=2, scans_per_class=(1,))).run(
        cell_of(evaluation), setting, lambda *_: None
    )
    assert built == [0, 1]


def test_numbers_of_scans_are_positive():
    with pytest.raises(ValueError, match="scans_per_class must be 1 or more"):
        Config(scans_per_class=(0,))
