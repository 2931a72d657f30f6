"""Whoever reads of ImageNet in 3D reads how its 2D weights got there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from medssl.reports.contents import init_names, read_contents
from medssl.reports.facts import init_rows, warnings_of
from medssl.reports.html import build_report
from medssl.reports.tables import comparison_rows, headline, verdict_lines
from tests.unit.reports.run_folder import CONFIG

FLAT = {"name": "timm", "variant": "efficientnet_lite0"}
WAYS = {"inflated": "inflated ImageNet", "slicewise": "slice-by-slice ImageNet"}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run_in_3d(finished_run: Path, tmp_path: Path, way: str) -> Path:
    """A copy of the finished run, with its backbone inside of another family."""
    folder = tmp_path / "hippocampus"
    shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns("report.html"))
    flat = "{name: timm, variant: efficientnet_lite0}"
    config = CONFIG.replace(flat, f"{{name: {way}, backbone: {flat}}}")
    assert way in config
    (folder / "config.yaml").write_text(config)
    return folder


def test_every_sentence_and_table_says_the_way(run_in_3d, way):
    contents = read_contents(run_in_3d)
    assert contents.reference == WAYS[way]
    assert WAYS[way] in headline(contents)
    lines = verdict_lines(run_in_3d)
    assert any(WAYS[way] in line for line in lines)
    assert {row["init"] for row in init_rows(contents)} == {"random", WAYS[way]}
    said = [*lines, headline(contents), *warnings_of(contents)]
    said += [str(row) for row in comparison_rows(contents.comparisons)]
    assert not [line for line in said if re.search(rf"(?<!{WAYS[way].split()[0]} )ImageNet", line)]


@pytest.mark.parametrize("way", ["slicewise"], indirect=True)  # one page takes seconds to draw
def test_the_page_never_says_imagenet_alone(run_in_3d, way):
    page = build_report(run_in_3d).read_text(encoding="utf-8")
    body = re.sub(r"data:image/[^\"]*", "", page)
    body = re.sub(r"<pre.*?</pre>", "", body, flags=re.DOTALL)  # the configuration, word for word
    around = [body[found.start() - 20 : found.end()] for found in re.finditer("ImageNet", body)]
    assert around
    assert all(text.endswith(WAYS[way]) for text in around), around


def test_a_2d_backbone_keeps_its_inits_names(finished_run):
    contents = read_contents(finished_run)
    assert init_names(contents.config) == {}
    assert contents.reference == "imagenet"


@pytest.mark.parametrize(
    ("inits", "wanted"),
    [
        ({"imagenet": "imagenet", "random": "random"}, {"imagenet": "inflated ImageNet"}),
        ({"imagenet": {"init": "imagenet"}}, {"imagenet": "inflated ImageNet"}),
        (
            {"imagenet": {"init": {"name": "imagenet", "path": None}, "pretext": None}},
            {"imagenet": "inflated ImageNet"},
        ),
        ({"natural": {"name": "imagenet"}}, {"natural": "natural (inflated ImageNet)"}),
        (
            {"continual": {"init": "imagenet", "pretext": "rotation"}},
            {"continual": "continual (from inflated ImageNet)"},
        ),
        ({"rotation": {"pretext": "rotation"}}, {}),
        ({"rotation": {"name": "checkpoint", "path": "runs/a"}}, {}),  # nobody says where it began
    ],
)
def test_an_init_is_named_by_what_it_loads(inits, wanted):
    assert (
        init_names({"backbone": {"name": "inflated", "backbone": FLAT}, "inits": inits}) == wanted
    )


def test_a_checkpoint_is_named_by_where_it_began():
    config = {"backbone": {"name": "inflated"}, "inits": {"ours": {"name": "checkpoint"}}}
    reports = {"ours": {"origin": "from inflated ImageNet"}, "random": {"origin": ""}}
    assert init_names(config, reports) == {"ours": "ours (from inflated ImageNet)"}


def test_a_backbone_of_this_run_is_named_by_its_contract():
    """Of a study that goes on from a checkpoint, and of a run that only pretrains."""
    earlier = {"init": {"name": "imagenet"}, "pretext": {"name": "rotation"}}
    contract = {"backbone": {"name": "slicewise"}, "init": {"name": "checkpoint"}}
    contracts = {"backbone": {**contract, "history": [earlier]}}
    named = {"backbone": "backbone (from slice-by-slice ImageNet)"}
    assert init_names({}, None, contracts) == named
    assert init_names({}, None, {"backbone": {**contract, "history": []}}) == {}
    config = {"backbone": {"name": "slicewise"}, "init": {"name": "imagenet"}}
    assert init_names({**config, "pretext": {"name": "rotation"}}) == named


def test_the_page_of_a_checkpoint_from_elsewhere_says_the_way(light_run):
    config = light_run / "config.yaml"
    before = "{name: timm, variant: efficientnet_lite0}"
    changed = config.read_text().replace(before, f"{{name: inflated, backbone: {before}}}")
    config.write_text(changed)
    file = light_run / "provenance.json"
    facts = json.loads(file.read_text())
    facts["inits"]["rotation"] = {"source": "checkpoint 'far'", "origin": "from inflated ImageNet"}
    file.write_text(json.dumps(facts))
    contents = read_contents(light_run)
    name = "rotation (from inflated ImageNet)"
    assert {row["init"] for row in init_rows(contents)} >= {name}
    assert name in set(contents.results["init"])
    assert name in build_report(light_run).read_text(encoding="utf-8")


def test_tensors_that_were_adapted_alike_stand_together(light_run):
    file = light_run / "provenance.json"
    facts = json.loads(file.read_text())
    alike = [[f"layer{number}", "inflated: 1 x 1 in one slice"] for number in range(5)]
    facts["inits"]["imagenet"]["adapted"] = [["stem", "R, G and B added"], *alike]
    file.write_text(json.dumps(facts))
    adapted = {row["init"]: row["adapted"] for row in init_rows(read_contents(light_run))}
    assert adapted["ImageNet"] == (
        "stem: R, G and B added; 5 tensors (layer0 to layer4): inflated: 1 x 1 in one slice"
    )
    assert adapted["random"] == "none"
