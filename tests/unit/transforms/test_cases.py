from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from medssl.errors import DataError
from medssl.scans.store import Store
from medssl.transforms.cases import CaseReader
from medssl.transforms.sampling import SampleRequest
from stores import make_store, numbered_volume

VOLUME = numbered_volume((11, 13, 9))
MASK = np.zeros((11, 13, 9), np.uint8)
MASK[3:5, 6:8, 2:6] = 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    masks = {"a1": {"organ": MASK}, "b1": {"organ": np.zeros_like(MASK)}}
    return make_store(folder, {"a1": VOLUME, "b1": VOLUME}, masks=masks, spacing_mm=(1.0, 1.5, 2.0))


@pytest.mark.parametrize(("plane", "across"), [("sagittal", 0), ("coronal", 1), ("axial", 2)])
def test_all_slices_come_in_order(store: Store, plane, across: int) -> None:
    kept = [axis for axis in range(3) if axis != across]
    size = tuple(VOLUME.shape[axis] for axis in kept)
    case = CaseReader(store, ["a1"], SampleRequest(2, size, plane, mask="organ")).read("a1")
    wanted = np.moveaxis(VOLUME, across, 0)
    np.testing.assert_array_equal(case.images[:, 0].numpy().astype(np.float16), wanted)
    np.testing.assert_array_equal(case.masks.numpy(), np.moveaxis(MASK, across, 0))
    assert case.slices == tuple(range(VOLUME.shape[across]))
    assert case.spacing_mm == tuple((1.0, 1.5, 2.0)[axis] for axis in kept)
    assert case.patient_key == "a"


def test_a_volume_comes_whole(store: Store) -> None:
    case = CaseReader(store, ["a1"], SampleRequest(3, (4, 4, 4))).read("a1")
    assert case.images.shape == (1, 1, 11, 13, 9)
    assert case.masks is None
    assert case.slices == (0,)
    assert case.padding == ((0, 0),) * 3


def test_padding_is_even_reaches_the_divisor_and_comes_off_again(store: Store) -> None:
    case = CaseReader(store, ["a1"], SampleRequest(3, (4, 4, 16), mask="organ"), divisor=8).read(
        "a1"
    )
    assert case.images.shape == (1, 1, 16, 16, 16)
    assert case.padding == ((2, 3), (1, 2), (3, 4))
    np.testing.assert_array_equal(case.unpad(case.images)[0, 0].numpy(), VOLUME.astype(np.float32))
    np.testing.assert_array_equal(case.unpad(case.masks)[0].numpy(), MASK)
    assert float(case.images.sum()) == pytest.approx(float(VOLUME.astype(np.float32).sum()))


def test_padding_is_the_sampler_s(store: Store) -> None:
    from medssl.transforms.sampling import CropSampler

    request = SampleRequest(3, (14, 16, 12))
    sample = CropSampler(store, ["a1"], request, 0, "t").batch(0, 1)
    assert torch.equal(sample.images, CaseReader(store, ["a1"], request).read("a1").images)


def test_only_labelled_slices_where_asked(store: Store) -> None:
    request = SampleRequest(2, (8, 8), "axial", mask="organ")
    reader = CaseReader(store, ["a1", "b1"], request, slices="with_mask")
    labelled, empty = list(reader)
    assert labelled.slices == (2, 3, 4, 5)
    assert len(empty.images) == 0


def test_labelled_slices_need_a_mask(store: Store) -> None:
    with pytest.raises(DataError, match="the task names no mask"):
        CaseReader(store, ["a1"], SampleRequest(2, (8, 8), "axial"), slices="with_mask")


def test_few_slices_are_the_middles_of_equal_parts(store: Store) -> None:
    request = SampleRequest(2, (8, 8), "axial")
    assert CaseReader(store, ["a1"], request, max_slices=3).read("a1").slices == (1, 4, 7)
    assert CaseReader(store, ["a1"], request, max_slices=99).read("a1").slices == tuple(range(9))


def test_neighbours_repeat_at_the_edge(store: Store) -> None:
    request = SampleRequest(2, (11, 13), "axial", num_neighbours=1)
    images = CaseReader(store, ["a1"], request).read("a1").images.numpy().astype(np.float16)
    assert images.shape == (9, 3, 11, 13)
    np.testing.assert_array_equal(images[0, 0], VOLUME[..., 0])
    np.testing.assert_array_equal(images[0, 2], VOLUME[..., 1])
    np.testing.assert_array_equal(images[4, 0], VOLUME[..., 3])


def test_batches_hold_every_slice_once(store: Store) -> None:
    case = CaseReader(store, ["a1"], SampleRequest(2, (8, 8), "axial", mask="organ")).read("a1")
    parts = list(case.batches(4))
    assert [len(images) for images, _ in parts] == [4, 4, 1]
    assert torch.equal(torch.cat([images for images, _ in parts]), case.images)
    assert torch.equal(torch.cat([masks for _, masks in parts]), case.masks)


def test_a_reader_feeds_a_loader(store: Store) -> None:
    reader = CaseReader(store, ["b1", "a1"], SampleRequest(2, (8, 8), "axial"))
    loader = DataLoader(reader, batch_size=None, num_workers=1)
    assert [case.scan_key for case in loader] == ["b1", "a1"]


def test_a_scan_smaller_than_a_crop_without_padding_is_still_read(tmp_path: Path) -> None:
    store = make_store(tmp_path, {"a1": VOLUME})
    request = SampleRequest(3, (32, 32, 32), allow_padding=False)
    assert CaseReader(store, ["a1"], request).read("a1").images.shape == (1, 1, 32, 32, 32)


@pytest.mark.parametrize("plane", ["sagittal", "coronal", "axial", None])
def test_the_affine_places_the_voxels_as_they_are_delivered(store: Store, plane) -> None:
    """Each voxel holds another value: found again by its place, it must be the same one."""
    dims = 2 if plane else 3
    request = SampleRequest(dims, (16, 15, 14)[:dims], plane)
    case = CaseReader(store, ["a1"], request, max_slices=3).read("a1")
    to_scan = np.linalg.inv(np.array(store.entry("a1").affine)) @ case.affine
    assert max(max(both) for both in case.padding) > 0
    image = case.images[0, 0].numpy()
    inside = [range(before, before + 4) for before, _ in case.padding]
    for index in np.stack(np.meshgrid(*inside, indexing="ij"), -1).reshape(-1, dims):
        voxel = np.rint((to_scan @ [*index, *[0] * (3 - dims), 1])[:3]).astype(int)
        assert image[tuple(index)] == pytest.approx(float(VOLUME[tuple(voxel)]))
