"""`medssl pretext preview` and `audit` on small archives: pictures, tables, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from medssl.cli import cli
from medssl.errors import ConfigError, DataError
from medssl.pipelines import preview, shortcuts
from medssl.pipelines.preview import jobs_of, read_config
from medssl.pretext.base import Panel
from medssl.reports.panels import save_panels
from medssl.scans.building import IndexConfig, build_index
from samples import PLANTED
from studies import settings, write_archive, write_config
from training import blobs

WARNING = "These pictures show pixels of patients: keep them where the scans are."


def invoke(*arguments: str | Path) -> Result:
    """Call a command in this process; errors are raised."""
    return CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of eight patients of one scan each; only its store may be added."""
    folder = tmp_path_factory.mktemp("archive")
    for key, volume in blobs(8).items():
        path = folder / "images" / f"{key}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        scan = (1000 * volume).astype(np.float32)
        nib.save(nib.nifti1.Nifti1Image(scan, np.diag([1.0, 1.0, 1.0, 1.0])), path)
    build_index(IndexConfig(folder=folder / "images"), folder / "index")
    return folder / "index"


def pretrain_config(path: Path, index: Path, **changes: Any) -> Path:
    """Write the config of a pretraining that takes seconds."""
    content = {
        "seed": 1,
        "index": str(index),
        "preprocessing": {"spacing_mm": [1.0, 1.0, 1.0]},
        "sampling": {"plane": "axial", "crop_size": [16, 16]},
        "backbone": {
            "name": "monai", "depth": 10, "spatial_dims": 2, "base_channels": 8, "stem_stride": 1,
        },
        "pretext": {"name": "rotation", "views": 2},
        "training": {"steps": 4, "global_batch_size": 4},
        "validation_batches": 1,
        "splits": {"val_fraction": 0.3, "test_fraction": 0.2},
        **changes,
    }  # fmt: skip
    return write_config(path, content)


@pytest.fixture
def config(index: Path, tmp_path: Path) -> Path:
    return pretrain_config(tmp_path / "rotation.yaml", index)


# -------------------------------------------------------------------------------------- preview


def test_a_preview_is_a_picture_for_its_owner_alone(config: Path, tmp_path: Path):
    done = invoke("pretext", "preview", config, "--out", tmp_path / "out")
    assert WARNING in done.stderr
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "preview_rotation.png"
    assert path.stat().st_mode & 0o777 == 0o600
    assert str(path) in done.stdout
    with Image.open(path) as picture:
        picture.load()
        assert picture.width > 800  # six panels a row
        assert picture.height > 800  # six rows


def test_a_preview_shows_puzzles_of_the_pool_with_their_labels(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[Any] = []
    monkeypatch.setattr(preview, "save_panels", lambda path, rows, **_: drawn.extend(rows))
    sampled: list[str] = []
    sampler = preview.CropSampler

    def spy(store: Any, keys: Any, *rest: Any) -> Any:
        sampled.extend(keys)
        return sampler(store, keys, *rest)

    monkeypatch.setattr(preview, "CropSampler", spy)
    loaded = read_config(config)
    preview.run(loaded, tmp_path)
    (job,) = jobs_of(loaded).values()
    titles = [title for row in drawn for _, title in row]
    assert len(drawn) == preview.NUM_ROWS
    assert set(titles) == set(job.task().class_names())
    assert all(image.shape == (16, 16) for row in drawn for image, _ in row)
    _, store, splits = preview.gather(loaded)
    patients = {store.entry(key).patient_key for key in sampled}
    assert patients == set(splits.train)


def test_a_preview_is_the_same_twice(config: Path, tmp_path: Path):
    loaded = read_config(config)
    one, two = (preview.run(loaded, tmp_path / name)["rotation"] for name in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_a_preview_of_inpainting_shows_image_and_puzzle_side_by_side(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[Any] = []
    monkeypatch.setattr(preview, "save_panels", lambda path, rows, **_: drawn.extend(rows))
    pretext = {"name": "inpainting", "block": 4}
    preview.run(read_config(pretrain_config(tmp_path / "a.yaml", index, pretext=pretext)))
    titles = [[title for _, title in row] for row in drawn]
    assert titles[0][:2] == ["image", "puzzle"]
    assert {len(row) for row in titles} == {6}


def test_every_kind_of_puzzle_of_several_tasks_is_shown(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[Any] = []
    monkeypatch.setattr(preview, "save_panels", lambda path, rows, **_: drawn.extend(rows))
    pretext = {"name": "multi", "tasks": ["rotation", {"name": "inpainting", "block": 4}]}
    path = pretrain_config(tmp_path / "multi.yaml", index, pretext=pretext)
    assert list(preview.run(read_config(path), tmp_path)) == ["multi"]
    titles = {title for row in drawn for _, title in row}
    assert {"image", "puzzle", "0°"} <= titles


def test_a_preview_answers_in_json_and_still_warns(config: Path, tmp_path: Path):
    done = invoke("pretext", "preview", config, "--out", tmp_path / "out", "--json")
    assert json.loads(done.stdout) == {"rotation": str(tmp_path / "out" / "preview_rotation.png")}
    assert WARNING in done.stderr


def test_overrides_reach_the_task(config: Path):
    loaded = read_config(config, ["pretext.views=3", "seed=9"])
    assert loaded.seed == 9
    assert jobs_of(loaded)["rotation"].pretext.views == 3


@pytest.mark.parametrize("command", ["preview", "audit"])
def test_a_dry_run_writes_nothing(command: str, config: Path, tmp_path: Path):
    done = invoke("pretext", command, config, "--out", tmp_path / "out", "--dry-run", "--json")
    assert not (tmp_path / "out").exists()
    found = json.loads(done.stdout)
    assert found["device"] in ("cpu", "cuda")
    if command == "audit":
        assert found["steps_of_each"] == {"rotation": 4}
        assert found["steps"] == 6 * 4
    else:
        assert found["pictures"] == [str(tmp_path / "out" / "preview_rotation.png")]


def test_a_task_that_draws_nothing_is_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("medssl.pretext.rotation.Rotation.panels", lambda *_: [])
    with pytest.raises(ConfigError, match="pretext: rotation draws no puzzle of 20 batches"):
        preview.run(read_config(config), tmp_path)


def test_short_rows_stand_side_by_side():
    panel = Panel(torch.zeros(2, 2), "it")
    found = [[panel] * length for length in (2, 2, 2, 2, 5, 6, 1, 1)]
    assert [len(row) for row in preview._side_by_side(found)] == [6, 2, 5, 6, 2]


def test_panels_may_be_grey_or_in_colour_and_rows_of_any_length(tmp_path: Path):
    generator = np.random.default_rng(0)
    red = np.zeros((4, 8, 3))
    red[..., 0] = 1
    rows = [
        [(generator.random((8, 8)), "a title that is too long for one line of a picture")] * 3,
        [(red, "red")],
    ]
    save_panels(tmp_path / "a.png", rows, heading="all of them")
    save_panels(tmp_path / "b.png", rows)
    with Image.open(tmp_path / "a.png") as headed, Image.open(tmp_path / "b.png") as plain:
        pixels = np.asarray(plain.convert("RGB")).reshape(-1, 3)
        assert (pixels == (255, 0, 0)).all(1).sum() > 1000
        assert headed.height > plain.height
        assert headed.width == plain.width


# --------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("command", ["preview", "audit"])
def test_a_path_without_a_config_is_refused(command: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"there is no config file 'absent\.yaml'"):
        invoke("pretext", command, tmp_path / "absent.yaml")


@pytest.mark.parametrize("command", ["preview", "audit"])
def test_a_config_of_another_kind_is_refused(command: str, tmp_path: Path):
    path = write_config(tmp_path / "prepare.yaml", {"index": "data/index", "out": "data/store"})
    with pytest.raises(ConfigError, match=r"prepare\.yaml is a config of the kind prepare, which"):
        invoke("pretext", command, path)


@pytest.mark.parametrize("command", ["preview", "audit"])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "plan"])
def test_a_missing_index_is_refused(command: str, dry: list[str], tmp_path: Path):
    path = pretrain_config(tmp_path / "a.yaml", tmp_path / "nowhere")
    with pytest.raises(DataError, match="there is no index in the folder given"):
        invoke("pretext", command, path, "--out", tmp_path / "out", *dry)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["preview", "audit"])
def test_an_index_of_which_nothing_is_selected_is_refused(
    command: str, config: Path, tmp_path: Path
):
    with pytest.raises(DataError, match="`select` leaves none of 8 scans"):
        invoke("pretext", command, config, "select.dims=['2D+t']", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["preview", "audit"])
def test_crops_that_do_not_fit_the_task_are_refused(command: str, config: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="rotation needs equal sides"):
        invoke("pretext", command, config, "sampling.crop_size=[16, 8]")


def test_a_study_without_a_pretext_is_refused(tmp_path: Path):
    content = settings(tmp_path, inits={"random": {"init": "random"}, "again": {"init": "random"}})
    path = write_config(tmp_path / "study.yaml", content)
    with pytest.raises(ConfigError, match="inits: none has a pretext, so there are no puzzles"):
        invoke("pretext", "preview", path)


# ----------------------------------------------------------------------------------------- audit


def test_an_audit_prints_a_table_and_writes_it(config: Path, tmp_path: Path):
    done = invoke("pretext", "audit", config, "--out", tmp_path / "out", "--steps", "2")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "shortcuts.csv", "shortcuts.json", "shortcuts_rotation.png",
    }  # fmt: skip
    assert "rotation: 2 steps a probe" in done.stdout
    for name in ("everything", "border", "body_mask", "mean_deviation", "thumbnail", "constant"):
        assert f"  {name} " in done.stdout
    assert "Intervals: 95 %, Wilson" in done.stdout
    assert WARNING not in done.stderr  # numbers alone


def test_an_audit_answers_in_json(config: Path, tmp_path: Path):
    done = invoke("pretext", "audit", config, "--out", tmp_path, "--steps", "1", "--json")
    found = json.loads(done.stdout)
    assert found["out"] == str(tmp_path)
    (audit,) = found["audits"]
    assert audit["name"] == audit["pretext"] == "rotation"
    assert len(audit["rows"]) == 6
    assert all(row["trivial"] == 0.25 and row["puzzles"] >= 500 for row in audit["rows"])


def test_several_tasks_on_one_backbone_are_audited_one_by_one(index: Path, tmp_path: Path):
    pretext = {"name": "multi", "tasks": ["rotation", {"name": "inpainting", "block": 4}]}
    path = pretrain_config(tmp_path / "multi.yaml", index, pretext=pretext)
    found = shortcuts.plan(read_config(path))
    assert list(found["probes"]) == ["multi_rotation", "multi_inpainting"]
    jobs = shortcuts._jobs(read_config(path))
    assert jobs["multi_inpainting"].task().config.block == 4


def test_an_interrupted_audit_leaves_nothing_behind(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shortcuts, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shortcuts.run(read_config(config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_study_is_previewed_and_audited_for_each_init_with_a_pretext(tmp_path: Path):
    archive = write_archive(tmp_path / "archive", num_patients=6)
    path = write_config(tmp_path / "study.yaml", settings(archive))
    shown = invoke("pretext", "preview", path, "--out", tmp_path / "preview")
    pictures = {picture.name for picture in (tmp_path / "preview").iterdir()}
    assert pictures == {"preview_rotation.png", "preview_inpainting.png"}
    done = invoke("pretext", "audit", path, "--out", tmp_path / "out", "--steps", "1", "--json")
    audits = json.loads(done.stdout)["audits"]
    assert [audit["name"] for audit in audits] == ["rotation", "inpainting"]
    written = "".join(file.read_text() for file in (tmp_path / "out").glob("*.[cj]s*"))
    assert not any(word in written + shown.output for word in PLANTED)
