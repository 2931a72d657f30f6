from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medssl.reports.contents import Contents, read_contents
from medssl.reports.html import build_report
from medssl.reports.labels import (
    fit_blocks,
    fits_in_words,
    labels_saved,
    power_blocks,
    saved_blocks,
)
from tests.unit.reports.run_folder import write_run

EMPTY = Contents(Path("run"), {}, "", pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), {}, {}, [])
CELL = {
    "init": "rotation", "pretext": "rotation", "reference": "imagenet", "task": "hippocampus",
    "protocol": "fine_tune", "metric": "dice", "num_labelled_patients": 10,
}  # fmt: skip


def saved(**changes: Any) -> Contents:
    row = {
        **CELL, "value": 0.8, "reference_needs": 25.2, "saved_share": 0.603, "bound": "",
        "ci_low": 0.2, "ci_low_bound": "", "ci_high": 0.9, "ci_high_bound": "at least",
    }  # fmt: skip
    return replace(EMPTY, labels_saved=pd.DataFrame([row | changes]))


def test_a_saving_is_said_with_its_interval_and_the_bounds_of_what_was_measured() -> None:
    (line,) = labels_saved(saved())
    assert line == (
        "hippocampus, fine-tuning: with 10 labelled patients rotation does what ImageNet needs 25 "
        "for: 60 % of the labels saved (95 % CI 20 % to at least 90 %)."
    )
    (line,) = labels_saved(saved(reference_needs=100, saved_share=0.9, bound="at least"))
    assert "needs at least 100 for: at least 90 % of the labels saved" in line


def test_a_saving_that_may_be_none_is_not_claimed() -> None:
    assert labels_saved(saved(ci_low=-0.5)) == [
        "hippocampus, fine-tuning: no labels are shown to be saved by rotation against ImageNet."
    ]
    (block,) = saved_blocks(saved(ci_low=-0.5))
    assert block["rows"][0]["interval"] == "−50 % to at least 90 %"
    (line,) = labels_saved(saved(ci_low=np.nan, ci_high=np.nan))
    assert "no labels are shown to be saved" in line


def test_a_curve_without_a_fit_says_why() -> None:
    law = {
        "asymptote": 0.9, "asymptote_low": 0.85, "asymptote_high": np.nan, "exponent": 0.5,
        "exponent_low": 0.2, "exponent_high": 1.1, "fit": "fitted",
    }  # fmt: skip
    few = {**CELL, "init": "imagenet", "fit": "no fit: fewer than 4 points"}
    table = pd.DataFrame([{**CELL, **law}, few])
    (block,) = fit_blocks(replace(EMPTY, learning_curves=table))
    assert [row["asymptote"] for row in block["rows"]] == ["0.900", ""]
    assert [row["exponent"] for row in block["rows"]] == ["0.50 (0.20 to 1.10)", ""]
    assert block["rows"][1]["fit"] == "no fit: fewer than 4 points"
    assert fits_in_words(table) == (
        " Fitted: rotation towards 0.900; ImageNet no fit: fewer than 4 points."
    )


def test_patients_that_no_number_replaces_are_said_as_more_runs() -> None:
    row = {
        **CELL, "label_fraction": 0.1, "num_patients": 30, "num_seeds": 3, "power": 0.8,
        "margin": 0.02, "effect": 0.01, "detectable_effect": 0.03, "patients_for_effect": np.nan,
        "limit_for_effect": "more runs needed", "patients_for_margin": 57.0, "limit_for_margin": "",
    }  # fmt: skip
    (block,) = power_blocks(replace(EMPTY, power=pd.DataFrame([row])))
    assert block["rows"][0] == {
        "num_labelled": 10, "init": "rotation", "detectable": "0.030", "effect": "+0.010",
        "for_effect": "more runs needed", "for_margin": "57",
    }  # fmt: skip


def test_the_report_shows_every_table_with_a_sentence(reported_run: Path) -> None:
    text = (reported_run / "report.html").read_text()
    assert "the share of them that the init does without" in text
    assert "what each learning curve tends to with ever more labels" in text
    assert "how many test patients show a difference with a chance of 80 %" in text
    assert "no fit: fewer than 4 points" in text
    assert "A family is all comparisons of one task with ImageNet (hippocampus 18)" in text
    assert len(read_contents(reported_run).power) == 18


def test_a_report_of_one_seed_claims_nothing_of_other_runs(tmp_path: Path) -> None:
    text = build_report(write_run(tmp_path, seeds=(0,))).read_text()
    assert "One seed for each cell: intervals and verdicts speak about these very training" in text
    assert "one seed says nothing about other training runs" in text
    assert "other training runs from the same weights" not in text
