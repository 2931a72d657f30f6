"""What is trained: a backbone and the head of one objective."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from medssl.models.backbones.base import Backbone
from medssl.models.build import seeded_construction
from medssl.transforms.sampling import Sample


class Objective(Protocol):
    """What the loop needs of a task, pretext or downstream: batch → output → loss, metrics."""

    name: str

    def batch_of(self, sample: Sample, generator: torch.Generator) -> Any: ...

    def build_head(self, backbone: Backbone) -> nn.Module: ...

    def forward(self, backbone: Backbone, head: nn.Module, batch: Any) -> Any: ...

    def loss(self, output: Any, batch: Any) -> Tensor: ...

    def metrics(self, output: Any, batch: Any) -> dict[str, Tensor]: ...


class Network(nn.Module):
    """A backbone and the head of one objective."""

    def __init__(self, backbone: Backbone, objective: Objective) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = objective.build_head(backbone)
        self._forward = objective.forward

    def forward(self, batch: Any) -> Any:
        return self._forward(self.backbone, self.head, batch)


def build_network(backbone: Backbone, objective: Objective, seed: int) -> Network:
    """Return backbone and head; the head's starting weights are a function of the seed."""
    with seeded_construction(seed, "head"):
        return Network(backbone, objective)
