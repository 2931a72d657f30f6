"""Segmentation: one class a voxel, from mask files with the scans' names.

Dice is computed a case (one scan, all its slices together) on the prepared grid. In 3D the network
sees a case as it saw it in training: in windows of the crops' size, laid over each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from monai.losses import DiceCELoss
from pydantic import Field
from torch import Tensor

from medssl.downstream._per_voxel import VoxelConfig, VoxelTask
from medssl.downstream.base import DownstreamBatch
from medssl.scans.index import Index
from medssl.scans.masks import MaskFolder, match_masks
from medssl.scans.points import PointSource
from medssl.transforms.sampling import Sample


class Config(VoxelConfig):
    """Configuration of a segmentation task.

    Attributes:
        masks: folder with one mask a scan: NIfTI of the scan's own file name, or a DICOM
            segmentation of its series (or a ``masks.csv`` that says which).
        classes: names of the mask's values 1, 2, …, as a segmentation's segments are labelled; 0
            is background.
    """

    name: Literal["segmentation"] = "segmentation"
    masks: Path
    classes: tuple[str, ...] = Field(min_length=1)
    mask: str = "segmentation"


class Segmentation(VoxelTask):
    """Predict the class of every voxel."""

    kind = "segmentation"
    answer = "class"
    metric = "dice"

    def __init__(self, config: Config, spatial_dims: int, index: Index) -> None:
        super().__init__(config, spatial_dims, index)
        self.classes = config.classes
        matched = match_masks(index, config.masks)
        self.labels = matched.report
        self.targets: Mapping[str, tuple[float, ...]] = dict.fromkeys(sorted(matched), ())
        self._loss = DiceCELoss(
            to_onehot_y=True, softmax=True, include_background=False, batch=True
        )

    @classmethod
    def masks(cls, config: Config) -> dict[str, MaskFolder | PointSource]:
        return {config.mask: MaskFolder(config.masks, config.classes)}

    @property
    def num_outputs(self) -> int:
        return len(self.classes) + 1

    def batch_of(self, sample: Sample, generator: torch.Generator) -> DownstreamBatch:
        if sample.masks is None:
            raise ValueError("the sampler was not asked for masks")
        return DownstreamBatch(sample.images, sample.masks)

    def loss(self, output: Tensor, batch: DownstreamBatch) -> Tensor:
        loss: Tensor = self._loss(output.float(), batch.target[:, None])
        return loss

    def metrics(self, output: Tensor, batch: DownstreamBatch) -> dict[str, Tensor]:
        dice = _dice(output.argmax(1), batch.target, self.num_outputs)
        return {"dice": dice.nanmean()}

    def case_scores(self, logits: Tensor, masks: Tensor | None) -> list[float]:
        """Return the Dice of each class over the whole case; NaN where the class is absent."""
        if masks is None:
            raise ValueError("a segmentation case needs its masks")
        scores: list[float] = _dice(
            logits.argmax(1).flatten()[None], masks.flatten()[None], self.num_outputs
        )[0].tolist()
        return scores


def _dice(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Return Dice of the foreground classes, (B, K - 1), from class maps (B, ...).

    NaN where the target lacks the class, as in MONAI's ``compute_dice``, whose own code waits for
    the device at every class.
    """
    scores = []
    for value in range(1, num_classes):
        found, wanted = (prediction == value).flatten(1), (target == value).flatten(1)
        overlap, size = (found & wanted).sum(1), wanted.sum(1)
        dice = 2 * overlap / (found.sum(1) + size)
        scores.append(torch.where(size > 0, dice, math.nan))
    return torch.stack(scores, dim=1)
