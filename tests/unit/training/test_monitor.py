"""The monitor: at chance, stuck, learning, healthy, suspicious."""

from __future__ import annotations

import json
import math

import pytest
import torch

from medssl.pretext.jigsaw import Config as JigsawConfig
from medssl.pretext.jigsaw import Jigsaw
from medssl.training.monitor import Health, judge, summary
from medssl.training.validation import Scores
from training import pretext_task

ROTATION = pretext_task("rotation", 2)  # chance .25, healthy .5 to .99
INPAINTING = pretext_task("inpainting", 2)


def confusion(accuracy: float, each: int = 100) -> torch.Tensor:
    matrix = torch.full((4, 4), each * (1 - accuracy) / 3)
    return matrix.fill_diagonal_(each * accuracy)


def rotation_health(accuracy: float, step: int, solved: tuple[str, ...] = ()) -> Health:
    scores = Scores({"accuracy": accuracy}, {"": confusion(accuracy)})
    return judge(ROTATION, scores, step, 1000, solved)[""]


@pytest.mark.parametrize(
    ("accuracy", "step", "state"),
    [
        (0.25, 100, "at chance"),
        (0.30, 100, "at chance"),  # within the noise of 400 guesses
        (0.25, 300, "stuck"),
        (0.40, 300, "learning"),
        (0.80, 300, "healthy"),
        (0.995, 300, "suspicious"),
        (0.995, 900, "healthy"),  # late, it may be solved
        (math.nan, 300, "nothing counts"),
    ],
)
def test_the_state_follows_the_accuracy_and_the_step(accuracy, step, state):
    assert rotation_health(accuracy, step).state == state


def test_what_was_solved_early_stays_suspicious_while_it_is_solved():
    assert rotation_health(0.995, 900, ("",)).state == "suspicious"
    assert rotation_health(0.4, 900, ("",)).state == "learning"


@pytest.mark.parametrize(
    ("error", "state"), [(0.3, "at chance"), (0.15, "learning"), (0.05, "healthy")]
)
def test_restoring_is_judged_by_the_trivial_fill(error, state):
    scores = Scores({"masked_l1": error, "mean_fill_l1": 0.2})
    assert judge(INPAINTING, scores, 100, 1000)[""].state == state


def test_people_are_told_what_to_do():
    assert "lower the difficulty" in str(rotation_health(0.25, 300))
    assert "medssl pretext audit" in str(rotation_health(0.995, 300))
    assert str(rotation_health(0.8, 300)) == "healthy (accuracy 0.8, trivial 0.25)"


def test_the_summary_holds_the_confusion_matrix_by_class():
    scores = Scores({"accuracy": 0.8}, {"": confusion(0.8)})
    part = summary(ROTATION, scores, judge(ROTATION, scores, 100, 1000))["parts"][0]
    assert part["classes"] == ["0°", "90°", "180°", "270°"]
    assert part["confusion"][0][0] == pytest.approx(80)
    assert part["state"] == "healthy"


def test_always_giving_the_commonest_class_is_no_better_than_guessing():
    """Where most puzzles that count have one answer, accuracy beats chance without a look."""
    always = torch.zeros(4, 4)
    always[:, 0] = torch.tensor([210.0, 30, 30, 30])
    scores = Scores({"accuracy": 0.7}, {"": always})
    found = judge(ROTATION, scores, 100, 1000)[""]
    assert found.trivial == pytest.approx(0.7)
    assert found.state == "at chance"


def test_a_score_of_nothing_is_null_and_people_are_told_why():
    scores = Scores({"accuracy": math.nan}, {"": torch.zeros(4, 4)})
    found = summary(ROTATION, scores, judge(ROTATION, scores, 300, 1000))
    assert found["metrics"] == {"accuracy": None}
    (part,) = found["parts"]
    assert (part["state"], part["value"], part["trivial"]) == ("nothing counts", None, None)
    assert "lower pretext.min_foreground" in part["words"]
    json.dumps(found, allow_nan=False)


def test_a_confusion_matrix_too_large_to_look_at_is_left_out():
    task = Jigsaw(JigsawConfig(num_permutations=129), 2)
    scores = Scores({"accuracy": 0.5}, {"": torch.eye(129)})
    (part,) = summary(task, scores, judge(task, scores, 300, 1000))["parts"]
    assert part["confusion"] is None


@pytest.mark.parametrize(
    ("error", "beaten"), [(0.15, True), (0.12, True), (0.1199, False), (0.05, False)]
)
def test_an_answer_without_a_network_that_does_no_worse_is_named(error, beaten):
    scores = Scores({"masked_l1": error, "mean_fill_l1": 0.2})
    baselines = {"biharmonic_fill_l1": 0.12, "biharmonic_fill_psnr": 20.0}
    health = judge(INPAINTING, scores, 100, 1000, baselines=baselines)[""]
    assert health.rivals == {"biharmonic_fill_l1": 0.12}
    assert health.beaten_by == (("biharmonic_fill_l1",) if beaten else ())
    assert ("needs no network" in str(health)) == beaten
    assert "trivial 0.2, biharmonic_fill_l1 0.12)" in str(health)


def test_rivals_of_each_of_several_tasks_are_told_apart():
    task = pretext_task("multi", 2)
    rivals = {f"{name}_{metric}" for name in ("rotation", "inpainting") for metric in ("x", "y")}
    scores = Scores({"rotation_accuracy": 0.8, "inpainting_masked_l1": 0.1})
    baselines = {"inpainting_biharmonic_fill_l1": 0.05, **dict.fromkeys(rivals, 0.0)}
    health = judge(task, scores, 100, 1000, baselines=baselines)
    assert health["rotation_"].rivals == {}
    assert health["inpainting_"].beaten_by == ("biharmonic_fill_l1",)
