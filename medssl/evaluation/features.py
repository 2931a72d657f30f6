"""Features of frozen backbones: computed once, kept while a run lasts, probed many times."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from medssl.atomic import atomic_write
from medssl.models.backbones.base import Backbone, Stage
from medssl.transforms.cases import CaseReader

_CHUNK = 32
"""Slices that go through the backbone at once."""

_MASKS = "#masks"


@dataclass(frozen=True)
class CaseFeatures:
    """What a frozen backbone makes of one scan.

    Attributes:
        scan_key: the scan.
        layers: by stage name; dense: (slices, C, x, y[, z]) float16; else one vector (D,) float32.
        masks: (slices, X, Y[, Z]) where the task is dense.
        padding: for each spatial axis, the voxels of the masks before and after the scan.
    """

    scan_key: str
    layers: dict[str, Tensor]
    masks: Tensor | None
    padding: tuple[tuple[int, int], ...] = ()


def extract_features(
    backbone: Backbone,
    cases: CaseReader,
    *,
    device: torch.device,
    dense: bool,
    max_features: int,
) -> dict[str, CaseFeatures]:
    """Return the features of every case, on the CPU.

    Args:
        backbone: on ``device``; used in evaluation mode.
        cases: scans, or the slices read of them.
        device: where the backbone is.
        dense: keep the maps; otherwise pool each stage to at most ``max_features`` numbers
            (Goyal et al. 2019 pool to about 9,000), as many for every scan whatever its size, and
            average over the slices.
        max_features: see ``dense``.
    """
    backbone.eval()
    crop_size = cases.request.crop_size  # cases are padded to it, so none is smaller
    grids = {stage.name: _grid(stage, crop_size, max_features) for stage in backbone.stages}
    found: dict[str, CaseFeatures] = {}
    with torch.inference_mode():
        for case in cases:
            parts: dict[str, list[Tensor]] = {stage.name: [] for stage in backbone.stages}
            for images in case.images.split(_CHUNK):
                outputs = backbone(images.to(device, non_blocking=True))
                for stage, output in zip(backbone.stages, outputs, strict=True):
                    kept = output if dense else _pool(output, grids[stage.name])
                    parts[stage.name].append(kept.half() if dense else kept.float())
            layers = {name: torch.cat(part).cpu() for name, part in parts.items()}
            if not dense:
                layers = {name: layer.mean(0) for name, layer in layers.items()}
            found[case.scan_key] = CaseFeatures(case.scan_key, layers, case.masks, case.padding)
    return found


def save_features(
    path: Path, features: dict[str, CaseFeatures], init_report: dict[str, Any], init_text: str
) -> None:
    """Write features, and what was loaded into the backbone that made them, atomically."""
    tensors: dict[str, Tensor] = {}
    for key, case in features.items():
        tensors |= {f"{key}/{name}": layer.contiguous() for name, layer in case.layers.items()}
        if case.masks is not None:
            tensors[f"{key}/{_MASKS}"] = case.masks.contiguous()
    names = {key: list(case.layers) for key, case in features.items()}
    padding = {key: case.padding for key, case in features.items()}
    metadata = {
        "layers": json.dumps(names), "padding": json.dumps(padding),
        "init_report": json.dumps(init_report), "init_text": init_text,
    }  # fmt: skip
    atomic_write(path, lambda draft: save_file(tensors, draft, metadata=metadata))


def load_features(path: Path) -> tuple[dict[str, CaseFeatures], dict[str, Any], str] | None:
    """Return what `save_features` wrote; None where there is no whole file.

    Tensors are mapped, not read: processes share them in the page cache.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            held = set(file.keys())
            paddings = json.loads(metadata["padding"])
            features = {}
            for key, names in json.loads(metadata["layers"]).items():
                layers = {name: file.get_tensor(f"{key}/{name}") for name in names}
                masks = f"{key}/{_MASKS}"
                features[key] = CaseFeatures(
                    key,
                    layers,
                    file.get_tensor(masks) if masks in held else None,
                    tuple((before, after) for before, after in paddings[key]),
                )
            return features, json.loads(metadata["init_report"]), metadata["init_text"]
    except (SafetensorError, KeyError, ValueError, OSError):
        return None  # torn: computed anew


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Let one process of this machine at a time compute what goes into a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _grid(stage: Stage, crop_size: Sequence[int], max_features: int) -> list[int]:
    """Return how many cells along each axis a stage is pooled to, the same for every scan."""
    side = max(1, int((max_features / stage.channels) ** (1 / len(crop_size))))
    return [min(side, -(-size // step)) for size, step in zip(crop_size, stage.stride, strict=True)]


def _pool(maps: Tensor, grid: list[int]) -> Tensor:
    """Average maps (B, C, ...) over the cells of a grid; (B, D)."""
    if maps.ndim == 4:
        return functional.adaptive_avg_pool2d(maps, grid).flatten(1)  # type: ignore[arg-type]
    return functional.adaptive_avg_pool3d(maps, grid).flatten(1)  # type: ignore[arg-type]
