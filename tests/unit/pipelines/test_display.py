from __future__ import annotations

import pytest

from medssl.pipelines.display import Display


def test_lines_say_how_far_a_stage_is(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as show:
        for done in range(1, 6):
            show("reading headers", done, 5)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["reading headers: 1/5, 0 s", "reading headers: 5/5, 0 s"]


def test_stage_of_unknown_length_says_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as show:
        show("finding files", 1000, 0)
        show("finding files", 2000, 0)
        show("grouping", 0, 0)
    assert capsys.readouterr().err.splitlines() == ["finding files: 1000, 0 s", "grouping: 0 s"]
