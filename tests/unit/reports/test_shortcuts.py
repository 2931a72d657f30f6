"""Verdicts of probes from their scores, and the tables and figures that show them."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medssl.reports.shortcuts import (
    CONSTANT_CHECK,
    NO_SHORTCUT,
    NOT_JUDGED,
    REFERENCE,
    SHORTCUT,
    UNDECIDED,
    WEAK,
    Audit,
    Score,
    describe,
    facts_of,
    judge,
    save_audits,
)


def classified(right: int, shortcut: str = "border") -> Score:
    """Return the score of a probe that answered some of 500 puzzles of four classes rightly."""
    return Score(shortcut, f"{shortcut} in words", "accuracy", True, 0.25, 500, right)


def restored(*errors: float, shortcut: str = "thumbnail", trivial: float = 0.2) -> Score:
    """Return the score of a probe whose error was this in each batch."""
    return Score(shortcut, f"{shortcut} in words", "masked_l1", False, trivial, 64, values=errors)


def audit(*shortcuts: Score, whole: int = 450, constant: int = 125) -> Audit:
    return judge(
        "it", "rotation", 20, classified(whole, "everything"), shortcuts,
        classified(constant, CONSTANT_CHECK),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("right", "verdict"),
    [(125, NO_SHORTCUT), (150, NO_SHORTCUT), (200, WEAK), (300, SHORTCUT), (450, SHORTCUT)],
)
def test_a_verdict_is_of_the_share_of_what_the_whole_puzzle_gains(right: int, verdict: str):
    row = audit(classified(right)).rows[1]
    assert row.verdict == verdict
    assert row.share == pytest.approx((right / 500 - 0.25) / (0.9 - 0.25))


@pytest.mark.parametrize(("right", "verdict"), [(125, UNDECIDED), (300, SHORTCUT)])
def test_where_the_whole_puzzle_is_not_learnt_only_more_than_guessing_is_judged(
    right: int, verdict: str
):
    found = audit(classified(right), whole=130)
    assert found.verdicts()["everything"] == REFERENCE
    assert found.rows[1].verdict == verdict
    assert math.isnan(found.rows[0].share)
    assert math.isnan(found.rows[1].share)
    assert "was not learnt in these steps, so shares cannot be told" in found.notes[1]


@pytest.mark.parametrize(("right", "verdict"), [(125, NO_SHORTCUT), (170, SHORTCUT)])
def test_constant_scans_may_be_guessed_and_no_more(right: int, verdict: str):
    found = audit(constant=right)
    assert found.rows[-1].verdict == verdict
    told = any("the label reaches the network without any image" in note for note in found.notes)
    assert told == (verdict == SHORTCUT)


@pytest.mark.parametrize("settings", [(), ("gap", "jitter")])
def test_remedies_name_settings_of_the_task_alone(settings: tuple[str, ...]):
    whole, constant = classified(450, "everything"), classified(125, CONSTANT_CHECK)
    found = judge("it", "x", 20, whole, [classified(450)], constant, settings)
    assert "take crops that lie inside the scans" in found.notes[-1]
    assert ("pretext.gap" in found.notes[-1]) == bool(settings)


def test_a_lower_error_is_better_where_images_are_restored():
    found = judge(
        "it", "inpainting", 20, restored(0.05, 0.06, 0.07, shortcut="everything"),
        [restored(0.08, 0.09, 0.1)], restored(0.0, 0.0, shortcut=CONSTANT_CHECK, trivial=0.0),
    )  # fmt: skip
    assert found.verdicts() == {
        "everything": REFERENCE, "thumbnail": SHORTCUT, CONSTANT_CHECK: NOT_JUDGED,
    }  # fmt: skip
    assert found.rows[1].share == pytest.approx((0.09 - 0.2) / (0.06 - 0.2))
    assert "Student's t" in found.notes[0]


def test_a_single_batch_of_restored_images_has_no_interval():
    row = judge("it", "inpainting", 1, restored(0.1), [], restored(0.1)).rows[0]
    assert math.isnan(row.low)
    assert math.isnan(row.high)
    assert math.isnan(row.share)


@given(right=st.integers(0, 500))
def test_an_interval_holds_its_value(right: int):
    row = audit(classified(right)).rows[1]
    assert 0 <= row.low <= row.value <= row.high <= 1
    assert row.high - row.low < 0.09


def test_every_shortcut_that_is_found_has_a_remedy():
    names = ("border", "body_mask", "mean_deviation", "thumbnail")
    found = audit(*(classified(400, name) for name in names), constant=400)
    remedies = found.notes[1:]
    assert [note.split(" (")[0] for note in remedies] == [*names, CONSTANT_CHECK]
    assert remedies[0].startswith("border (border in words): take crops that lie inside")


def test_tables_and_figures_agree(tmp_path: Path):
    one = audit(classified(200), constant=130)
    other = replace(audit(classified(400), whole=130), name="other")
    save_audits([one, other], tmp_path)
    lines = list(csv.DictReader((tmp_path / "shortcuts.csv").read_text().splitlines()))
    content = json.loads((tmp_path / "shortcuts.json").read_text())
    assert content == facts_of([one, other])
    rows = [*one.rows, *other.rows]
    assert [line["name"] for line in lines] == ["it"] * 3 + ["other"] * 3
    assert [line["verdict"] for line in lines] == [row.verdict for row in rows]
    assert [float(line["value"]) for line in lines] == [row.value for row in rows]
    assert lines[2]["share"] == ""  # undefined
    assert content[0]["rows"][-1]["share"] is None
    for name in ("it", "other"):
        with Image.open(tmp_path / f"shortcuts_{name}.png") as picture:
            assert picture.width > 500
    assert len(list(tmp_path.iterdir())) == 4


def test_every_row_and_note_is_told_in_words():
    found = audit(classified(200))
    lines = describe([found])
    assert lines[0] == "it (rotation): 20 steps a probe, 500 puzzles"
    for row, line in zip(found.rows, lines[2:5], strict=True):
        assert f"{row.value:.3f}" in line
        assert line.endswith(f"{row.verdict:13}{row.shown}")
    assert "puzzles of one image or patient are not" in lines[5]


def test_the_same_scores_give_the_same_files(tmp_path: Path):
    for name in "ab":
        save_audits([audit(classified(200))], tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
