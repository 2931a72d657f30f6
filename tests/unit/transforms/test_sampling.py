import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from medssl.errors import DataError
from medssl.scans.store import Store
from medssl.transforms.sampling import MAX_TRIES, CropSampler, Sample, SampleRequest, Share
from stores import make_store, numbered_volume

SHAPE = (14, 17, 12)
VOLUMES = {key: np.roll(numbered_volume(SHAPE), i * 101) for i, key in enumerate("abcde")}
MASKS = {key: {"organ": (volume > 0.5).astype(np.uint8)} for key, volume in VOLUMES.items()}
AXIAL = SampleRequest(2, (8, 6), "axial")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"), VOLUMES, masks=MASKS)


def sampler(store: Store, request: SampleRequest = AXIAL, **options) -> CropSampler:
    return CropSampler(store, store.scan_keys, request, 0, "train", **options)


def same(one: Sample, two: Sample) -> bool:
    masks = one.masks is two.masks is None or torch.equal(one.masks, two.masks)
    return torch.equal(one.images, two.images) and masks and one.scan_keys == two.scan_keys


def find_crop(volume_XYZ: np.ndarray, crop: np.ndarray, plane: str | None) -> tuple | None:
    """Return where a crop lies in a volume, by comparing with every place it could come from."""
    across = {"sagittal": 0, "coronal": 1, "axial": 2}.get(plane)
    windows = np.moveaxis(volume_XYZ, across, 0) if across is not None else volume_XYZ[np.newaxis]
    for index, image in enumerate(windows):
        views = np.lib.stride_tricks.sliding_window_view(image, crop.shape)
        places = np.argwhere((views == crop).all(axis=tuple(range(-crop.ndim, 0))))
        if len(places):
            return (index, *places[0])
    return None


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_are_the_same_with_any_number_of_workers(store: Store, num_workers: int) -> None:
    request = replace(AXIAL, mask="organ", min_foreground=0.3)
    wanted = [sampler(store, request).batch(step, 3) for step in range(2, 7)]
    dataset = sampler(store, request).as_dataset(2, 7, Share(3))
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
    found = list(loader)
    assert len(found) == 5
    assert all(same(a, b) for a, b in zip(wanted, found, strict=True))


def test_a_batch_does_not_depend_on_those_before_it(store: Store) -> None:
    used = sampler(store)
    for step in (5, 0, 9):
        used.batch(step, 4)
    assert same(used.batch(3, 4), sampler(store).batch(3, 4))


def test_a_batch_does_not_depend_on_memory_or_on_pickling(store: Store) -> None:
    request = SampleRequest(3, (6, 5, 4), mask="organ", min_foreground=0.5)
    cached = sampler(store, request)
    uncached = sampler(store, request, cache_bytes=0)
    assert same(cached.batch(1, 6), uncached.batch(1, 6))
    assert same(cached.batch(2, 6), pickle.loads(pickle.dumps(cached)).batch(2, 6))  # noqa: S301


def test_another_seed_or_purpose_gives_other_crops(store: Store) -> None:
    batches = [
        CropSampler(store, store.scan_keys, AXIAL, seed, purpose).batch(0, 5)
        for seed, purpose in [(0, "train"), (1, "train"), (0, "val")]
    ]
    assert not any(same(batches[i], batches[j]) for i, j in [(0, 1), (0, 2), (1, 2)])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_epoch_visits_each_scan_once(store: Store, size: int) -> None:
    steps = sampler(store)
    keys = [key for step in range(15) for key in steps.batch(step, size).scan_keys]
    for epoch in range(len(keys) // 5):
        assert Counter(keys[epoch * 5 : epoch * 5 + 5]) == Counter("abcde")
    assert keys[:5] != keys[5:10] or keys[5:10] != keys[10:15]


@pytest.mark.parametrize("plane", ["sagittal", "coronal", "axial"])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_slice_is_cut_from_its_scan(store: Store, plane: str, cache_bytes: int) -> None:
    request = SampleRequest(2, (8, 6), plane, mask="organ")  # type: ignore[arg-type]
    sample = sampler(store, request, cache_bytes=cache_bytes).batch(0, 5)
    assert sample.images.shape == (5, 1, 8, 6)
    assert sample.images.dtype == torch.float32
    assert sample.masks is not None
    assert sample.masks.dtype == torch.int64
    for i, key in enumerate(sample.scan_keys):
        crop = sample.images[i, 0].numpy().astype(np.float16)
        assert find_crop(VOLUMES[key], crop, plane) is not None
        np.testing.assert_array_equal(sample.masks[i].numpy(), crop > np.float16(0.5))


def test_a_volume_crop_is_cut_from_its_scan(store: Store) -> None:
    sample = sampler(store, SampleRequest(3, (6, 5, 4))).batch(0, 5)
    for i, key in enumerate(sample.scan_keys):
        crop = sample.images[i, 0].numpy().astype(np.float16)
        assert find_crop(VOLUMES[key], crop, None) is not None


def test_crops_reach_every_border(store: Store) -> None:
    steps = sampler(store, SampleRequest(3, (12, 15, 10)))
    places = set()
    for step in range(40):
        sample = steps.batch(step, 5)
        for i, key in enumerate(sample.scan_keys):
            crop = sample.images[i, 0].numpy().astype(np.float16)
            places.add(find_crop(VOLUMES[key], crop, None)[1:])
    for axis in range(3):
        assert {place[axis] for place in places} == {0, 1, 2}


def test_neighbours_are_the_slices_beside(store: Store) -> None:
    request = SampleRequest(2, (14, 17), "axial", num_neighbours=1)
    sample = sampler(store, request).batch(0, 5)
    assert sample.images.shape == (5, 3, 14, 17)
    for i, key in enumerate(sample.scan_keys):
        found = sample.images[i].numpy().astype(np.float16)
        z = find_crop(VOLUMES[key], found[1], "axial")[0]
        assert 1 <= z <= SHAPE[2] - 2
        np.testing.assert_array_equal(found, np.moveaxis(VOLUMES[key], 2, 0)[z - 1 : z + 2])


def test_a_scan_thinner_than_its_neighbourhood_repeats_the_last_slice(tmp_path: Path) -> None:
    volume = numbered_volume((9, 9, 2))
    store = make_store(tmp_path, {"a1": volume})
    request = SampleRequest(2, (9, 9), "axial", num_neighbours=1)
    images = CropSampler(store, ["a1"], request, 0, "t").batch(0, 1).images[0].numpy()
    first, second = volume[..., 0], volume[..., 1]
    options = ([first, first, second], [first, second, second])
    assert any(np.array_equal(images.astype(np.float16), np.stack(o)) for o in options)


def test_a_small_scan_is_padded_evenly_with_zeros(tmp_path: Path) -> None:
    volume = numbered_volume((5, 6, 3)) + np.float16(0.1)
    store = make_store(tmp_path, {"a1": volume}, masks={"a1": {"m": np.ones((5, 6, 3), np.uint8)}})
    request = SampleRequest(3, (8, 6, 4), mask="m")
    sample = CropSampler(store, ["a1"], request, 0, "t").batch(0, 1)
    wanted = np.zeros((8, 6, 4), np.float16)
    wanted[1:6, :, 0:3] = volume
    np.testing.assert_array_equal(sample.images[0, 0].numpy().astype(np.float16), wanted)
    assert sample.masks is not None
    np.testing.assert_array_equal(sample.masks[0].numpy(), wanted > 0)


def test_sequences_come_as_channels(tmp_path: Path) -> None:
    both = np.stack([VOLUMES["a"], VOLUMES["b"]])
    store = make_store(tmp_path, {"a1": both})
    request = SampleRequest(2, (14, 17), "axial", num_sequences=2, num_neighbours=1)
    images = CropSampler(store, ["a1"], request, 0, "t").batch(0, 1).images[0].numpy()
    z = find_crop(VOLUMES["a"], images[1].astype(np.float16), "axial")[0]
    np.testing.assert_array_equal(images[4].astype(np.float16), VOLUMES["b"][..., z])


def test_images_are_cropped_without_a_plane(tmp_path: Path) -> None:
    image = numbered_volume((12, 13))
    store = make_store(tmp_path / "s", {"a1": image[..., np.newaxis]})
    entry = replace(store.entry("a1"), address="flat", shape=(12, 13), spacing_mm=(1.0, 1.0))
    store.put(replace(entry, dims="2D"), image[np.newaxis])
    store.commit(["flat"])
    sample = CropSampler(store, ["a1"], SampleRequest(2, (7, 8)), 0, "t").batch(0, 1)
    crop = sample.images[0, 0].numpy().astype(np.float16)
    assert find_crop(image[..., np.newaxis], crop, "axial") is not None


@pytest.fixture(scope="module")
def corner(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One scan that is empty but for a corner, so that most crops hold air alone."""
    volume = np.zeros((40, 40, 40), np.float16)
    volume[:16, :16, :16] = 0.8
    return make_store(tmp_path_factory.mktemp("corner"), {"a1": volume})


def test_crops_hold_the_foreground_asked_for(corner: Store) -> None:
    request = SampleRequest(2, (12, 12), "axial", min_foreground=0.4)
    steps = CropSampler(corner, ["a1"], request, 0, "t")
    samples = [steps.batch(step, 1) for step in range(30)]
    fractions = [float((s.images > 0.1).float().mean()) for s in samples]
    full = [s.rejected < MAX_TRIES - 1 for s in samples]
    assert sum(full) > 20
    assert all(f >= 0.4 for f, ok in zip(fractions, full, strict=True) if ok)
    assert sum(s.rejected for s in samples) > 0


def test_without_a_minimum_nothing_is_rejected(corner: Store) -> None:
    steps = CropSampler(corner, ["a1"], SampleRequest(2, (12, 12), "axial"), 0, "t")
    assert steps.batch(0, 20).rejected == 0


def test_a_minimum_that_is_never_met_ends_after_a_bounded_number_of_tries(tmp_path: Path) -> None:
    store = make_store(tmp_path, {"a1": np.zeros((20, 20, 20), np.float16)})
    request = SampleRequest(3, (8, 8, 8), min_foreground=0.5)
    sample = CropSampler(store, ["a1"], request, 0, "t").batch(0, 2)
    assert sample.rejected == 2 * (MAX_TRIES - 1)
    assert sample.images.shape == (2, 1, 8, 8, 8)


def test_crops_read_only_their_region(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    read = Store.read

    def spy(self, scan_key, region=None):
        asked.append(region)
        return read(self, scan_key, region)

    monkeypatch.setattr(Store, "read", spy)
    sampler(store, cache_bytes=0).batch(0, 5)
    assert len(asked) == 5
    for region in asked:
        assert [part.stop - part.start for part in region] == [8, 6, 1]


def test_memory_stays_within_its_budget(store: Store) -> None:
    aligned = -(-2 * int(np.prod(SHAPE)) // 64) * 64
    steps = sampler(store, cache_bytes=2 * aligned + 1)
    for step in range(4):
        steps.batch(step, 5)
    assert len(steps.cache) == steps.cache.num_filled == 2
    assert steps.cache.num_bytes <= 2 * aligned


@pytest.mark.parametrize("crops_per_scan", [1, 2, 3])
def test_a_visit_gives_consecutive_crops_and_epochs_visit_each_scan_once(
    store: Store, crops_per_scan: int
) -> None:
    steps = sampler(store, crops_per_scan=crops_per_scan)
    keys = [key for step in range(10) for key in steps.batch(step, 3).scan_keys]
    visits = [keys[i : i + crops_per_scan] for i in range(0, 30, crops_per_scan)]
    assert all(len(set(visit)) == 1 for visit in visits)
    for epoch in range(len(visits) // 5):
        assert Counter(v[0] for v in visits[epoch * 5 : epoch * 5 + 5]) == Counter("abcde")


@pytest.mark.parametrize("start", [0, 1, 2, 5])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_several_crops_a_scan_are_the_same_from_wherever_one_starts(
    store: Store, start: int, cache_bytes: int
) -> None:
    request = replace(AXIAL, mask="organ", min_foreground=0.3)
    used = sampler(store, request, crops_per_scan=4, cache_bytes=0)
    for step in range(start):
        used.batch(step, 3)
    fresh = sampler(store, request, crops_per_scan=4, cache_bytes=cache_bytes)
    assert same(used.batch(start, 3), fresh.batch(start, 3))


def test_several_crops_of_a_visit_differ(store: Store) -> None:
    sample = sampler(store, crops_per_scan=4).batch(0, 4)
    assert len({image.numpy().tobytes() for image in sample.images}) > 1


def test_a_scan_is_decoded_once_for_the_crops_of_a_visit(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    read = Store.read

    def spy(self, scan_key, region=None):
        asked.append((scan_key, region))
        return read(self, scan_key, region)

    monkeypatch.setattr(Store, "read", spy)
    sample = sampler(store, cache_bytes=0, crops_per_scan=4).batch(0, 8)
    whole = tuple(slice(0, size) for size in SHAPE)
    assert asked == [(sample.scan_keys[0], whole), (sample.scan_keys[4], whole)]


def test_small_crops_of_a_large_scan_are_read_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path, {"a1": np.ones((160, 8, 8), np.float16)})
    regions = []
    read = Store.read

    def spy(self, scan_key, region=None):
        regions.append(region)
        return read(self, scan_key, region)

    monkeypatch.setattr(Store, "read", spy)
    request = SampleRequest(3, (4, 4, 4))
    CropSampler(store, ["a1"], request, 0, "t", cache_bytes=0, crops_per_scan=2).batch(0, 4)
    assert len(regions) == 4
    assert None not in regions


def test_a_sampler_begins_without_opening_a_scan(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self, scan_key):
        raise AssertionError(scan_key)

    monkeypatch.setattr(Store, "entry", refuse)
    assert sampler(store).scan_keys == list("abcde")


def test_no_scans_to_sample_is_said(store: Store) -> None:
    with pytest.raises(DataError, match="no scans to sample for 'train'"):
        CropSampler(store, [], AXIAL, 0, "train")


def test_a_scan_that_does_not_fit_is_refused_before_training(store: Store) -> None:
    request = SampleRequest(2, (99, 6), "axial", allow_padding=False)
    with pytest.raises(DataError, match="scan a has 14 x 17 voxels, the task needs 99 x 6"):
        sampler(store, request)


def test_a_sample_moves_with_its_masks(store: Store) -> None:
    sample = sampler(store, replace(AXIAL, mask="organ")).batch(0, 2)
    moved = sample.to("meta")
    assert moved.masks is not None
    assert moved.images.device.type == moved.masks.device.type == "meta"
    assert moved.scan_keys == sample.scan_keys


def test_a_dataset_ends_where_it_should(store: Store) -> None:
    dataset = sampler(store).as_dataset(3, 5, Share(2))
    assert len(dataset) == 2
    with pytest.raises(IndexError):
        dataset[2]
