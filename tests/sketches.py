"""Pretext tasks that only the tests know: they prove what the contract can carry.

Jigsaw (tiles encoded once, several permutations of the embeddings), relative position (a siamese
forward), and several tasks on one backbone with the head swapped by the batch's task.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.models.backbones.base import Backbone
from medssl.pretext.base import PretextBatch, PretextConfig, PretextTask


class SketchConfig(PretextConfig):
    name: str = "sketch"


class _Classifier(PretextTask):
    primary_metric = "accuracy"
    higher_is_better = True
    healthy_range = (0.0, 1.0)

    def loss(self, output: Tensor, batch: PretextBatch) -> Tensor:
        return functional.cross_entropy(output, batch.target)

    def metrics(self, output: Tensor, batch: PretextBatch) -> dict[str, Tensor]:
        return {"accuracy": (output.argmax(1) == batch.target).float().mean()}

    def panels(self, batch: PretextBatch, output: Any) -> list[Any]:
        return []


def tiles_of(images: Tensor) -> Tensor:
    """Cut images (B, C, *S) into 2 tiles an axis: (B, 2**D, C, *S/2)."""
    half = [size // 2 for size in images.shape[2:]]
    parts = []
    for corner in product((0, 1), repeat=len(half)):
        part = images
        for axis, (start, size) in enumerate(zip(corner, half, strict=True), start=2):
            part = part.narrow(axis, start * size, size)
        parts.append(part)
    return torch.stack(parts, dim=1)


class Jigsaw(_Classifier):
    """Tiles are encoded once; each image gets several permutations of its embeddings."""

    num_permutations = 5
    permutations_per_image = 3

    def __init__(self, spatial_dims: int) -> None:
        super().__init__(SketchConfig(name="jigsaw"), spatial_dims)
        num_tiles = 2**spatial_dims
        generator = torch.Generator().manual_seed(0)
        self.permutations = torch.stack(
            [torch.randperm(num_tiles, generator=generator) for _ in range(self.num_permutations)]
        )
        self.chance_level = 1 / self.num_permutations

    def make_batch(self, images: Tensor, generator: torch.Generator) -> PretextBatch:
        tiles = tiles_of(images)
        shape = (len(images), self.permutations_per_image)
        labels = torch.randint(self.num_permutations, shape, generator=generator)
        return PretextBatch(
            inputs=tiles.flatten(0, 1),
            target=labels.flatten(),
            task=self.name,
            extras={"order": self.permutations[labels]},  # (B, P, T)
        )

    def build_head(self, backbone: Backbone) -> nn.Module:
        return nn.Linear(backbone.embedding_channels * 2**self.spatial_dims, self.num_permutations)

    def forward(self, backbone: Backbone, head: nn.Module, batch: PretextBatch) -> Tensor:
        order = batch.extras["order"]
        num_images, _, num_tiles = order.shape
        embedded = backbone.embed(batch.inputs).reshape(num_images, num_tiles, -1)
        shuffled = embedded[torch.arange(num_images)[:, None, None], order]  # (B, P, T, D)
        logits: Tensor = head(shuffled.flatten(2).flatten(0, 1))
        return logits


class RelativePosition(_Classifier):
    """A siamese forward: where does the second tile lie, seen from the first?"""

    def __init__(self, spatial_dims: int) -> None:
        super().__init__(SketchConfig(name="relative_position"), spatial_dims)
        self.chance_level = 1 / (2**spatial_dims - 1)

    def make_batch(self, images: Tensor, generator: torch.Generator) -> PretextBatch:
        tiles = tiles_of(images)
        label = torch.randint(tiles.shape[1] - 1, (len(images),), generator=generator)
        second = tiles[torch.arange(len(images)), label + 1]
        return PretextBatch(torch.cat([tiles[:, 0], second]), label, self.name)

    def build_head(self, backbone: Backbone) -> nn.Module:
        return nn.Linear(2 * backbone.embedding_channels, 2**self.spatial_dims - 1)

    def forward(self, backbone: Backbone, head: nn.Module, batch: PretextBatch) -> Tensor:
        first, second = backbone.embed(batch.inputs).chunk(2)
        logits: Tensor = head(torch.cat([first, second], dim=1))
        return logits


class Multi(PretextTask):
    """One backbone, several heads: each batch says which task made it."""

    primary_metric = "loss"
    higher_is_better = False
    chance_level = None
    healthy_range = (0.0, 1.0)

    def __init__(self, tasks: list[PretextTask]) -> None:
        super().__init__(SketchConfig(name="multi"), tasks[0].spatial_dims)
        self.tasks = {task.name: task for task in tasks}

    def make_batch(self, images: Tensor, generator: torch.Generator) -> PretextBatch:
        chosen = int(torch.randint(len(self.tasks), (), generator=generator))
        return list(self.tasks.values())[chosen].make_batch(images, generator)

    def build_head(self, backbone: Backbone) -> nn.Module:
        return nn.ModuleDict({name: task.build_head(backbone) for name, task in self.tasks.items()})

    def forward(self, backbone: Backbone, head: nn.Module, batch: PretextBatch) -> Any:
        assert isinstance(head, nn.ModuleDict)
        return self.tasks[batch.task].forward(backbone, head[batch.task], batch)

    def loss(self, output: Any, batch: PretextBatch) -> Tensor:
        return self.tasks[batch.task].loss(output, batch)

    def metrics(self, output: Any, batch: PretextBatch) -> dict[str, Tensor]:
        return self.tasks[batch.task].metrics(output, batch)

    def panels(self, batch: PretextBatch, output: Any) -> list[Any]:
        return self.tasks[batch.task].panels(batch, output)
