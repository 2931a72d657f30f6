"""Progress: bars on a terminal, few plain lines elsewhere, nothing where it must be quiet."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from itertools import pairwise

import pytest

from medssl.pipelines import display
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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def test_lines_tell_rate_and_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with Display() as progress:
        for step in (0, 10, 50, 100):
            clock[0] = step / 4
            progress("pretrain rotation", step, 100, "loss 1.2" if step else "")
    assert capsys.readouterr().err.splitlines() == [
        "pretrain rotation: 0/100, 0 s",
        "pretrain rotation: 50/100, 12 s, 4/s, 12 s left, loss 1.2",
        "pretrain rotation: 100/100, 25 s, 4/s, loss 1.2",
    ]


def test_what_an_earlier_start_has_done_does_not_count_for_the_rate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    progress = Display()
    for second, step in ((0, 900), (20, 910)):
        clock[0] = float(second)
        progress("pretrain", step, 1000)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "pretrain: 910/1000, 20 s, 2 s each, 3 min left"
    )


def test_a_day_of_training_fills_no_log_file(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    progress = Display()
    for step in range(0, 86_401, 2):
        clock[0] = float(step)
        progress("pretrain", step, 86_400)
    lines = capsys.readouterr().err.splitlines()
    assert 100 < len(lines) < 250
    assert lines[-1] == "pretrain: 86400/86400, 24 h 0 min, 1/s"


def test_without_a_total_lines_tell_how_much_is_done(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    progress = Display()
    for count in (1000, 9000):
        clock[0] = count / 500
        progress("finding files", count, 0)
    assert capsys.readouterr().err.splitlines()[-1] == "finding files: 9000, 16 s, 500/s"


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]):
    with Display(quiet=True) as progress:
        progress("index", 1, 2)
    assert capsys.readouterr() == ("", "")


_TWO_STAGES = """
import time
from medssl.pipelines.display import Display
with Display() as progress:
    for stage in ("reading headers", "pretrain rotation"):
        for step in range(0, 31):
            progress(stage, step, 30, "loss 0.5")
            time.sleep(0.02)
"""


def _on_a_terminal(code: str) -> str:
    """Run Python with a pseudo-terminal of 120 columns, and return what it drew."""
    leader, follower = pty.openpty()
    environment = os.environ | {"COLUMNS": "120", "TERM": "xterm-256color"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        drawn, end = b"", time.monotonic() + 60
        while time.monotonic() < end:
            try:
                part = os.read(leader, 65536)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            drawn += part
        process.wait(timeout=60)
    os.close(leader)
    assert process.returncode == 0, drawn
    return drawn.decode()


def test_a_terminal_shows_bars_with_rates_and_the_time_left():
    drawn = _on_a_terminal(_TWO_STAGES)
    for wanted in ("reading headers", "pretrain rotation", "30/30", "/s", "0:00:0", "loss 0.5"):
        assert wanted in drawn
    assert "\x1b[?25l" in drawn  # the cursor is hidden
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")  # and shown again at the end


def test_rates_are_numbers_of_one_or_more():
    words = [display._rate_in_words(rate) for rate in (None, 0.05, 0.5, 3.14159, 1234.5)]
    assert words == ["", "20 s each", "2 s each", "3.14/s", "1.23e+03/s"]
    assert all(one != other for one, other in pairwise(words))
