"""What a downstream task is: labels, a head, a loss, and the scores of a case.

One file a task. The same task object serves training (it is an objective of the one loop) and
evaluation (`DownstreamTask.case_scores`). A case is one scan; where a 2D network looks at a 3D
scan, the case is all slices read of it.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from medssl.config import ComponentConfig, Label
from medssl.models.backbones.base import Backbone
from medssl.scans.index import Index
from medssl.scans.label_report import LabelReport
from medssl.scans.labels import By
from medssl.scans.masks import MaskFolder
from medssl.scans.points import PointSource
from medssl.transforms.cases import Case
from medssl.transforms.sampling import Sample, SampleRequest

Answer = Literal["class", "labels", "numbers"]
"""One of ``num_outputs`` classes; that many labels, each yes or no; or that many real numbers."""


class DownstreamConfig(ComponentConfig):
    """Base of the configurations of downstream tasks.

    Attributes:
        label: what the task is called in tables and figures; the task's name by default.
    """

    label: Label | None = None


class TableConfig(DownstreamConfig):
    """Base of the configurations of tasks whose labels stand in a table.

    Attributes:
        table: CSV or Parquet file with one row a scan, series or patient.
        by: what the rows of the table are about.
        id_column: the column that names the scan's file, the series or the patient.
    """

    table: Path
    by: By = "scan"
    id_column: str = "scan"


@dataclass(frozen=True)
class DownstreamBatch:
    """One labelled batch, on the device: inputs (B, C, X, Y[, Z]) and their target."""

    inputs: Tensor
    target: Tensor


class DownstreamTask(ABC):
    """Base of every downstream task.

    Args:
        config: the member's own ``Config``.
        spatial_dims: 2 or 3.
        index: the scans; labels are read, and matched to keys, when the task is built.

    Attributes:
        kind: written to the predictions; tells what ``scores`` holds.
        metric: the primary metric, a name in `medssl.evaluation.metrics.METRICS`.
        answer: what the outputs mean.
        dense: whether there is one answer a voxel (probed a voxel at a time) or one a scan.
        classes: names of the answers, in the order of ``scores``.
        targets: what is known of every labelled scan, by scan key: its class, its labels (1, 0, or
            NaN where unknown) or its numbers; empty where the label is a mask.
        labels: what did not fit between the labels and the scans.
    """

    kind: ClassVar[str]
    metric: str
    answer: ClassVar[Answer]
    dense: ClassVar[bool]
    classes: tuple[str, ...]
    targets: Mapping[str, tuple[float, ...]]
    labels: LabelReport

    def __init__(self, config: Any, spatial_dims: int, index: Index) -> None:
        self.config: Any = config
        self.name: str = config.label or config.name
        self.spatial_dims = spatial_dims
        self.labels = LabelReport()  # a member that reads labels puts theirs here

    @classmethod
    def masks(cls, config: Any) -> Mapping[str, MaskFolder | PointSource]:  # noqa: ARG003
        """Return the masks, or points, to be prepared with the scans, by the mask's name."""
        return {}

    def stratum(self, scan_key: str) -> int | None:
        """Return the class by which splits are stratified; None where there is none."""
        return int(self.targets[scan_key][0]) if self.answer == "class" and not self.dense else None

    @property
    def digest(self) -> str:
        """The sha256 of the labels by scan; masks are part of the store's own digest."""
        text = json.dumps([self.classes, sorted(self.targets.items())])
        return hashlib.sha256(text.encode()).hexdigest()

    def request(self, base: SampleRequest) -> SampleRequest:
        """Return what the task needs of the sampler, starting from the configured crop."""
        return base

    def for_training(self, scan_keys: Sequence[str]) -> DownstreamTask:
        """Return the task as it is trained on some scans, whose labels alone it may look at.

        Call it before a head is built: the copy knows, for example, the mean of their numbers.
        """
        return self

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """Number of channels of the head's output, background included."""

    @abstractmethod
    def build_head(self, backbone: Backbone) -> nn.Module:
        """Return the task's own layers for a backbone."""

    @abstractmethod
    def batch_of(self, sample: Sample, generator: torch.Generator) -> DownstreamBatch:
        """Return the labelled batch for what the sampler read."""

    @abstractmethod
    def forward(self, backbone: Backbone, head: nn.Module, batch: DownstreamBatch) -> Tensor:
        """Return the logits: (B, K), or (B, K, X, Y[, Z]) where dense."""

    @abstractmethod
    def loss(self, output: Tensor, batch: DownstreamBatch) -> Tensor:
        """Return the scalar loss."""

    @abstractmethod
    def metrics(self, output: Tensor, batch: DownstreamBatch) -> dict[str, Tensor]:
        """Return scalar metrics on the device, without synchronising."""

    def infer(
        self,
        network: Callable[[DownstreamBatch], Tensor],
        images: Tensor,
        crop_size: tuple[int, ...],
    ) -> Tensor:
        """Return the logits of whole images (B, C, X, Y[, Z]) of any size.

        Args:
            network: answers a batch; its target is not looked at.
            images: on the device.
            crop_size: what the network was trained on.
        """
        return network(DownstreamBatch(images, images))

    def score_case(self, logits: Tensor, case: Case) -> list[float]:
        """Return the scores of one scan from the logits of all its images.

        Where there is a mask, voxels that pad the scan to the crop's size do not count: they are
        not of the patient.
        """
        if case.masks is None:
            return self.case_scores(logits, None)
        return self.case_scores(case.unpad(logits), case.unpad(case.masks).to(logits.device))

    @abstractmethod
    def case_scores(self, logits: Tensor, masks: Tensor | None) -> list[float]:
        """Return the scores of one scan.

        Args:
            logits: of all slices of the scan (B, K[, X, Y]) or of the volume (1, K[, X, Y, Z]).
            masks: the label masks (B, X, Y[, Z]) where the task has any.
        """
