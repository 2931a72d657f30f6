from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medssl.errors import ConfigError, DataError
from medssl.evaluation import neighbours
from medssl.evaluation.neighbours import (
    BACKGROUND,
    PATCH_BYTES,
    Agreement,
    Patches,
    chance_share,
    cut_patches,
    draw_patients,
    embed_patches,
    find_neighbours,
    interval,
)
from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import Backbone
from medssl.randomness import numpy_generator, torch_generator
from medssl.scans.store import Store
from medssl.transforms.requests import SampleRequest
from stores import make_store, numbered_volume

CPU = torch.device("cpu")
SHAPE = (20, 24, 10)
NAMES = (BACKGROUND, "left", "right")


def described(classes: list[int], patients: list[int], names: tuple[str, ...] = NAMES) -> Patches:
    """Return patches without pictures."""
    return Patches(
        images=torch.zeros(len(classes), 1, 2, 2),
        classes=np.array(classes),
        patients=np.array(patients),
        class_names=names,
        patient_keys=tuple(f"p{number}" for number in range(max(patients) + 1)),
        scan_keys=tuple(f"p{number}" for number in patients),
    )


def balanced(num_patients: int = 6, each: int = 4) -> Patches:
    """Return patches of three classes, as many of each of every patient."""
    classes = [number for _ in range(num_patients) for number in range(3) for _ in range(each)]
    patients = [patient for patient in range(num_patients) for _ in range(3 * each)]
    return described(classes, patients)


def request(size: tuple[int, ...], **changes: object) -> SampleRequest:
    settings: dict[str, object] = {
        "spatial_dims": len(size), "crop_size": size, "mask": "organ",
        "plane": "axial" if len(size) == 2 else None, **changes,
    }  # fmt: skip
    return SampleRequest(**settings)  # type: ignore[arg-type]


def scans(folder: Path, keys: str = "abcd", shape: tuple[int, ...] = SHAPE) -> Store:
    """Return a store of two structures: the image is 1/4, 2/4, 3/4 and a little; 0 is air."""
    mask = np.zeros(shape, np.uint8)
    mask[6:9, 8:16], mask[11:14, 8:16], mask[0, 0] = 1, 2, 7
    image = (mask + 1) / 4 + numbered_volume(shape) / 8
    image[:, -6:], image[0, 0] = 0, 1
    return make_store(
        folder,
        {f"{key}1": image for key in keys},
        masks={f"{key}1": {"organ": mask} for key in keys},
    )


def cut(
    folder: Path,
    size: tuple[int, ...] = (8, 8),
    *,
    seed: int = 0,
    per_class: int = 5,
    max_bytes: int = PATCH_BYTES,
) -> Patches:
    store = scans(folder)
    return cut_patches(
        store, store.scan_keys, request(size), NAMES[1:],
        per_class=per_class, generator=numpy_generator(seed, "patches"), max_bytes=max_bytes,
    )  # fmt: skip


def tiny_backbone(dims: int) -> Backbone:
    cls = BACKBONES.config_class("monai")
    config = cls(name="monai", depth=10, spatial_dims=dims, base_channels=4, stem_stride=1)
    return BACKBONES.build(config, in_channels=1)


both_sizes = pytest.mark.parametrize("size", [(8, 8), (7, 6), (8, 8, 4), (5, 8, 3)])


@both_sizes
def test_a_patch_has_its_structure_at_its_centre(tmp_path: Path, size: tuple[int, ...]):
    patches = cut(tmp_path, size)
    centre = tuple(length // 2 for length in size)
    values = patches.images[:, 0][(slice(None), *centre)].numpy()
    assert np.floor(values * 4).astype(int).tolist() == (patches.classes + 1).tolist()


@both_sizes
def test_every_patient_gives_as_many_patches_of_every_structure(
    tmp_path: Path, size: tuple[int, ...]
):
    patches = cut(tmp_path, size)
    assert patches.counts() == dict.fromkeys(NAMES, 20)
    assert patches.patient_keys == ("a", "b", "c", "d")
    assert patches.images.shape == (60, 1, *size)
    assert np.bincount(patches.patients).tolist() == [15] * 4


def test_background_patches_are_centred_inside_the_body(tmp_path: Path):
    patches = cut(tmp_path, (5, 5), per_class=50)
    centres = patches.images[:, 0, 2, 2].numpy()
    assert (centres[patches.classes == 0] > 0.1).all()


def test_patches_are_never_padded(tmp_path: Path):
    store = make_store(
        tmp_path,
        {key: np.ones((9, 9, 3)) for key in ("a1", "b1")},
        masks={key: {"organ": np.tri(9, 9, dtype=np.uint8)[..., None].repeat(3, 2)}
               for key in ("a1", "b1")},
    )  # fmt: skip
    patches = cut_patches(
        store, store.scan_keys, request((8, 8)), ["below"],
        per_class=4, generator=numpy_generator(0, "patches"),
    )  # fmt: skip
    assert (patches.images == 1).all()


def test_the_same_generator_cuts_the_same_patches_and_another_cuts_others(tmp_path: Path):
    first = cut(tmp_path / "first")
    again = cut(tmp_path / "again")
    other = cut(tmp_path / "other", seed=1)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


def test_scans_smaller_than_a_patch_are_left_out_and_counted(tmp_path: Path):
    image, mask = np.ones((12, 12, 4)), np.zeros((12, 12, 4), np.uint8)
    mask[4:7] = 1
    store = make_store(
        tmp_path,
        {"a1": image, "b1": image, "c1": image[:6]},
        masks={"a1": {"organ": mask}, "b1": {"organ": mask}, "c1": {"organ": mask[:6]}},
    )
    patches = cut_patches(
        store, store.scan_keys, request((8, 8)), ["organ"],
        per_class=3, generator=numpy_generator(0, "patches"),
    )  # fmt: skip
    assert patches.num_small_scans == 1
    assert patches.patient_keys == ("a", "b")


@pytest.mark.parametrize(("per_class", "wanted"), [(5, 5), (2, 2), (7, 7)])
def test_a_patient_of_several_scans_gives_no_more_patches(
    tmp_path: Path, per_class: int, wanted: int
):
    image = np.full(SHAPE, 0.6)
    mask = np.zeros(SHAPE, np.uint8)
    mask[6:14, 8:16] = 1
    keys = ("a1", "a2", "a3", "b1")
    store = make_store(
        tmp_path, dict.fromkeys(keys, image), masks={key: {"organ": mask} for key in keys}
    )
    patches = cut_patches(
        store, store.scan_keys, request((6, 6)), ["organ"],
        per_class=per_class, generator=numpy_generator(0, "patches"),
    )  # fmt: skip
    assert np.bincount(patches.patients * 2 + patches.classes).tolist() == [wanted] * 4
    of_a = [patches.scan_keys.count(key) for key in keys[:3]]
    assert max(of_a) - min(of_a) <= 2  # one a class


@pytest.mark.parametrize(
    ("patches_that_fit", "per_class", "num_patients"),
    [(60, 5, 4), (59, 4, 4), (25, 2, 4), (12, 1, 4), (11, 1, 3), (6, 1, 2)],
)
def test_patches_keep_to_the_memory_and_every_structure_gives_up_as_many(
    tmp_path: Path, patches_that_fit: int, per_class: int, num_patients: int
):
    patches = cut(tmp_path, max_bytes=patches_that_fit * 8 * 8 * 4)
    assert patches.counts() == dict.fromkeys(NAMES, per_class * num_patients)
    assert len(patches.patient_keys) == num_patients
    assert patches.images.nbytes <= patches_that_fit * 8 * 8 * 4
    assert bool(patches.note) == (patches_that_fit < 60)


def test_what_the_memory_left_out_is_told(tmp_path: Path):
    assert cut(tmp_path / "few", max_bytes=11 * 256).note == (
        "Patches may take 0 MiB, that is 11 of 8 x 8 voxels: each structure of each patient has "
        "1 at most in place of 5; 3 of 4 patients."
    )
    assert cut(tmp_path / "all").note == ""


def test_patches_two_patients_of_which_exceed_the_memory_are_refused(tmp_path: Path):
    with pytest.raises(
        ConfigError,
        match=r"a patch of 8 x 8 voxels \(channels: 1\) takes .*Set a smaller sampling\.crop_size",
    ):
        cut(tmp_path, max_bytes=5 * 256)


@both_sizes
def test_a_patch_does_not_keep_its_scan_in_memory(
    tmp_path: Path, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    held = []
    real = neighbours._cut_scan
    monkeypatch.setattr(
        neighbours, "_cut_scan", lambda *given: held.append(real(*given)) or held[-1]
    )
    cut(tmp_path, size)
    assert all(image.base is None for found in held for _, image in found)


def test_patches_larger_than_all_scans_are_refused(tmp_path: Path):
    store = scans(tmp_path)
    with pytest.raises(
        DataError,
        match=r"found 0 and 0 in 4 scans \(4 of them smaller than a patch.*Check the masks; or set "
        r"a smaller sampling\.crop_size .* or a larger splits\.val_fraction",
    ):
        cut_patches(
            store, store.scan_keys, request((40, 40)), NAMES[1:],
            per_class=3, generator=numpy_generator(0, "patches"),
        )  # fmt: skip


def test_patches_without_a_mask_are_refused(tmp_path: Path):
    store = scans(tmp_path)
    with pytest.raises(ConfigError, match="told apart by a mask, and the task names none"):
        cut_patches(
            store, store.scan_keys, request((8, 8), mask=None), NAMES[1:],
            per_class=3, generator=numpy_generator(0, "patches"),
        )  # fmt: skip


@pytest.mark.parametrize("dims", [2, 3])
def test_features_are_the_mean_of_every_stage(dims: int):
    backbone = tiny_backbone(dims).train()
    images = torch.rand(300, 1, *[8] * dims, generator=torch_generator(0, "images"))
    found = embed_patches(backbone, images, device=CPU)
    assert list(found) == [stage.name for stage in backbone.stages]
    with torch.inference_mode():
        wanted = backbone.eval()(images[290:])
    for features, maps in zip(found.values(), wanted, strict=True):
        assert features.shape == (300, maps.shape[1])
        assert torch.allclose(features[290:], maps.flatten(2).mean(2), atol=1e-5)


@pytest.mark.parametrize(("voxels", "most"), [(2**20, 256), (640, 10), (1, 1)])
def test_a_backbone_sees_a_bounded_number_of_voxels_at_once(
    voxels: int, most: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(neighbours, "_VOXELS_AT_ONCE", voxels)
    backbone = tiny_backbone(2)
    seen: list[int] = []
    backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    embed_patches(backbone, torch.zeros(300, 1, 8, 8), device=CPU)
    assert max(seen) == most
    assert sum(seen) == 300


def test_what_is_found_keeps_no_other_similarities_in_memory(monkeypatch: pytest.MonkeyPatch):
    kept = []
    real = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts: kept.extend(parts) or real(parts))
    find_neighbours(torch.rand(30, 4), np.arange(30) % 3, 2)
    assert [part.untyped_storage().nbytes() for part in kept] == [30 * 2 * 8]


@given(
    seed=st.integers(0, 1000),
    owners=st.lists(st.integers(0, 4), min_size=8, max_size=40).filter(lambda x: len(set(x)) > 1),
    k=st.integers(1, 3),
)
def test_neighbours_are_those_of_a_search_by_hand(seed: int, owners: list[int], k: int):
    patients = np.unique(owners, return_inverse=True)[1]
    num_others = len(patients) - np.bincount(patients).max()
    k = min(k, int(num_others))
    features = torch.randn(len(owners), 5, generator=torch_generator(seed, "features"))
    found = find_neighbours(features, patients, k)
    rows = features.double().numpy()
    rows = rows - rows.mean(0)
    for query in range(len(rows)):
        cosines = {
            other: rows[query] @ rows[other]
            / (np.linalg.norm(rows[query]) * np.linalg.norm(rows[other]))
            for other in range(len(rows))
            if patients[other] != patients[query]
        }  # fmt: skip
        wanted = sorted(cosines, key=cosines.__getitem__, reverse=True)[:k]
        assert np.allclose([cosines[i] for i in found[query]], [cosines[i] for i in wanted])


def test_more_queries_than_are_compared_at_once_find_the_same(monkeypatch: pytest.MonkeyPatch):
    features = torch.randn(90, 6, generator=torch_generator(0, "features"))
    patients = np.arange(90) % 7
    whole = find_neighbours(features, patients, 4)
    monkeypatch.setattr(neighbours, "_PAIRS_AT_ONCE", 13 * 90)
    assert np.array_equal(find_neighbours(features, patients, 4), whole)


def test_the_own_patient_is_never_among_the_neighbours():
    """The own patches are the query's exact copies, and still not taken."""
    patients = np.repeat(np.arange(5), 6)
    features = torch.eye(5).repeat_interleave(6, 0)
    found = find_neighbours(features, patients, 24)
    assert (patients[found] != patients[:, None]).all()


def test_among_equals_the_earlier_patch_comes_first():
    found = find_neighbours(torch.ones(9, 3), np.repeat([0, 1, 2], 3), 4)
    assert found[0].tolist() == [3, 4, 5, 6]
    assert found[8].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("k", [0, 7])
def test_more_neighbours_than_there_are_is_refused(k: int):
    with pytest.raises(
        ConfigError,
        match=f"k is {k}, and there are 6 patches of other patients .*Give --k a number from 1 to",
    ):
        find_neighbours(torch.rand(9, 3), np.repeat([0, 1, 2], 3), k)


def test_features_that_name_the_structure_reach_1():
    patches = balanced()
    features = torch.eye(3)[torch.from_numpy(patches.classes)]
    found = Agreement(find_neighbours(features, patches.patients, 10), patches)
    assert found.share == 1
    assert found.by_class == dict.fromkeys(NAMES, 1.0)


def test_random_features_reach_about_chance():
    patches = balanced(num_patients=30, each=8)
    features = torch.randn(len(patches.classes), 32, generator=torch_generator(0, "features"))
    found = Agreement(find_neighbours(features, patches.patients, 10), patches)
    draws = draw_patients(patches, 500, numpy_generator(0, "draws"))
    low, high = interval(found.resampled(draws), patches, 0.05)
    assert low <= chance_share(patches) <= high
    assert found.share == pytest.approx(1 / 3, abs=0.03)


def test_structures_count_alike_however_many_patches_they_have():
    patches = described([0] * 8 + [1] * 2, [0, 1] * 5, NAMES[:2])
    found_10 = np.array([[0, 1]] * 10)  # always background: right 8 times of 10
    found = Agreement(found_10, patches)
    assert found.by_class == {BACKGROUND: 1.0, "left": 0.0}
    assert found.share == 0.5


def test_chance_is_what_drawing_blindly_gives():
    patches = described([0, 0, 0, 1, 0, 1, 1, 2, 2, 0], [0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    generator = numpy_generator(0, "blind")
    drawn = np.stack(
        [
            generator.choice(np.flatnonzero(patches.patients != patient), 40_000)
            for patient in patches.patients
        ]
    )
    assert Agreement(drawn, patches).share == pytest.approx(chance_share(patches), abs=0.005)


def test_drawing_every_patient_once_gives_the_share_itself():
    patches = balanced()
    nearest = find_neighbours(
        torch.randn(len(patches.classes), 4, generator=torch_generator(1, "f")), patches.patients, 5
    )
    found = Agreement(nearest, patches)
    once = np.ones((1, len(patches.patient_keys)))
    assert found.resampled(once)[0] == pytest.approx(found.share)


def test_a_resample_without_a_structure_says_nothing():
    patches = described([0, 1, 0, 0], [0, 0, 1, 1], NAMES[:2])
    found = Agreement(np.array([[2], [2], [0], [1]]), patches)
    assert np.isnan(found.resampled(np.array([[0.0, 2.0]]))[0])


@pytest.mark.gpu
def test_neighbours_on_the_gpu_are_those_on_the_cpu():
    features = torch.randn(700, 16, generator=torch_generator(0, "features"))
    patients = np.arange(700) % 9
    assert np.array_equal(
        find_neighbours(features.cuda(), patients, 5), find_neighbours(features, patients, 5)
    )
