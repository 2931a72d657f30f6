from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from medssl.reports.contents import Contents, read_contents
from medssl.reports.tables import (
    headline,
    p_text,
    signed,
    title,
    verdict_lines,
    verdicts,
)


def contents(
    comparisons: list[dict[str, Any]], results: list[dict[str, Any]] | None = None
) -> Contents:
    shared = {
        "reference": "imagenet",
        "task": "hippocampus",
        "protocol": "fine_tune",
        "label_fraction": 0.04,
        "num_labelled_patients": 3,
        "metric": "dice",
        "ci_low": 0.008,
        "ci_high": 0.034,
        "num_seeds": 2,
        "num_patients": 45,
    }
    table = pd.DataFrame([{**shared, "pretext": row["init"], **row} for row in comparisons])
    return Contents(
        Path("hippocampus"), {}, "", pd.DataFrame(results or []), table, pd.DataFrame(), {}, {}, []
    )


BETTER = {"init": "inpainting", "effect": 0.021, "verdict": "better"}
UNCLEAR = {
    "init": "rotation", "effect": 0.004, "ci_low": -0.008, "ci_high": 0.016,
    "verdict": "no difference shown",
}  # fmt: skip
WORSE = {
    "init": "jigsaw", "effect": -0.02, "ci_low": -0.03, "ci_high": -0.01, "verdict": "worse",
}  # fmt: skip
RANDOM = {"init": "random", "pretext": "", "effect": -0.05, "verdict": "worse"}


def sentence(*rows: dict[str, Any]) -> str:
    (verdict,) = verdicts(contents(list(rows)))
    return verdict.sentence


def test_a_gain_is_said_with_its_size_and_interval() -> None:
    assert sentence(BETTER, RANDOM) == (
        "With 3 labelled patients, inpainting beats ImageNet by +0.021 Dice "
        "(95 % CI +0.008 to +0.034)."
    )


def test_a_loss_is_said_as_plainly_as_a_gain() -> None:
    assert sentence(WORSE) == (
        "With 3 labelled patients, jigsaw is worse than ImageNet by 0.020 Dice "
        "(95 % CI −0.030 to −0.010)."
    )


def test_no_difference_is_said_with_what_remains_possible() -> None:
    assert sentence(UNCLEAR) == (
        "With 3 labelled patients, no difference from ImageNet is shown for rotation "
        "(+0.004 Dice, 95 % CI −0.008 to +0.016)."
    )


def test_mixed_outcomes_are_called_mixed() -> None:
    (verdict,) = verdicts(contents([WORSE, BETTER, UNCLEAR]))
    assert verdict.outcome == "mixed"
    assert "inpainting beats ImageNet" in verdict.sentence
    assert "; jigsaw is worse by 0.020 Dice" in verdict.sentence
    assert "; no difference is shown for rotation" in verdict.sentence


def test_one_labelled_patient_is_not_patients() -> None:
    assert sentence({**BETTER, "num_labelled_patients": 1}).startswith("With 1 labelled patient,")


@pytest.mark.parametrize(
    ("rows", "start"),
    [
        ([BETTER], "Yes, in the one comparison"),
        ([WORSE, RANDOM], "No, in the one comparison"),
        ([UNCLEAR], "Not shown, in the one comparison"),
        ([BETTER, {**BETTER, "init": "jigsaw"}], "Yes, always. Of 2 comparisons"),
        ([BETTER, UNCLEAR], "In part. Of 2 comparisons with ImageNet, pretraining was better in 1"),
        ([BETTER, WORSE], "It depends."),
        ([WORSE, UNCLEAR], "No."),
        ([UNCLEAR, {**UNCLEAR, "init": "jigsaw"}], "Not shown."),
        ([RANDOM], "No init of this study was pretrained"),
    ],
)
def test_the_headline_claims_no_more_than_the_comparisons(rows: list[Any], start: str) -> None:
    assert headline(contents(rows)).startswith(start)


def test_the_title_asks_what_the_run_can_answer() -> None:
    results = [{"init": "random"}]
    assert title(contents([BETTER], results)) == (
        "Does pretraining on these scans beat ImageNet weights?"
    )
    natural = {**BETTER, "init": "random", "pretext": ""}
    assert title(contents([natural], results)) == "How do other weights compare with ImageNet?"
    assert title(contents([], results)) == "How well do these weights serve the task?"
    assert title(contents([])) == "What did pretraining on these scans learn?"


def test_without_comparisons_the_headline_says_why() -> None:
    assert "did not evaluate it" in headline(contents([]))
    results = [{"init": "random"}, {"init": "rotation"}]
    assert "nothing here can be compared with ImageNet (inits of this study: random, rotation)" in (
        headline(contents([], results))
    )


EQUAL = {
    "init": "jigsaw", "effect": 0.001, "ci_low": -0.006, "ci_high": 0.008, "verdict": "not worse",
    "margin": 0.02, "verdict_level": 0.0125, "verdict_low": -0.008, "verdict_high": 0.01,
    "family_size": 4,
}  # fmt: skip


def test_not_worse_is_said_with_its_margin() -> None:
    assert sentence(EQUAL) == (
        "With 3 labelled patients, jigsaw (+0.001 Dice, 95 % CI −0.006 to +0.008) is not worse by "
        "as much as 0.02 Dice."
    )
    (verdict,) = verdicts(contents([EQUAL, UNCLEAR]))
    assert verdict.outcome == "not worse"
    assert headline(contents([EQUAL])).startswith("Not shown, but it is not worse, in the one")
    assert "not worse in 1, and no difference was shown in 1" in headline(
        contents([EQUAL, UNCLEAR])
    )


def test_an_interval_that_misses_0_beside_no_difference_says_why() -> None:
    row = {**EQUAL, **UNCLEAR, "ci_low": 0.001, "verdict_low": -0.002, "verdict_high": 0.018}
    assert sentence(row) == (
        "With 3 labelled patients, no difference from ImageNet is shown for rotation (+0.004 Dice, "
        "95 % CI +0.001 to +0.016 if it stood alone; as one of 4, 98.8 % CI −0.002 to +0.018)."
    )


def test_numbers_carry_a_real_minus_and_never_a_false_zero() -> None:
    assert (signed(-0.0204), signed(0.0204), signed(-0.0001)) == ("−0.020", "+0.020", "0.000")
    assert (signed(float("nan")), p_text(0.0), p_text(0.04)) == ("?", "< 0.001", "0.040")


def test_a_terminal_gets_one_sentence_a_verdict(finished_run: Path) -> None:
    lines = verdict_lines(finished_run)
    assert len(lines) == 6
    assert lines[0].startswith("hippocampus, fine-tuning: With 3 labelled patients, inpainting bea")
    assert len(verdicts(read_contents(finished_run))) == 6
