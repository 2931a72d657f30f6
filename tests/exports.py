"""Small checkpoints for the tests of exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import Backbone
from medssl.models.build import seeded_construction
from medssl.models.checkpoints import Contract, save_checkpoint
from medssl.models.export.base import Subject

MONAI_3D = {"name": "monai", "depth": 10, "base_channels": 4}
MONAI_2D = {**MONAI_3D, "spatial_dims": 2}
PATIENT_KEY = "0123456789abcdef"


def make_backbone(settings: dict[str, Any], in_channels: int = 1) -> Backbone:
    """Return a backbone of random weights, batch norms included, in evaluation mode."""
    config = BACKBONES.config_class(settings["name"]).model_validate(settings)
    with seeded_construction(3, "export"):
        backbone = BACKBONES.build(config, in_channels=in_channels)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in backbone.state_dict().items():
        if name.endswith("running_mean"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return backbone.eval()


def make_contract(backbone: Backbone, **changes: Any) -> Contract:
    """Return a contract that fits a backbone."""
    dims = backbone.spatial_dims
    intensity = {"kind": "percentile", "lower": 0.5, "upper": 99.5, "window_hu": [-1000.0, 1000.0]}
    content: dict[str, Any] = {
        "spacing_mm": (1.0, 1.0, 2.0),
        "orientation": "RAS",
        "axis_order": "CXYZ" if dims == 3 else "CXY",
        "intensity": intensity,
        "preprocessing": {"spacing_mm": [1.0, 1.0, 2.0], "intensity": intensity},
        "in_channels": backbone.in_channels,
        "spatial_dims": dims,
        "plane": "coronal" if dims == 2 else None,
        "backbone": backbone.config.model_dump(mode="json"),
        "init": {"name": "random", "source": "random", "sha256": None},
        "pretext": {"name": "rotation"},
        "index_digest": "a" * 64,
        "store_digest": "b" * 64,
        "patients": (PATIENT_KEY,),
        "num_scans": 2,
        "seed": 7,
        "steps": 100,
        "package_versions": {},
    }
    return Contract(**{**content, **changes})


def make_checkpoint(folder: Path, settings: dict[str, Any], **changes: Any) -> Path:
    """Write the checkpoint of a small backbone, and return its folder."""
    backbone = make_backbone(settings)
    save_checkpoint(folder, backbone, make_contract(backbone, **changes))
    return folder


def make_subject(backbone: Backbone, **changes: Any) -> Subject:
    """Return what a format exports."""
    contract = changes.pop("contract", None) or make_contract(backbone)
    facts: dict[str, Any] = {
        "title": "rotation",
        "preprocessing": contract.preprocessing,
        "card": "# rotation\n",
    }
    return Subject(backbone, contract, **{**facts, **changes})
