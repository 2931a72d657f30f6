"""The report in a browser: from the disk, without a network, on screen, phone and paper."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import CHROMIUM, Page, opened_page
from medssl.reports.appearance import DARK, LIGHT
from medssl.reports.html import build_report
from tests.unit.reports.run_folder import write_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium"),
]

FIRST_TABLE = "document.querySelector('table.sorts')"
DIFFERENCES = f"[...{FIRST_TABLE}.tBodies[0].rows].map(row => row.cells[4].textContent)"
HEADS = f"[...{FIRST_TABLE}.tHead.rows[0].cells]"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(write_run(tmp_path_factory.mktemp("run") / "hippocampus"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with opened_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, report: Path) -> Page:
    """The report, opened anew on a light desktop."""
    browser.prefers("light")
    browser.size(1280)
    browser.open(report)
    return browser


def number(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-"))


def colour(page: Page) -> str:
    """The ground of the page, as it is shown."""
    red, green, blue = re.findall(
        r"\d+", page.run("getComputedStyle(document.documentElement).backgroundColor")
    )
    return f"#{int(red):02x}{int(green):02x}{int(blue):02x}"


def test_nothing_is_asked_of_a_network_and_nothing_complains(page: Page, report: Path):
    asked = [url for url in page.requests if not url.startswith(("data:", "about:"))]
    assert set(asked) == {report.as_uri()}
    assert page.messages == []


@pytest.mark.parametrize("width", [320, 375, 768])
def test_a_narrow_screen_scrolls_tables_alone(page: Page, width: int):
    page.size(width)
    assert page.run("document.documentElement.scrollWidth") <= width


def test_a_click_sorts_by_number_and_a_second_turns_round(page: Page):
    click = f"{HEADS}[4].querySelector('button').click()"
    before = page.run(DIFFERENCES)
    page.run(click)
    after = page.run(DIFFERENCES)
    assert after == sorted(before, key=number)
    assert after != before
    assert page.run(f"{HEADS}[4].getAttribute('aria-sort')") == "ascending"
    page.run(click)
    assert page.run(DIFFERENCES) == after[::-1]
    assert page.run(f"{HEADS}[4].getAttribute('aria-sort')") == "descending"
    page.run(f"{HEADS}[1].querySelector('button').click()")
    assert page.run(f"{HEADS}.map(head => head.getAttribute('aria-sort')).filter(Boolean)") == [
        "ascending"
    ]


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_the_keyboard_alone_sorts(page: Page, key: str):
    before = page.run(DIFFERENCES)
    page.run(f"{HEADS}[3].querySelector('button').focus()")
    page.press("Tab")
    assert page.run(f"document.activeElement === {HEADS}[4].firstElementChild")
    page.press(key)
    assert page.run(DIFFERENCES) == sorted(before, key=number)


def test_the_first_tab_leads_past_the_contents(page: Page):
    page.press("Tab")
    assert page.run("document.activeElement.className") == "skip"
    page.press("Enter")
    assert page.run("document.activeElement.id") == "main"


def test_the_page_follows_the_system_until_its_button_is_pressed(page: Page):
    assert colour(page) == LIGHT.page
    page.prefers("dark")
    assert colour(page) == DARK.page
    assert page.run("document.querySelector('.theme').getAttribute('aria-pressed')") == "true"
    page.run("document.querySelector('.theme').focus()")
    page.press("Enter")
    assert colour(page) == LIGHT.page
    page.press("Space")
    assert colour(page) == DARK.page


def test_figures_are_dark_on_a_dark_page(page: Page):
    ground = "getComputedStyle(document.querySelector('svg.drawn path')).fill"
    light = page.run(ground)
    page.prefers("dark")
    assert page.run(ground) != light


def test_without_a_script_the_page_is_whole(page: Page, report: Path):
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(report)
        assert page.run("document.querySelectorAll('section').length") == 7
        assert page.run("document.querySelectorAll('th button').length") == 0
        assert page.run("document.querySelector('.theme').checkVisibility()") is False
        assert page.run(f"{FIRST_TABLE}.tBodies[0].rows.length") == 9
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)


def test_paper_is_a4_and_light_and_holds_what_is_folded_away(page: Page, tmp_path: Path):
    page.prefers("dark")
    page.run("document.querySelector('.theme').click()")
    page.run("document.querySelector('.theme').click()")  # dark by choice, not by the system
    pdf = page.print()
    (tmp_path / "page.pdf").write_bytes(pdf)
    assert 5 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 20
    (box,) = set(re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf))
    assert [round(float(side) / 72 * 25.4) for side in box] == [210, 297]
    assert page.run("document.querySelectorAll('details[open]').length") == 0  # folded again
    if shutil.which("pdftotext") is None:
        pytest.skip("no pdftotext: apt-get install poppler-utils")
    text = subprocess.run(
        ["pdftotext", "-layout", tmp_path / "page.pdf", "-"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    words = re.sub(r"\s+", " ", text)
    for wanted in (
        "Does pretraining on these scans beat ImageNet weights?", "With 3 labelled patients",
        "How to reproduce", "num_resamples: 10000", "monai", "configuration abababab",
    ):  # fmt: skip
        assert wanted in words, wanted
    assert "worse ← difference → better" in words  # text of figures is text on paper too
