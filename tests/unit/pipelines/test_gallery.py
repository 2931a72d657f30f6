from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from finished_studies import finished_study
from medssl.cli import cli
from medssl.config import load_config
from medssl.errors import ConfigError, DataError, MedsslError, WeightsError
from medssl.pipelines import gallery
from medssl.pipelines.study import StudyConfig
from medssl.reports.gallery import PIXELS
from medssl.scans.splits import Splits
from samples import PLANTED

SIZE = (16, 16)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's run folder whose backbones are saved and hold random weights; not to be changed."""
    return finished_study(tmp_path_factory.mktemp("gallery"))


@pytest.fixture(scope="module")
def made(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> gallery.Gallery:
    return gallery.run(finished, tmp_path_factory.mktemp("out"), k=4)


def changed(finished: Path, place: Path, **changes: Any) -> Path:
    """Return a copy of the run folder with another configuration."""
    run = place / "tiny"
    shutil.copytree(finished, run)
    content = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**content, **changes}))
    return run


def test_every_init_and_layer_has_a_row_beside_the_raw_pixels(made: gallery.Gallery):
    table = made.table
    assert list(dict.fromkeys(table["init"])) == [PIXELS, "random", "rotation", "inpainting"]
    layers = table[table["init"] == "rotation"]["layer"].tolist()
    assert len(layers) == 5
    assert len(table) == 1 + 3 * len(layers)
    assert table["share"].between(0, 1).all()
    assert (table["ci_low"] <= table["share"]).all()
    assert (table["share"] <= table["ci_high"]).all()
    assert table["chance"].nunique() == 1
    assert table["chance"].iloc[0] == pytest.approx(1 / 3, abs=0.1)


def test_inits_are_compared_with_the_reference_on_the_same_queries(made: gallery.Gallery):
    table = made.table.set_index(["init", "layer"])
    for (init, layer), row in table.iterrows():
        if init in ("random", PIXELS):
            assert row["reference"] == ""
            continue
        wanted = row["share"] - table.loc[("random", layer), "share"]
        assert row["difference"] == pytest.approx(wanted)
        assert row["difference_low"] <= wanted <= row["difference_high"]


def test_the_files_hold_what_is_returned(made: gallery.Gallery):
    written = pd.read_csv(made.folder / "gallery.csv", keep_default_na=False)
    assert written["share"].to_numpy() == pytest.approx(made.table["share"].to_numpy())
    facts = json.loads((made.folder / "gallery.json").read_text())
    assert facts == made.facts
    assert facts["k"] == 4
    assert facts["patch_size"] == list(SIZE)
    assert facts["num_patches"].keys() == {"background", "liver", "lesion"}
    assert "1" in facts["inits"]["rotation"]  # tensors loaded
    assert facts["inits"]["random"] == "random: no weights loaded"
    assert (made.folder / "gallery_layers.png").read_bytes().startswith(b"\x89PNG")
    assert (made.folder / "gallery.png").read_bytes().startswith(b"\x89PNG")


def test_only_validation_patients_are_looked_at(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    real = gallery.cut_patches

    def cut(*arguments: Any, **settings: Any) -> Any:
        seen.append(real(*arguments, **settings))
        return seen[-1]

    monkeypatch.setattr(gallery, "cut_patches", cut)
    gallery.run(changed(finished, tmp_path, include_images=False), k=4)
    (patches,) = seen
    assert set(patches.patient_keys) == set(Splits.read(finished / "splits.json").val)


def test_a_second_start_writes_the_same_bytes(
    made: gallery.Gallery, finished: Path, tmp_path: Path
):
    again = gallery.run(finished, tmp_path, k=4)
    for name in ("gallery.csv", "gallery.json", "gallery.png", "gallery_layers.png"):
        assert (again.folder / name).read_bytes() == (made.folder / name).read_bytes(), name


def test_weights_are_those_of_the_checkpoint_of_each_label(made: gallery.Gallery):
    by_init = {init: part["share"].tolist() for init, part in made.table.groupby("init")}
    assert by_init["rotation"] != by_init["inpainting"]
    assert by_init["rotation"] != by_init["random"]


def test_pictures_of_patients_are_written_only_where_the_study_includes_them(
    finished: Path, tmp_path: Path
):
    run = changed(finished, tmp_path, include_images=False)
    (run / "gallery").mkdir()
    (run / "gallery" / "gallery.png").write_bytes(b"of an earlier start")
    found = gallery.run(run, k=4)
    assert found.folder == run / "gallery"
    assert not (found.folder / "gallery.png").exists()
    assert (found.folder / "gallery_layers.png").is_file()


def test_fewer_patches_than_asked_for_are_noted(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = gallery.cut_patches
    monkeypatch.setattr(
        gallery, "cut_patches", lambda *given, **named: real(*given, **named, max_bytes=36 * 1024)
    )
    found = gallery.run(changed(finished, tmp_path, include_images=False), k=4)
    note = json.loads((found.folder / "gallery.json").read_text())["note"]
    assert note.startswith("Patches may take 0 MiB, that is 36 of 16 x 16 voxels: each structure")
    assert sum(found.facts["num_patches"].values()) <= 36
    assert gallery.describe(found)[-1] == note


def test_features_of_one_init_at_a_time_are_in_memory(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    alive: list[weakref.ref[Any]] = []
    real = gallery.embed_patches

    def embed(*arguments: Any, **settings: Any) -> Any:
        assert not any(features() is not None for features in alive)
        found = real(*arguments, **settings)
        alive.extend(weakref.ref(features) for features in found.values())
        return found

    monkeypatch.setattr(gallery, "embed_patches", embed)
    gallery.run(changed(finished, tmp_path, include_images=False), k=4)
    assert len(alive) == 3 * 5  # inits, stages


OPTION = re.compile(r"--[a-z][a-z-]*")


def refusals(finished: Path, place: Path) -> Iterator[Callable[[], Any]]:
    """Yield starts that the command line, or a study's config, can be refused by."""
    content = yaml.safe_load((finished / "config.yaml").read_text())
    yield lambda: gallery.run(place)
    yield lambda: gallery.run(finished, place, k=10**6)
    yield lambda: gallery.run(finished, place, k=4, patch_size=(500, 500))
    yield lambda: gallery.run(finished, place, k=4, patch_size=(40_000, 40_000))
    without_masks = changed(finished, place / "tasks", tasks=content["tasks"][1:])
    (without_masks / "provenance.json").unlink()
    yield lambda: gallery.run(without_masks, k=4)
    unfinished = changed(finished, place / "unfinished")
    (unfinished / "checkpoints" / "rotation" / "contract.json").unlink()
    yield lambda: gallery.run(unfinished, k=4)


def test_remedies_name_options_and_settings_that_exist(finished: Path, tmp_path: Path):
    options = {option for parameter in cli.commands["gallery"].params for option in parameter.opts}
    config = load_config(finished / "config.yaml", StudyConfig)
    messages = []
    for start in refusals(finished, tmp_path):
        with pytest.raises(MedsslError) as refused:
            start()
        messages.append(str(refused.value))
    assert len(messages) == 6
    for message in messages:
        assert set(OPTION.findall(message)) <= options
        for section, key in re.findall(r"\b(sampling|splits)\.([a-z_]+)\b", message):
            assert hasattr(getattr(config, section), key) or key == "json", message
    assert "Give --k a number from 1 to" in messages[1]
    assert "sampling.crop_size" in messages[2]
    assert "splits.val_fraction" in messages[2]
    assert "sampling.crop_size" in messages[3]


def test_another_layer_can_be_pictured(finished: Path, made: gallery.Gallery, tmp_path: Path):
    first, last = made.table["layer"].iloc[1], made.table["layer"].iloc[-1]
    assert made.facts["layer"] == last
    run = changed(finished, tmp_path, include_images=False)
    assert gallery.run(run, k=4, layer=first).facts["layer"] == first


def test_nothing_written_names_a_person(made: gallery.Gallery):
    text = "".join((made.folder / name).read_text() for name in ("gallery.csv", "gallery.json"))
    text += "\n".join(gallery.describe(made))
    assert not any(needle in text for needle in PLANTED)


def test_the_outcome_is_told_with_interval_chance_and_reference(made: gallery.Gallery):
    lines = gallery.describe(made)
    assert "Share of the 4 nearest patches of other patients" in lines[0]
    assert f"drawn blindly {made.facts['chance']:.3f}" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == [
        PIXELS, "random", "rotation", "inpainting",
    ]  # fmt: skip
    assert "against random" in lines[-1]


@pytest.mark.parametrize("name", ["backbone.safetensors", "contract.json"])
def test_a_backbone_that_is_not_there_is_named(finished: Path, tmp_path: Path, name: str):
    run = changed(finished, tmp_path)
    (run / "checkpoints" / "rotation" / name).unlink()
    with pytest.raises(
        WeightsError,
        match="'tiny' has no pretrained backbone for rotation .*Let the study finish first",
    ):
        gallery.run(run, k=4)


def test_weights_of_another_backbone_are_refused(finished: Path, tmp_path: Path):
    content = yaml.safe_load((finished / "config.yaml").read_text())
    run = changed(finished, tmp_path, backbone={**content["backbone"], "base_channels": 4})
    with pytest.raises(WeightsError, match="made under another contract"):
        gallery.run(run, k=4)


def test_a_folder_without_a_study_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="is not the run folder of a study: it has no config"):
        gallery.run(tmp_path)


def test_a_study_without_masks_is_refused(finished: Path, tmp_path: Path):
    content = yaml.safe_load((finished / "config.yaml").read_text())
    run = changed(finished, tmp_path, tasks=content["tasks"][1:])
    (run / "provenance.json").unlink()
    with pytest.raises(
        ConfigError, match="no task of the study has masks.*with a segmentation task"
    ):
        gallery.run(run, k=4)


def test_data_that_have_changed_since_are_refused(finished: Path, tmp_path: Path):
    run = changed(finished, tmp_path)
    pinned = json.loads((run / "provenance.json").read_text())
    pinned["data"]["store"] = "another"
    (run / "provenance.json").write_text(json.dumps(pinned))
    with pytest.raises(DataError, match=r"the data have changed since the study was run \(store\)"):
        gallery.run(run, k=4)


def test_a_layer_that_is_not_there_is_refused(finished: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="there is no layer 'layer9'. There are: "):
        gallery.run(finished, tmp_path, k=4, layer="layer9")


def test_queries_are_of_all_structures_and_of_different_patients(made: gallery.Gallery):
    patches = gallery.Patches(
        images=np.zeros(0), classes=np.tile([0, 1, 2], 20), patients=np.repeat(np.arange(20), 3),
        class_names=("background", "a", "b"), patient_keys=(), scan_keys=(),
    )  # fmt: skip
    chosen = gallery._queries(patches, np.random.default_rng(0))
    assert patches.classes[chosen].tolist() == [0, 0, 1, 1, 2, 2]
    assert len(set(patches.patients[chosen])) == 6
