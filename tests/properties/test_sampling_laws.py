from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.scans.store import Store
from medssl.transforms.augmentation import AugmentationConfig, augment
from medssl.transforms.cases import CaseReader
from medssl.transforms.sampling import CropSampler, SampleRequest
from stores import make_store, numbered_volume

SHAPES = st.tuples(*(st.integers(2, 12),) * 3)
PLANES = st.sampled_from(["sagittal", "coronal", "axial"])


def temporary_store(folders: pytest.TempPathFactory, shapes: list[tuple[int, ...]]) -> Store:
    folder = folders.mktemp("store")
    return make_store(folder, {f"k{i}": numbered_volume(s) for i, s in enumerate(shapes)})


@settings(max_examples=20, deadline=None)
@given(
    num_scans=st.integers(1, 7),
    size=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    epochs=st.integers(1, 3),
)
def test_every_epoch_is_a_permutation_whatever_the_batch(
    tmp_path_factory, num_scans, size, seed, epochs
) -> None:
    store = temporary_store(tmp_path_factory, [(4, 4, 4)] * num_scans)
    sampler = CropSampler(store, store.scan_keys, SampleRequest(3, (2, 2, 2)), seed, "p")
    steps = -(-num_scans * epochs // size)
    keys = [key for step in range(steps) for key in sampler.batch(step, size).scan_keys]
    for epoch in range(epochs):
        part = keys[epoch * num_scans : (epoch + 1) * num_scans]
        assert Counter(part) == Counter(store.scan_keys)


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, plane=PLANES, crop=st.tuples(st.integers(1, 14), st.integers(1, 14)))
def test_a_crop_of_any_size_from_a_scan_of_any_size_holds_its_voxels(
    tmp_path_factory, shape, plane, crop
) -> None:
    store = temporary_store(tmp_path_factory, [shape])
    request = SampleRequest(2, crop, plane)
    images = CropSampler(store, ["k0"], request, 0, "p").batch(0, 2).images
    assert images.shape == (2, 1, *crop)
    known = {0.0, *map(float, numbered_volume(shape).ravel())}
    assert set(map(float, images.ravel())) <= known


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, plane=PLANES, divisor=st.integers(1, 9))
def test_unpadded_slices_stack_to_the_scan(tmp_path_factory, shape, plane, divisor) -> None:
    store = temporary_store(tmp_path_factory, [shape])
    case = CaseReader(store, ["k0"], SampleRequest(2, (3, 3), plane), divisor=divisor).read("k0")
    assert all(size % divisor == 0 for size in case.images.shape[2:])
    across = ("sagittal", "coronal", "axial").index(plane)
    found = np.moveaxis(case.unpad(case.images)[:, 0].numpy(), 0, across)
    np.testing.assert_array_equal(found, numbered_volume(shape).astype(np.float32))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    axes=st.sampled_from([("X", "Y"), ("Y", "Z"), ("X", "Z"), ("X", "Y", "Z")]),
    flips=st.sets(st.sampled_from(["X", "Y", "Z"])),
)
def test_an_augmented_mask_still_outlines_its_image(seed, axes, flips) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = (torch.rand(3, *range(4, 4 + len(axes)), generator=generator) > 0.5).long()
    images = masks.float().mul(0.8).add(0.1).unsqueeze(1)
    config = AugmentationConfig(flip_axes=tuple(sorted(flips)), noise_std=0)
    found, found_masks = augment(images, masks, config, generator, axes)
    middle = (found.amax((1, *range(2, found.ndim))) + found.amin((1, *range(2, found.ndim)))) / 2
    outlined = found[:, 0] > middle.reshape(-1, *(1,) * len(axes))
    assert torch.equal(outlined, found_masks.bool())
