"""Features of frozen backbones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medssl.evaluation.features import (
    CaseFeatures,
    extract_features,
    load_features,
    save_features,
)
from medssl.scans.store import Store
from medssl.transforms.cases import CaseReader
from medssl.transforms.requests import SampleRequest
from stores import make_store, numbered_volume
from training import CPU, tiny_backbone

SIZES = {"a1": (18, 22, 9), "b1": (25, 16, 17), "c1": (7, 31, 12), "d1": (16, 18, 40)}
both_dims = pytest.mark.parametrize("dims", [2, 3])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    volumes = {key: numbered_volume(size) for key, size in SIZES.items()}
    masks = {key: {"organ": (volume > 0.5).astype("uint8")} for key, volume in volumes.items()}
    return make_store(tmp_path_factory.mktemp("store"), volumes, masks=masks)


def cases(
    store: Store, dims: int, *keys: str, mask: str | None = None, max_slices: int | None = None
) -> CaseReader:
    request = SampleRequest(dims, (16,) * dims, "axial" if dims == 2 else None, mask=mask)
    return CaseReader(store, keys, request, max_slices=max_slices)


def extracted(
    read: CaseReader, *, dense: bool = False, max_features: int = 1000
) -> dict[str, CaseFeatures]:
    backbone = tiny_backbone(read.request.spatial_dims)
    return extract_features(backbone, read, device=CPU, dense=dense, max_features=max_features)


@both_dims
def test_scans_of_different_sizes_give_as_many_features(store: Store, dims: int):
    found = extracted(cases(store, dims, *SIZES))
    widths = {key: {n: len(x) for n, x in case.layers.items()} for key, case in found.items()}
    assert widths["a1"] == widths["b1"] == widths["c1"] == widths["d1"]
    assert max(widths["a1"].values()) <= 1000


@both_dims
def test_every_stage_gives_a_vector(store: Store, dims: int):
    layers = extracted(cases(store, dims, "a1"), max_features=100)["a1"].layers
    stages = tiny_backbone(dims).stages
    assert list(layers) == [stage.name for stage in stages]
    for stage in stages:
        vector = layers[stage.name]
        assert vector.ndim == 1
        assert stage.channels <= len(vector) <= 100
        assert vector.dtype == torch.float32


def test_a_vector_is_the_mean_over_the_slices(store: Store):
    read = cases(store, 2, "a1")
    backbone = tiny_backbone(2).eval()
    with torch.inference_mode():
        last = backbone(read.read("a1").images)[-1]
    found = extracted(read, max_features=last.shape[1])["a1"].layers  # one number a channel
    wanted = last.mean(dim=(0, 2, 3))
    assert torch.allclose(found[backbone.stages[-1].name], wanted, atol=1e-4)


@both_dims
def test_dense_features_keep_the_maps_of_every_slice_and_the_masks(store: Store, dims: int):
    read = cases(store, dims, "a1", mask="organ")
    case, found = read.read("a1"), extracted(read, dense=True)["a1"]
    assert found.masks is not None
    assert case.masks is not None
    assert torch.equal(found.masks, case.masks)
    for stage in tiny_backbone(dims).stages:
        maps = found.layers[stage.name]
        size = stage.size(tuple(case.images.shape[2:]))
        assert maps.shape == (len(case.images), stage.channels, *size)
        assert maps.dtype == torch.float16


def test_features_on_disk_are_those_that_were_computed(store: Store, tmp_path: Path):
    found = extracted(cases(store, 3, "a1", "c1", mask="organ"), dense=True)
    assert found["c1"].padding == ((4, 5), (0, 0), (2, 2))
    save_features(tmp_path / "features.safetensors", found, {"loaded": 1}, "all of it")
    loaded = load_features(tmp_path / "features.safetensors")
    assert loaded is not None
    again, report, text = loaded
    assert (report, text) == ({"loaded": 1}, "all of it")
    for key, case in found.items():
        assert again[key].padding == case.padding
        assert torch.equal(again[key].masks, case.masks)
        for name, layer in case.layers.items():
            assert torch.equal(again[key].layers[name], layer)


def test_more_slices_than_go_through_at_once_are_all_there(store: Store):
    read = cases(store, 2, "d1")
    maps = next(iter(extracted(read, dense=True)["d1"].layers.values()))
    with torch.inference_mode():
        last = tiny_backbone(2).eval()(read.read("d1").images[-1:])[0]
    assert len(maps) == 40
    assert torch.allclose(maps[-1].float(), last[0], atol=2e-3)


def test_extracting_changes_nothing_in_the_backbone(store: Store):
    backbone = tiny_backbone(2).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    extract_features(backbone, cases(store, 2, "a1"), device=CPU, dense=False, max_features=50)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
