"""What each backbone is: parameters, ImageNet weights, and images a second on this CPU.

    make bench

A table is printed; nothing is asserted about time. Speed is of features in evaluation mode, of one
thread's batch of grey images, 2D: 128 x 128, 3D: 64 x 64 x 32.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch

from medssl.config import ComponentConfig
from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import Backbone
from medssl.models.backbones.torchvision import Variant
from medssl.models.build import seeded_construction

_ROUNDS = 3
_BATCH = 4
_SIZE = {2: (128, 128), 3: (64, 64, 32)}

TIMM = (
    "efficientnet_lite0",
    "mobilenetv3_small_100",
    "resnet18",
    "convnext_atto",
    "regnety_002",
    "vit_tiny_patch16_224",
)
MONAI: tuple[dict[str, Any], ...] = (
    {"variant": "resnet", "depth": 18},
    {"variant": "densenet"},
    {"variant": "segresnet", "base_channels": 16},
    {"variant": "swin_unetr", "base_channels": 24},
)


def configs() -> Iterator[ComponentConfig]:
    """Yield what the table lists; families that this file does not know, with their defaults."""
    for variant in get_args(Variant):
        yield BACKBONES.config_class("torchvision")(variant=variant)
    for variant in TIMM:
        yield BACKBONES.config_class("timm")(variant=variant)
    for settings in MONAI:
        if settings["variant"] == "swin_unetr" and importlib.util.find_spec("einops") is None:
            continue
        for dims in (2, 3):
            yield BACKBONES.config_class("monai")(**settings, spatial_dims=dims)
    if "inflated" in BACKBONES.names():
        for inner in ("resnet18", "efficientnet_b0"):
            yield BACKBONES.config_class("inflated").model_validate(
                {"name": "inflated", "backbone": {"name": "torchvision", "variant": inner}}
            )


def source_of_imagenet(backbone: Backbone) -> str:
    weights = backbone.imagenet_weights
    if weights is None:
        return "none"
    if weights.package:
        return f"package {weights.package}"
    place = (weights.url or "").split("/")[2]
    known = f"sha256 {weights.sha256}" if weights.sha256 else "sha256 by config"
    return f"{place}, {known}"


def images_per_second(backbone: Backbone) -> float:
    x_BC = torch.rand(_BATCH, 1, *_SIZE[backbone.spatial_dims])
    taken = []
    with torch.inference_mode():
        backbone.eval()(x_BC)  # warm up
        for _ in range(_ROUNDS):
            begun = time.perf_counter()
            features = backbone(x_BC)
            taken.append(time.perf_counter() - begun)
    assert all(bool(torch.isfinite(feature).all()) for feature in features)
    return _BATCH / statistics.median(taken)


@pytest.mark.timeout(1800)
def test_table_of_backbones(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("backbone", "dims", "parameters", "ImageNet from", "inflated", "images/s")]
    for config in configs():
        with seeded_construction(0, "bench"):
            backbone = BACKBONES.build(config, in_channels=1)
        parameters = sum(parameter.numel() for parameter in backbone.parameters())
        name = f"{config.name} {getattr(config, 'variant', '')}".strip()
        if config.name == "inflated":
            name = f"inflated {config.backbone.variant}"
        rows.append(
            (
                name,
                f"{backbone.spatial_dims}D",
                f"{parameters / 1e6:.1f} M",
                source_of_imagenet(backbone),
                "yes" if config.name == "inflated" else "no",
                f"{images_per_second(backbone):.1f}",
            )
        )
        del backbone
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    with capsys.disabled():
        print()
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    assert len(rows) > len(get_args(Variant)) + len(TIMM)
