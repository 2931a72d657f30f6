from __future__ import annotations

import csv
import itertools
import json
import re
import stat
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medssl.reports.audit import choose_scans, tile_of, verdict, write_audit
from medssl.reports.audit_tables import CSV_COLUMNS, rows_of, summarize_index
from medssl.scans.flags import FLAGS, SHOWS_IDENTITY, meaning_of_flag
from medssl.scans.formats.base import REASONS
from medssl.scans.index import Index
from tests.unit.reports.test_html import Page

JPEG = b"\xff\xd8\xff pixels"


def row(number, *, modality="CT", reason="", flags=(), dims="3D", **changes):
    shapes = {"2D": [64, 48], "3D": [64, 48, 20], "2D+t": [64, 48, 9]}
    accepted = not reason
    return {
        "scan_key": f"{number:016x}",
        "patient_key": f"{number // 2:016x}",
        "study_key": "", "series_key": f"{number:015x}s",
        "format": "dicom", "modality": modality,
        "status": "accepted" if accepted else "rejected", "reason": reason,
        "dims": dims if accepted else "",
        "shape": shapes[dims] if accepted else [],
        "spacing_mm": ([0.5, 0.75, 3.0] if dims == "3D" else [0.5, 0.75]) if accepted else [],
        "orientation": "LPS" if accepted else "", "affine": [], "intensity": "HU",
        "num_files": 20, "flags": sorted(flags), "digest": f"{number:064x}", "num_channels": 1,
        **changes,
    }  # fmt: skip


def index_of(folder: Path, rows) -> Index:
    """Return an index whose table is given: tables of any kind, without writing scans."""
    index = Index(folder)
    folder.mkdir(exist_ok=True)
    accepted = [item for item in rows if not item["reason"]]
    rejected: dict[str, dict[str, object]] = {}
    for item in rows:
        if item["reason"]:
            entry = rejected.setdefault(
                item["reason"], {"rows": 0, "files": 0, "remedy": REASONS[item["reason"]]}
            )
            entry["rows"] += 1
            entry["files"] += item["num_files"]
    used = sum(item["num_files"] for item in accepted)
    summary = {
        "num_files": used + sum(entry["files"] for entry in rejected.values()),
        "num_scans": len(accepted),
        "num_scan_files": used,
        "num_patients": len({item["patient_key"] for item in accepted}),
        "num_scans_of_unknown_patients": sum(
            "patient_unknown" in item["flags"] for item in accepted
        ),
        "by_format": {"dicom": len(accepted)},
        "by_modality": dict(Counter(item["modality"] for item in accepted)),
        "by_dims": dict(Counter(item["dims"] for item in accepted)),
        "by_flags": {},
        "rejected": rejected,
    }
    vars(index).update(
        table=pd.DataFrame(rows, columns=list(row(0))),
        summary=json.loads(json.dumps(summary)),
        digest="ab" * 32,
    )
    return index


@pytest.fixture
def index(tmp_path):
    rows = [row(number) for number in range(4)]
    rows += [
        row(4, modality="MR", flags=["may_show_face", "lossy"]),
        row(5, modality="US", dims="2D+t", flags=["colour"], num_channels=3),
        row(6, modality="", dims="2D", flags=["patient_unknown", "spacing_unknown"]),
        row(7, reason="missing_slice", flags=["dicom_warning_0028_0030"]),
        row(8, reason="not_a_scan", modality="", num_files=1, series_key=""),
        row(9, reason="missing_slice"),
    ]
    return index_of(tmp_path / "index", rows)


def accepted_tiles(index, **options):
    return [tile_of(item, **options) for item in choose(index, 200)]


def choose(index, count, seed=0):
    return choose_scans(index, count, np.random.default_rng(seed))


def written(index, tiles=None, **options) -> Page:
    tiles = accepted_tiles(index, image=JPEG) if tiles is None else tiles
    path = write_audit(index, iter(tiles), len(tiles), seed=0, **options)
    return Page(path.read_text(encoding="utf-8"))


def test_the_verdict_comes_first_and_accounts_for_every_file(index):
    text = written(index).text
    assert "7 scans of 4 patients from 140 files; 41 files rejected." in text
    assert "Every file is accounted for: 181 = 140 in scans + 41 rejected." in text
    titles = ["accounted for", "Accepted, by modality", "Rejected, by reason", " Flags "]
    titles += [" Accepted scans ", " Numbers "]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)


def test_a_file_of_several_scans_is_said_to_be_counted_twice(tmp_path):
    index = index_of(tmp_path / "index", [row(0), row(1, reason="missing_slice")])
    index.summary["num_files"] = 30
    text = written(index).text
    assert "of 30, 20 are in scans and 20 rejected; a file that holds several scans" in text


def test_one_is_not_a_plural(tmp_path):
    index = index_of(tmp_path / "index", [row(0, num_files=1)])
    assert verdict(index.summary) == "1 scan of 1 patient from 1 file; 0 files rejected."


def test_every_reason_comes_with_its_remedy_its_series_and_its_files(index):
    text = written(index).text
    assert f"missing_slice {REASONS['missing_slice']} 2 40" in text
    assert f"not_a_scan {REASONS['not_a_scan']} 1 1" in text


def test_every_flag_comes_with_its_meaning(index):
    text = written(index).text
    assert f"may_show_face {FLAGS['may_show_face']} 1 0" in text
    warning = "The DICOM reader gave a warning about tag (0028,0030)."
    assert f"dicom_warning_0028_0030 {warning} 0 1" in text


def test_the_page_reaches_for_nothing_outside_itself(index):
    for tag, attributes in written(index).tags:
        assert tag not in {"link", "iframe"}
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "#").startswith(("data:image/jpeg;base64,", "#"))


def test_every_link_to_a_flag_finds_its_row(index):
    tags = written(index).tags
    targets = {attributes["id"] for _, attributes in tags if "id" in attributes}
    links = {attributes["href"] for tag, attributes in tags if tag == "a"}
    assert len(links) > 4
    assert links <= {f"#{target}" for target in targets}


def test_every_picture_says_its_content_in_words(index):
    images = [attributes for tag, attributes in written(index).tags if tag == "img"]
    assert len(images) == 6
    words = " ".join(attributes["alt"] for attributes in images)
    assert "middle axial, coronal and sagittal slices" in words
    assert "middle frame" in words
    assert all(len(attributes["alt"]) > 20 for attributes in images)


def test_captions_tell_modality_shape_and_spacing(index):
    text = written(index).text
    assert "0000000000000000 · CT 3D 64 × 48 × 20 · 0.5 × 0.75 × 3 mm" in text
    assert "· US 2D+t 64 × 48 × 9 · 3 channels · 0.5 × 0.75 mm" in text
    assert "· unknown 2D 64 × 48 · spacing unknown" in text


@pytest.mark.parametrize("flag", sorted(SHOWS_IDENTITY))
def test_scans_that_may_show_who_they_are_are_not_pictured(tmp_path, flag):
    index = index_of(tmp_path / "index", [row(0, flags=[flag])])
    page = written(index)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert f"Not pictured: {flag}" in page.text


def test_a_scan_that_cannot_be_drawn_says_so(index):
    tiles = [tile_of(item, problem="Its files are gone.") for item in choose(index, 1)]
    assert "Its files are gone." in written(index, tiles).text


def test_only_its_owner_may_open_the_page(index):
    written(index)
    assert stat.S_IMODE((index.folder / "audit.html").stat().st_mode) == 0o600


def test_the_page_says_that_it_must_stay_where_the_scans_are(index):
    assert "This page shows pixels of patients. It must stay where the scans are" in (
        written(index).text
    )


def test_scans_of_unknown_patients_are_announced(index):
    assert "Mind: 1 scan does not name the patient" in written(index).text


def test_an_index_without_any_scan_gets_a_page(tmp_path):
    text = written(index_of(tmp_path / "index", [row(0, reason="not_a_scan")])).text
    assert "0 scans of 0 patients" in text
    assert "Accepted, by modality" not in text


def test_an_index_without_rejections_says_so(tmp_path):
    text = written(index_of(tmp_path / "index", [row(0)])).text
    assert "Nothing was rejected." in text
    assert "No scan has a flag." in text


def test_the_page_goes_where_it_is_asked_to(index, tmp_path):
    written(index, out=tmp_path / "elsewhere")
    names = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
    assert names == ["audit.csv", "audit.html", "audit.json"]
    assert not list(index.folder.glob("audit.*"))


def test_tiles_are_written_as_they_come(index):
    """Of 200 large tiles the page holds one at a time: the file grows while they are made."""
    sizes = []

    def tiles():
        for item in itertools.islice(itertools.cycle(choose(index, 1)), 50):
            parts = list(index.folder.glob(".audit.html.*.part"))
            sizes.append(parts[0].stat().st_size)
            yield tile_of(item, image=b"\xff" * 100_000)

    write_audit(index, tiles(), 50, seed=0)
    assert sizes[-1] > 40 * 100_000


# --------------------------------------------------------------------------------------- choice


def test_few_scans_are_all_shown_in_order_of_modality(index):
    chosen = choose(index, 200)
    assert len(chosen) == 7
    assert [item["modality"] for item in chosen] == ["CT"] * 4 + ["MR", "US", ""]


def test_rare_modalities_and_flags_are_shown_beside_frequent_ones(tmp_path):
    rows = [row(number) for number in range(300)]
    rows += [row(300 + n, flags=["lossy"]) for n in range(3)]
    rows += [row(400 + n, modality="MR") for n in range(2)]
    chosen = choose(index_of(tmp_path / "index", rows), 12)
    kinds = Counter((item["modality"], *item["flags"]) for item in chosen)
    assert kinds == {("CT",): 7, ("CT", "lossy"): 3, ("MR",): 2}


def test_the_same_seed_chooses_the_same_scans_and_another_seed_others(tmp_path):
    index = index_of(tmp_path / "index", [row(number) for number in range(100)])
    keys = [[item["scan_key"] for item in choose(index, 10, seed)] for seed in (1, 1, 2)]
    assert keys[0] == keys[1] != keys[2]


def test_a_choice_is_announced_with_its_seed(tmp_path):
    index = index_of(tmp_path / "index", [row(number) for number in range(30)])
    tiles = [tile_of(item, JPEG) for item in choose(index, 10)]
    assert "10 of 30 scans, drawn evenly over modalities, kinds and flags with seed 0" in (
        written(index, tiles).text
    )


# --------------------------------------------------------------------------------------- tables


def test_the_table_has_a_line_for_every_row(index):
    written(index)
    with (index.folder / "audit.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == CSV_COLUMNS
    assert [line["scan_key"] for line in lines] == [item["scan_key"] for item in rows_of(index)]
    assert lines[0]["shape"] == "64x48x20"
    assert lines[0]["spacing_mm"] == "0.5x0.75x3"
    assert lines[4]["flags"] == "lossy;may_show_face"
    assert lines[7]["remedy"] == REASONS["missing_slice"]


def test_the_summary_counts_by_modality_reason_flag_kind_and_channels(index):
    written(index)
    summary = json.loads((index.folder / "audit.json").read_text())
    assert summary["by_modality"]["CT"]["scans"] == 4
    assert summary["by_modality"]["CT"]["patients"] == 2
    assert summary["rejected"]["missing_slice"]["files"] == 40
    assert summary["by_flag"]["lossy"] == {"scans": 1, "rejected": 0, "meaning": FLAGS["lossy"]}
    assert summary["by_dims"] == {"2D": 1, "2D+t": 1, "3D": 5}
    assert summary["by_channels"] == {"1": 6, "3": 1}
    assert summary["rejected_by_modality"] == {"CT": 2, "unknown": 1}


def test_the_summary_has_quantiles_of_shape_and_spacing_by_modality_and_kind(tmp_path):
    rows = [row(n, spacing_mm=[1.0, 1.0, 1.0 + n]) for n in range(5)]
    rows.append(row(5, dims="2D", spacing_mm=[1.0, 1.0], flags=["spacing_unknown"]))
    found = summarize_index(index_of(tmp_path / "index", rows))["by_modality"]["CT"]
    assert found["spacing_mm"] == {
        "3D": {"x": [1.0] * 5, "y": [1.0] * 5, "z": [1.0, 2.0, 3.0, 4.0, 5.0]}
    }
    assert found["shape"]["2D"] == {"x": [64.0] * 5, "y": [48.0] * 5}


# ---------------------------------------------------------------------------------------- flags


def test_every_flag_that_medssl_sets_has_a_meaning():
    sources = (Path(__file__).parents[3] / "medssl" / "scans").rglob("*.py")
    added = r"""flags"?\]?\.(?:append|add)\(\s*"([a-z0-9_]+)"\s*\)"""
    named = r""""([a-z]+_[a-z_]+_(?:resampled|allowed|time|channels))\""""
    texts = [path.read_text() for path in sources if path.name != "flags.py"]
    found = {name for text in texts for name in re.findall(added, text) + re.findall(named, text)}
    assert len(found) > 10
    assert {name for name in found if not meaning_of_flag(name)} == set()


def test_a_flag_of_somebody_else_has_no_meaning_here():
    assert meaning_of_flag("from_elsewhere") == ""


def test_a_warning_without_a_tag_has_a_meaning():
    assert meaning_of_flag("dicom_warning") == "The DICOM reader gave a warning."
