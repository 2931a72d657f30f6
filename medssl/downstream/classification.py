"""Classification: one class a scan, from a table of labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.downstream.base import DownstreamBatch, DownstreamConfig, DownstreamTask
from medssl.errors import LabelError
from medssl.models.backbones.base import Backbone
from medssl.models.heads import PooledHead
from medssl.scans.index import Index
from medssl.scans.labels import read_label_table
from medssl.transforms.sampling import Sample


class Config(DownstreamConfig):
    """Configuration of a classification task.

    Attributes:
        table: CSV or Parquet file with one row a scan, series or patient.
        by: what the rows of the table are about.
        id_column: the column that names the scan's file, the series or the patient.
        label_column: the column that holds the class.
        classes: the classes in order; sorted from the table by default.
        metric: the primary metric, fixed before anything runs.
    """

    name: Literal["classification"] = "classification"
    table: Path
    by: Literal["scan", "series", "patient"] = "scan"
    id_column: str = "scan"
    label_column: str = "label"
    classes: tuple[str, ...] | None = None
    metric: Literal["auc", "balanced_accuracy", "accuracy"] = "auc"


class Classification(DownstreamTask):
    """Predict the class of a scan."""

    kind = "classification"
    answer = "class"
    dense = False

    def __init__(self, config: Config, spatial_dims: int, index: Index) -> None:
        super().__init__(config, spatial_dims, index)
        labels = read_label_table(
            index,
            config.table,
            by=config.by,
            id_column=config.id_column,
            label_column=config.label_column,
        )
        names = {scan_key: _class_name(label) for scan_key, label in labels.items()}
        self.classes = config.classes or tuple(sorted(set(names.values())))
        if len(self.classes) < 2:
            raise LabelError(
                f"classification needs two classes or more; column {config.label_column!r} holds "
                f"{len(self.classes)}. Check the column, or the scans that were rejected."
            )
        unknown = sorted(set(names.values()) - set(self.classes))
        if unknown:
            raise LabelError(
                f"{len(unknown)} values of column {config.label_column!r} are not among the "
                f"classes {list(self.classes)}. Add them to classes, or mend the table."
            )
        self.metric = config.metric
        self.targets: Mapping[str, tuple[float, ...]] = {
            scan_key: (float(self.classes.index(name)),) for scan_key, name in names.items()
        }

    @property
    def num_outputs(self) -> int:
        return len(self.classes)

    def build_head(self, backbone: Backbone) -> nn.Module:
        return PooledHead(backbone.stages[-1].channels, self.num_outputs)

    def batch_of(self, sample: Sample, generator: torch.Generator) -> DownstreamBatch:
        target = torch.tensor([int(self.targets[key][0]) for key in sample.scan_keys])
        device = sample.images.device
        if device.type == "cuda":
            target = target.pin_memory()
        return DownstreamBatch(sample.images, target.to(device, non_blocking=True))

    def forward(self, backbone: Backbone, head: nn.Module, batch: DownstreamBatch) -> Tensor:
        logits: Tensor = head(backbone.embed(batch.inputs))
        return logits

    def loss(self, output: Tensor, batch: DownstreamBatch) -> Tensor:
        return functional.cross_entropy(output.float(), batch.target)

    def metrics(self, output: Tensor, batch: DownstreamBatch) -> dict[str, Tensor]:
        return {"accuracy": (output.argmax(1) == batch.target).float().mean()}

    def case_scores(self, logits: Tensor, masks: Tensor | None) -> list[float]:
        """Return the class probabilities, the mean over the slices of the scan."""
        probabilities: list[float] = logits.float().softmax(1).mean(0).tolist()
        return probabilities


def _class_name(label: str | float) -> str:
    """Return a class's name; 1.0 (a column of whole numbers with a gap) is the class 1."""
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label)
