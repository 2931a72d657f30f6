from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from medssl.errors import DataError
from medssl.reports.html import build_report, page_to_share
from tests.unit.reports.run_folder import write_journal

VOID = {"meta", "img", "source", "link", "br"}


class Page(HTMLParser):
    """Collects what the tests ask about, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data) -> None:
        if not self.stack or self.stack[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page(folder: Path) -> Page:
    return Page(build_report(folder).read_text(encoding="utf-8"))


def reported(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_verdict_comes_before_all_evidence(reported_run: Path) -> None:
    found = reported(reported_run)
    sections = [attributes["id"] for tag, attributes in found.tags if tag == "section"]
    assert sections == [
        "verdict", "evidence", "planning", "pretraining", "method", "data", "reproduce",
    ]  # fmt: skip
    text = found.text
    assert text.index("comparisons with ImageNet, pretraining was better") < 400
    assert "With 3 labelled patients, inpainting beats ImageNet by +0.0" in text


def test_the_file_reaches_for_nothing_outside_itself(reported_run: Path) -> None:
    text = (reported_run / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    for tag, attributes in Page(text).tags:
        assert tag not in {"link", "iframe"}
        assert "src" not in attributes or tag == "img"
        for name in ("src", "srcset", "href"):
            value = attributes.get(name, "#")
            assert value.startswith(("data:image/png;base64,", "#")), (tag, value[:40])
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text


def test_the_page_lets_its_one_script_run_and_no_other(reported_run: Path) -> None:
    text = (reported_run / "report.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.count("script-src") == 1
    assert not re.search(r"<[^>]+\son[a-z]+=", text)


def test_every_figure_says_its_content_in_words(reported_run: Path) -> None:
    tags = reported(reported_run).tags
    figures = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(figures) >= 10
    assert all(attributes["role"] == "img" for attributes in figures)
    assert all(len(attributes["aria-label"]) > 20 for attributes in figures)
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert [len(attributes["alt"]) > 20 for attributes in images] == [True]


def test_headings_leave_out_no_level(reported_run: Path) -> None:
    levels = [int(tag[1]) for tag, _ in reported(reported_run).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_the_contents_lead_to_every_section(reported_run: Path) -> None:
    tags = reported(reported_run).tags
    sections = [f"#{attributes['id']}" for tag, attributes in tags if tag == "section"]
    links = [attributes["href"] for tag, attributes in tags if tag == "a"]
    assert links == ["#main", *sections]


def test_no_id_is_given_twice(reported_run: Path) -> None:
    ids = [attributes["id"] for _, attributes in reported(reported_run).tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_figure_is_a_png_and_an_svg_with_its_text(reported_run: Path) -> None:
    names = {path.stem for path in (reported_run / "figures").glob("*.png")}
    drawn = {path.stem for path in (reported_run / "figures").glob("*.svg")}
    assert names - drawn == {"pretext_rotation"}
    assert drawn >= {
        "effect_hippocampus_fine_tune",
        "labels_hippocampus_linear_probe",
        "layers_hippocampus_linear_probe",
        "patients_hippocampus_fine_tune",
        "pretrain_rotation_accuracy",
    }
    assert not drawn - names
    svg = (reported_run / "figures" / "effect_hippocampus_fine_tune.svg").read_text()
    assert "3 labelled patients</text>" in svg
    assert "var(" not in svg  # other programs know no variables
    ET.fromstring(svg)  # noqa: S314  (our own file)


def test_figures_follow_the_page_from_light_to_dark(reported_run: Path) -> None:
    text = (reported_run / "report.html").read_text(encoding="utf-8")
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert all("var(--ink)" in figure for figure in figures)
    assert not [found for figure in figures for found in re.findall(r": #[0-9a-f]{6}", figure)]


def test_patients_pixels_are_shown_only_where_the_config_lets_them(light_run: Path) -> None:
    allowed = build_report(light_run).read_text(encoding="utf-8")
    assert "data:image/png" in allowed
    assert "This page shows pixels of patients" in allowed
    assert (light_run / "report.html").stat().st_mode & 0o777 == 0o600
    config = light_run / "config.yaml"
    config.write_text(config.read_text().replace("include_images: true", "include_images: false"))
    refused = build_report(light_run).read_text(encoding="utf-8")
    assert "data:image" not in refused
    assert "pixels of patients" not in refused
    assert not (light_run / "report_without_images.html").exists()
    assert page_to_share(light_run) == light_run / "report.html"


def test_a_page_with_patients_pixels_has_one_without_beside_it(light_run: Path) -> None:
    build_report(light_run)
    assert page_to_share(light_run) == light_run / "report_without_images.html"
    text = page_to_share(light_run).read_text(encoding="utf-8")
    assert "data:image" not in text
    assert "pixels of patients" not in text
    assert "How to reproduce" in text


def test_a_report_can_be_written_elsewhere(light_run: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in light_run.rglob("*"))
    written = build_report(light_run, tmp_path / "desk")
    assert written == tmp_path / "desk" / "report.html"
    assert list((tmp_path / "desk" / "figures").glob("*.svg"))
    assert sorted(path.name for path in light_run.rglob("*")) == before


def test_the_same_run_gives_the_same_bytes(light_run: Path) -> None:
    assert build_report(light_run).read_bytes() == build_report(light_run).read_bytes()


def test_synthetic_data_are_announced_before_anything_else(light_run: Path) -> None:
    assert "Synthetic data prove nothing" not in page(light_run).text
    facts = json.loads((light_run / "data.json").read_text())
    (light_run / "data.json").write_text(json.dumps({**facts, "synthetic": True}))
    text = page(light_run).text
    assert text.index("Synthetic data prove nothing") < text.index("How well do these weights")


def test_test_patients_in_the_pretraining_pool_are_announced(light_run: Path) -> None:
    facts = json.loads((light_run / "data.json").read_text())
    (light_run / "data.json").write_text(json.dumps({**facts, "test_patients_in_pool": 3}))
    text = page(light_run).text
    warning = "3 test patients were in the pretraining pool"
    assert text.index(warning) < text.rindex(" Evidence ")


def test_few_seeds_are_named_as_a_limit(reported_run: Path) -> None:
    assert "Only 3 seeds for each cell" in reported(reported_run).text


def test_data_rejections_and_provenance_are_told(reported_run: Path) -> None:
    text = reported(reported_run).text
    for fact in (
        "missing slice", "78, 7, 45", "1 × 1 × 1 mm", "CC-BY-SA-4.0", "11 min 30 s",
        "medssl study configs/studies/demo.yaml", "2 cores, 8 GiB memory, no GPU",
        "three colours summed into one channel", "311 (100 %)",
    ):  # fmt: skip
        assert fact in text


def test_names_from_files_cannot_become_markup(light_run: Path) -> None:
    config = (light_run / "config.yaml").read_text()
    (light_run / "config.yaml").write_text(
        config.replace("name: hippocampus", "name: '<script>alert(1)</script>'")
    )
    text = build_report(light_run).read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;" in text


def test_a_pretraining_alone_gets_a_report_without_a_verdict(tmp_path: Path) -> None:
    write_journal(tmp_path)
    text = page(tmp_path).text
    assert "No verdict: this run pretrained a backbone and did not evaluate it." in text
    assert "inpainting: psnr" in text


def write_validation(folder: Path, state: str, **changes: object) -> None:
    """Write what the last validation of a pretraining leaves."""
    target = folder / "checkpoints" / "rotation"
    target.mkdir(parents=True)
    part = {
        "task": "rotation", "metric": "accuracy", "value": 0.93, "trivial": 0.25,
        "healthy_range": [0.5, 0.99], "state": state,
        "words": f"{state} (accuracy 0.93, trivial 0.25): look at it",
        "classes": ["0°", "90°", "180°", "270°"],
        "confusion": [[9, 1, 0, 0], [0, 10, 0, 0], [6, 0, 4, 0], [0, 0, 0, 10]],
        **changes,
    }  # fmt: skip
    content = {"step": 300, "metrics": {"accuracy": 0.93}, "parts": [part]}
    (target / "validation.json").write_text(json.dumps(content))


def test_pretext_tasks_are_shown_with_chance_health_and_confusion(tmp_path: Path) -> None:
    write_journal(tmp_path)
    write_validation(tmp_path, "healthy")
    found = page(tmp_path)
    assert "How the pretext tasks did on puzzles of validation patients" in found.text
    assert "rotation rotation accuracy 0.93 0.25 0.5 to 0.99 healthy" in found.text
    alts = [attributes["aria-label"] for tag, attributes in found.tags if tag == "svg"]
    assert any("takes 180° for 0°, 0.60 of the time" in alt for alt in alts)
    assert any("no network gives 0.25" in alt for alt in alts)
    assert (tmp_path / "figures" / "confusion_rotation_rotation.png").is_file()


def test_a_suspicious_pretext_task_is_announced_before_the_evidence(light_run: Path) -> None:
    write_validation(light_run, "suspicious")
    text = page(light_run).text
    warning = "Pretext task rotation of rotation: suspicious (accuracy 0.93, trivial 0.25)"
    assert text.index(warning) < text.rindex(" Evidence ")


def test_an_answer_that_needs_no_network_and_does_no_worse_is_announced(light_run: Path) -> None:
    rivals = {"area_rule_accuracy": 0.95}
    write_validation(light_run, "healthy", rivals=rivals, beaten_by=["area_rule_accuracy"])
    text = page(light_run).text
    assert "accuracy 0.93 0.25; area_rule_accuracy 0.95 0.5 to 0.99 healthy" in text
    assert "Pretext task rotation of rotation: healthy" in text


def test_a_folder_without_any_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither results.csv nor journal.jsonl is in it"):
        build_report(tmp_path)


def test_a_damaged_data_file_is_named(light_run: Path) -> None:
    (light_run / "data.json").write_text("{")
    with pytest.raises(DataError, match=r"data.json in the run folder is not valid JSON"):
        build_report(light_run)


def test_building_a_report_imports_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys, medssl.reports.html; "
        "print(sorted({'torch', 'monai', 'mlflow', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_baseline_that_no_init_beats_is_warned_of(reported_run: Path):
    page = (reported_run / "report.html").read_text(encoding="utf-8")
    assert "hippocampus: no init is shown to be better than the place in the scan" in page
    assert "no init is shown to be better than the intensity" not in page
    assert "Ahead by" in page
