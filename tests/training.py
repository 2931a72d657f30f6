"""Small trainings for the tests: a store of blobs, a tiny network, one of the pretext tasks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import Backbone
from medssl.models.build import build_backbone
from medssl.models.inits import INITS
from medssl.pretext import PRETEXT_TASKS
from medssl.pretext.base import PretextTask
from medssl.scans.store import Store
from medssl.training.distributed import Ranks
from medssl.training.loop import Calls, start_state, train
from medssl.training.network import build_network
from medssl.training.settings import TrainingConfig
from medssl.training.state import TrainingState
from medssl.transforms.augmentation import AugmentationConfig
from medssl.transforms.sampling import CropSampler, Sample, SampleRequest
from stores import make_store

CPU = torch.device("cpu")
CROP = {2: (16, 16), 3: (12, 12, 12)}
FLIPPED = AugmentationConfig(flip_axes=("X",))
SETTINGS: dict[str, dict[str, Any]] = {
    "rotation": {"name": "rotation", "views": 2},
    "inpainting": {"name": "inpainting", "block": 4},
    "jigsaw": {"name": "jigsaw", "num_permutations": 10, "permutations_per_image": 3},
    "relative_position": {"name": "relative_position", "neighbours": 4},
    "slice_order": {"name": "slice_order", "step": 1},
    "multi": {
        "name": "multi",
        "tasks": [{"name": "rotation", "views": 2}, {"name": "inpainting", "block": 4}],
    },
}
EVERY_TASK = [
    (name, dims)
    for name in SETTINGS
    for dims in (2, 3)
    if dims in PRETEXT_TASKS.load(name).supported_dims
]
"""Tasks that scans of one sequence serve, and the dimensions they exist in."""


def blobs(num_scans: int = 4, shape: tuple[int, int, int] = (20, 22, 18)) -> dict[str, np.ndarray]:
    """Return scans of smooth blobs on a slope, each another, in [0, 1]."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    scans = {}
    for number in range(num_scans):
        generator = np.random.default_rng(number)
        volume = 0.2 + 0.2 * grid[..., 0] / shape[0]
        for _ in range(5):
            centre, width = generator.uniform(0, shape), generator.uniform(2, 5)
            distance = ((grid - centre) ** 2).sum(-1)
            volume = volume + generator.uniform(0.1, 0.4) * np.exp(-distance / (2 * width**2))
        scans["abcdefgh"[number] + "1"] = volume.clip(0, 1)
    return scans


def blob_store(folder: Path) -> Store:
    """Return a store of four scans of blobs."""
    return make_store(folder, blobs())


def pretext_task(name: str, dims: int) -> PretextTask:
    """Return a pretext task with the settings of these tests."""
    config = PRETEXT_TASKS.config_class(name).model_validate(SETTINGS[name])
    return PRETEXT_TASKS.build(config, dims)


def tiny_backbone(dims: int, seed: int = 0) -> Backbone:
    """Return the smallest residual network, for images of one channel."""
    config = BACKBONES.config_class("monai")(
        depth=10, spatial_dims=dims, base_channels=8, stem_stride=1
    )
    return build_backbone(config, INITS.config_class("random")(), in_channels=1, seed=seed)[0]


@dataclass
class Training:
    """One training, and what it told."""

    store: Store
    task: PretextTask
    config: TrainingConfig
    seed: int = 5
    device: torch.device = CPU
    augmentation: AugmentationConfig = FLIPPED
    logged: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def state(self) -> TrainingState:
        """Return a state before the first step."""
        network = build_network(tiny_backbone(self.task.spatial_dims), self.task, seed=1)
        return start_state(network, self.config, self.device)

    def sampler(self) -> CropSampler:
        """Return the sampler of its crops."""
        dims = self.task.spatial_dims
        base = SampleRequest(dims, CROP[dims], "axial" if dims == 2 else None)
        return CropSampler(
            self.store, self.store.scan_keys, self.task.request(base), self.seed, "train"
        )

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        self.logged.append((step, metrics))

    def run(
        self,
        state: TrainingState,
        *,
        ranks: Ranks | None = None,
        seen: list[str] | None = None,
        **calls: Any,
    ) -> TrainingState:
        """Train to the end of the configured steps.

        Args:
            state: what moves.
            ranks: the processes that share each step.
            seen: receives a digest of each crop that this process read.
            calls: see `Calls`.
        """
        sampler = self.sampler()
        if seen is not None:
            sampler = _Seen(sampler, seen)
        train(
            state,
            self.task,
            sampler,
            self.config,
            seed=self.seed,
            device=self.device,
            augmentation=self.augmentation,
            calls=Calls(**{"log": self._log, **calls}),
            ranks=ranks,
        )
        return state


class _Seen(CropSampler):
    """A sampler that notes a digest of every crop it cuts."""

    def __init__(self, sampler: CropSampler, seen: list[str]) -> None:
        self.__dict__.update(sampler.__dict__)
        self._seen = seen

    def batch(self, step: int, size: int) -> Sample:
        sample = super().batch(step, size)
        self._seen += [
            hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in sample.images
        ]
        return sample


def configured(**settings: Any) -> TrainingConfig:
    """Return how to train: batches of four, logged at every step."""
    return TrainingConfig(**{"steps": 4, "global_batch_size": 4, "log_every": 1, **settings})
