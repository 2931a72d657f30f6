"""Features of frozen backbones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medssl.evaluation.features import extract_features
from medssl.models.backbones import BACKBONES
from medssl.models.build import build_backbone
from medssl.models.inits import INITS
from medssl.transforms.cases import CaseReader
from medssl.transforms.requests import SampleRequest
from stores import make_store, numbered_volume


@pytest.mark.parametrize("dims", [2, 3])
def test_scans_of_different_sizes_give_as_many_features(tmp_path: Path, dims: int):
    sizes = {"a1": (18, 22, 9), "b1": (25, 16, 17), "c1": (7, 31, 12)}
    store = make_store(tmp_path, {key: numbered_volume(size) for key, size in sizes.items()})
    request = SampleRequest(
        spatial_dims=dims, crop_size=(16,) * dims, plane="axial" if dims == 2 else None
    )
    config = BACKBONES.config_class("monai")(
        depth=10, spatial_dims=dims, base_channels=8, stem_stride=1
    )
    backbone, _ = build_backbone(config, INITS.config_class("random")(), in_channels=1, seed=0)
    found = extract_features(
        backbone,
        CaseReader(store, list(sizes), request),
        device=torch.device("cpu"),
        dense=False,
        max_features=1000,
    )
    widths = {key: {n: len(x) for n, x in case.layers.items()} for key, case in found.items()}
    assert widths["a1"] == widths["b1"] == widths["c1"]
    assert max(widths["a1"].values()) <= 1000
