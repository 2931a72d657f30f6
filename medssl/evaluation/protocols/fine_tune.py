"""Fine-tuning: backbone and head are trained on the labelled patients.

Every init gets the same recipe and budget. The step whose weights are kept is chosen on validation
patients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from medssl.evaluation.protocols.base import Cell, Prediction, Protocol, ProtocolConfig, Setting
from medssl.randomness import derive_seed
from medssl.training.loop import Calls, start_state, train
from medssl.training.network import build_network
from medssl.training.settings import TrainingConfig
from medssl.transforms.augmentation import AugmentationConfig
from medssl.transforms.sampling import CropSampler

_CHUNK = 32
"""Slices that go through the network at once."""


class Config(ProtocolConfig):
    """Configuration of fine-tuning.

    Attributes:
        training: steps, batch and rates; the same for every init.
        augmentation: what is varied in training.
        validation_slices: slices of a 3D scan that validation looks at, evenly spaced; test
            cases are always whole.
    """

    name: Literal["fine_tune"] = "fine_tune"
    training: TrainingConfig = TrainingConfig(steps=300)
    augmentation: AugmentationConfig = AugmentationConfig()
    validation_slices: int = Field(default=8, gt=0)

    @field_validator("training")
    @classmethod
    def _profile_pretraining_alone(cls, training: TrainingConfig) -> TrainingConfig:
        if training.profile:
            raise ValueError("profile records a pretraining; leave it out here")
        return training


class FineTune(Protocol):
    """Train everything on the labelled patients."""

    config: Config

    def run(
        self,
        cell: Cell,
        setting: Setting,
        log: Callable[[int, dict[str, float]], None],
    ) -> list[Prediction]:
        training = self.config.training
        backbone = setting.new_backbone(cell.seed)
        head_seed = derive_seed(setting.seed, "head", cell.seed)
        labelled = setting.labelled_scans(cell)
        task = setting.task.for_training(labelled)
        network = build_network(backbone, task, head_seed)
        state = start_state(network, training, setting.device)
        val_scans = setting.scans_of(setting.splits.val)
        best: dict[str, Any] = {"score": -float("inf"), "weights": None}

        def validate(_: int) -> dict[str, float]:
            scores = predict(state.result, setting, val_scans, self.config.validation_slices)
            score = setting.score(val_scans, scores)
            if score > best["score"]:
                best.update(score=score, weights=copy.deepcopy(state.result.state_dict()))
            return {"score": score}

        train(
            state,
            task,
            CropSampler(
                setting.store,
                labelled,
                task.request(setting.request),
                seed=derive_seed(setting.seed, "fine_tune", cell.seed),
                purpose="fine_tune",
            ),
            training,
            seed=derive_seed(setting.seed, "fine_tune", cell.seed),
            device=setting.device,
            augmentation=self.config.augmentation,
            calls=Calls(log, validate),
        )
        if best["weights"] is not None:
            state.result.load_state_dict(best["weights"])
        test_scans = setting.scans_of(setting.splits.test)
        scores = predict(state.result, setting, test_scans, max_slices=None)
        return [
            Prediction("", True, key, setting.task.targets[key], tuple(values))
            for key, values in zip(test_scans, scores, strict=True)
        ]


def predict(
    network: nn.Module, setting: Setting, scan_keys: Sequence[str], max_slices: int | None
) -> list[list[float]]:
    """Return the scores of whole cases, in the order of ``scan_keys``."""
    network.eval()
    found = []
    with torch.inference_mode():
        for case in setting.cases(scan_keys, max_slices):
            outputs = []
            for images in case.images.split(_CHUNK):
                images = images.to(setting.device, non_blocking=True)
                outputs.append(setting.task.infer(network, images, setting.request.crop_size))
            found.append(setting.task.score_case(torch.cat(outputs), case))
    return found
