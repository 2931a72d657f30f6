"""Crops gathered where the scans live are those that the sampler reads, bit by bit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.scans.store import Entry, Store
from medssl.transforms.resident import ResidentScans, resident_bytes
from medssl.transforms.sample import Sample
from medssl.transforms.sampling import CropSampler, SampleRequest
from stores import numbered_volume

CPU = torch.device("cpu")
SIDES = st.integers(1, 9)


def store_of(folder: Path, shapes: list[tuple[int, ...]], channels: int, dims: str) -> Store:
    """Return a store of scans of any dimensions, each with a mask."""
    store = Store.create(folder, {})
    addresses = []
    for number, shape in enumerate(shapes):
        image_CS = np.roll(numbered_volume((channels, *shape)), number * 101)
        entry = Entry(
            address=f"address-{number}",
            scan_key=f"k{number}",
            patient_key="p",
            dims=dims,
            channels=channels,
            shape=shape,
            affine=tuple(tuple(row) for row in np.eye(4).tolist()),
            spacing_mm=(1.0,) * len(shape),
            foreground_threshold=0.6,
        )
        mask = (np.arange(int(np.prod(shape))) * 3 % 256).reshape(shape).astype(np.uint8)
        store.put(entry, image_CS, {"organ": mask})
        addresses.append(entry.address)
    store.commit(addresses)
    return Store.open(folder)


@st.composite
def requests(draw: st.DrawFn) -> tuple[SampleRequest, str, int]:
    """Return a request of any kind, and the dimensions of the scans that answer it."""
    dims = draw(st.sampled_from(["2D", "3D", "2D+t"]))
    spatial_dims = draw(st.sampled_from([2, 3])) if dims == "3D" else 2
    plane = None
    if spatial_dims == 2 and dims != "2D":
        planes = ["axial"] if dims == "2D+t" else ["sagittal", "coronal", "axial"]
        plane = draw(st.sampled_from(planes))
    request = SampleRequest(
        spatial_dims,
        draw(st.tuples(*[SIDES] * spatial_dims)),
        plane,
        num_neighbours=draw(st.integers(0, 2)) if plane else 0,
        num_sequences=draw(st.integers(1, 3)),
        min_foreground=draw(st.sampled_from([0.0, 0.3, 0.9])),
        mask=draw(st.sampled_from([None, "organ"])),
    )
    return request, dims, 2 if dims == "2D" else 3


def both(store: Store, request: SampleRequest, crops_per_scan: int) -> list[Sample]:
    sampler = CropSampler(
        store, store.scan_keys, request, 0, "p", cache_bytes=0, crops_per_scan=crops_per_scan
    )
    resident = ResidentScans(sampler, "float16", CPU)
    return [sampler.batch(3, 4), resident.batch(3, 4)]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), wanted=requests(), crops_per_scan=st.integers(1, 3))
def test_resident_crops_equal_those_read(tmp_path_factory, data, wanted, crops_per_scan) -> None:
    request, dims, axes = wanted
    shapes = data.draw(st.lists(st.tuples(*[SIDES] * axes), min_size=1, max_size=3))
    store = store_of(tmp_path_factory.mktemp("s"), shapes, request.num_sequences, dims)
    one, two = both(store, request, crops_per_scan)
    assert two.images.dtype == torch.float32
    assert torch.equal(one.images, two.images)
    assert (one.masks is None) == (two.masks is None) == (request.mask is None)
    if one.masks is not None and two.masks is not None:
        assert two.masks.dtype == torch.int64
        assert torch.equal(one.masks, two.masks)
    assert (one.scan_keys, one.rejected, one.step) == (two.scan_keys, two.rejected, two.step)
    assert one.spacing_mm == two.spacing_mm
    assert [len(spacing_mm) for spacing_mm in one.spacing_mm] == [request.spatial_dims] * 4


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_of(tmp_path_factory.mktemp("s"), [(9, 8, 7)] * 2, 1, "3D")


def test_uint8_is_within_half_a_level_and_keeps_masks(store: Store) -> None:
    request = SampleRequest(3, (4, 4, 9), mask="organ", min_foreground=0.2)
    sampler = CropSampler(store, store.scan_keys, request, 0, "p")
    one, two = sampler.batch(0, 5), ResidentScans(sampler, "uint8", CPU).batch(0, 5)
    assert 0 < float((one.images - two.images).abs().max()) <= 0.5001 / 255
    assert one.masks is not None
    assert two.masks is not None
    assert torch.equal(one.masks, two.masks)


def test_the_memory_is_as_stated(store: Store) -> None:
    request = SampleRequest(3, (4, 4, 4), mask="organ")
    sampler = CropSampler(store, store.scan_keys, request, 0, "p")
    resident = ResidentScans(sampler, "float16", CPU)
    assert resident._masks is not None
    assert resident_bytes(sampler, "float16") == resident._images.nbytes + resident._masks.nbytes
    plain = CropSampler(store, store.scan_keys, replace(request, mask=None), 0, "p")
    assert resident_bytes(plain, "uint8") == ResidentScans(plain, "uint8", CPU)._images.nbytes


def test_gathering_asks_the_device_for_no_value(store: Store) -> None:
    """A tensor of the meta device has none, so that asking for one would raise."""
    request = SampleRequest(2, (4, 5), "axial", 1, min_foreground=0.2, mask="organ")
    sampler = CropSampler(store, store.scan_keys, request, 0, "p")
    sample = ResidentScans(sampler, "float16", torch.device("meta")).batch(0, 3)
    assert sample.masks is not None
    assert sample.images.device.type == sample.masks.device.type == "meta"
    assert (sample.images.shape, sample.masks.shape) == ((3, 3, 4, 5), (3, 4, 5))
    assert (sample.images.dtype, sample.masks.dtype) == (torch.float32, torch.int64)
