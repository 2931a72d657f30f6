"""Leakage planted on purpose: each is found, refused, and permitted only by name."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from medssl.config import ComponentConfig
from medssl.errors import LeakageError
from medssl.models.inits.checkpoint import Config as CheckpointConfig
from medssl.pipelines import leakage
from medssl.pipelines.leakage import Leakage, check_leakage, hashes_beside, write_hashes
from medssl.reports.facts import warnings_of
from medssl.scans.image_hashes import image_hash, kept_hashes, same_images
from medssl.scans.splits import Splits
from medssl.scans.store import Store
from stores import make_store

NAMES = ("a-scan", "b-scan", "c-scan", "d-scan", "e-scan", "f-scan")
"""The first letter is the patient."""
RANDOM = {"random": ComponentConfig(name="random")}


def image(seed: int) -> np.ndarray:
    """Return a smooth body on air."""
    noise = np.random.default_rng(seed).normal(size=(24, 28, 20))
    smooth = ndimage.gaussian_filter(noise, 1.5)
    volume = np.zeros((30, 34, 26))
    volume[3:-3, 3:-3, 3:-3] = 0.4 + 0.4 * (smooth - smooth.min()) / np.ptp(smooth)
    return volume.astype(np.float16)


def store_of(folder: Path, images: dict[int, np.ndarray] | None = None) -> Store:
    """Return a store of six patients with one scan each; some images may be replaced."""
    volumes = {n: image(n) for n in range(len(NAMES))} | (images or {})
    return make_store(folder, {NAMES[n]: volume for n, volume in sorted(volumes.items())})


def splits_of(store: Store) -> Splits:
    """Return splits whose test patients own the last two scans."""
    owners = [name[0] for name in NAMES]
    return Splits(seed=0, train=tuple(owners[:3]), val=(owners[3],), test=tuple(sorted(owners[4:])))


def test_different_people_are_no_leakage(tmp_path: Path):
    store = store_of(tmp_path)
    assert check_leakage(RANDOM, store, splits_of(store)) == Leakage()


@pytest.mark.parametrize("twin", [0, 3], ids=["training", "validation"])
def test_an_image_of_a_test_patient_under_another_name_is_refused(tmp_path: Path, twin: int):
    rng = np.random.default_rng(0)
    copied = np.pad(image(4) * 0.9 + rng.normal(0, 0.01, (30, 34, 26)), 2).astype(np.float16)
    store = store_of(tmp_path, {twin: copied})
    splits = splits_of(store)
    with pytest.raises(
        LeakageError, match=rf"1 of the 2 scans .*\(e-scan\).* is scan {NAMES[twin]} of"
    ):
        check_leakage(RANDOM, store, splits)
    assert check_leakage(RANDOM, store, splits, allow_images=True).images == 1


def test_two_test_patients_with_one_image_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    store = store_of(tmp_path, {5: image(4)})
    found = check_leakage(RANDOM, store, splits_of(store))
    assert found == Leakage(repeated=("e-scan", "f-scan"))
    with caplog.at_level(logging.WARNING):
        found.warn()
    assert "2 scans of test patients show the same images" in caplog.text


def test_a_pool_that_held_a_test_image_under_another_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    elsewhere = store_of(tmp_path / "elsewhere", {2: image(5)})
    checkpoint = tmp_path / "checkpoints" / "backbone"
    checkpoint.mkdir(parents=True)
    write_hashes(checkpoint, elsewhere, ["c-scan"], ComponentConfig(name="random"))
    inits = {"ours": CheckpointConfig(path=checkpoint)}
    monkeypatch.setattr(leakage, "overlap_with_pretraining", lambda *_, **__: 0)
    monkeypatch.setattr(leakage, "find_checkpoint", lambda path: path)
    store = store_of(tmp_path / "here")
    told = r"init 'ours' was pretrained on the images of 1 of the 2 scans .*\(f-scan\)"
    with pytest.raises(LeakageError, match=told):
        check_leakage(inits, store, splits_of(store))
    assert check_leakage(inits, store, splits_of(store), allow_images=True) == Leakage(images=1)


def test_a_checkpoint_that_came_without_hashes_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(leakage, "overlap_with_pretraining", lambda *_, **__: 0)
    monkeypatch.setattr(leakage, "find_checkpoint", lambda path: path)
    inits = {"ours": CheckpointConfig(path=tmp_path / "copied")}
    store = store_of(tmp_path / "here")
    found = check_leakage(inits, store, splits_of(store))
    assert found == Leakage(unknown=("ours",))
    found.warn()
    assert "init 'ours': no hashes of the images it was pretrained on" in caplog.text
    contents: Any = SimpleNamespace(
        data={"inits_not_looked_into": ["ours"]}, pretraining=[], validations={}, results=[],
        num_failed=0,
    )  # fmt: skip
    (told,) = warnings_of(contents)
    assert told.startswith("Whether copies of test images were in the pretraining of ours is not")


def test_copies_of_patients_who_take_no_part_are_no_leakage_unless_pretrained_on(tmp_path: Path):
    store = store_of(tmp_path, {0: image(4)})
    splits = Splits(seed=0, train=("b", "c"), val=("d",), test=("e", "f"))
    assert check_leakage(RANDOM, store, splits) == Leakage()
    with pytest.raises(LeakageError, match="of a training, validation or pretraining patient"):
        check_leakage(RANDOM, store, splits, pool=("a", "b", "c"))


def test_what_a_pretraining_goes_on_from_stays_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = store_of(tmp_path / "store")
    monkeypatch.setattr(leakage, "find_checkpoint", lambda path: path)
    first, second = (tmp_path / name / "backbone" for name in ("first", "second"))
    for folder in (first, second):
        folder.mkdir(parents=True)
    write_hashes(first, store, ["a-scan"], ComponentConfig(name="random"))
    write_hashes(second, store, ["b-scan"], CheckpointConfig(path=first))
    assert len(kept_hashes(hashes_beside(second))) == 2
    assert not list(second.iterdir())  # nothing that an export would take along


def picture_of(seed: int, dims: int) -> np.ndarray:
    """Return a body with coarse and fine structure, as anatomy has."""
    rng, size = np.random.default_rng(seed), {2: 100, 3: 40}[dims]
    layers = [ndimage.gaussian_filter(rng.normal(size=(size,) * dims), s) for s in (1.2, 2.5, 6)]
    body = sum(layer / layer.std() for layer in layers)
    return np.pad(0.4 + 0.5 * (body - body.min()) / np.ptp(body), 5).astype(np.float32)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_hash_outlives_what_a_second_export_does_to_an_image(dims: int):
    picture, other = picture_of(0, dims), picture_of(1, dims)
    known = image_hash(picture, 0.2)
    noise = np.random.default_rng(1).normal(0, 0.02, picture.shape)
    changed = {
        "noise": (picture + noise, 0.2),
        "scale": (picture * 0.5 + 0.1, 0.2),
        "border": (np.pad(picture, 4), 0.2),
        "resampled": (ndimage.zoom(picture, 0.85, order=1), 0.2),
    }
    for name, (copy, threshold) in changed.items():
        assert same_images([known], [image_hash(copy, threshold)]), name
    assert not same_images([known], [image_hash(other, 0.2)])


def test_hashes_are_made_once_a_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = store_of(tmp_path)
    first = leakage.hash_scans(store, ["a-scan", "b-scan"])
    read: list[str] = []
    whole = Store.read
    monkeypatch.setattr(Store, "read", lambda self, key, *a: read.append(key) or whole(self, key))
    again = leakage.hash_scans(store, ["a-scan", "b-scan", "c-scan"])
    assert read == ["c-scan"]
    assert again.items() >= first.items()


def test_images_without_any_structure_are_like_no_other(tmp_path: Path):
    blank = np.zeros((8, 8, 8), np.float16)
    store = store_of(tmp_path, {0: blank, 5: blank})
    assert check_leakage(RANDOM, store, splits_of(store)) == Leakage()


def test_progress_of_hashing_is_told(tmp_path: Path):
    told: list[tuple[object, ...]] = []
    store = store_of(tmp_path)
    check_leakage(RANDOM, store, splits_of(store), progress=lambda *now: told.append(now))
    assert told[-1] == ("leakage", len(NAMES), len(NAMES))
