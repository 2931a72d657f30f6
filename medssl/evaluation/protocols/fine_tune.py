"""Fine-tuning: backbone and head are trained on the labelled patients.

Every init gets the same recipe and budget: the same learning rates are tried for each, in every
cell. The rate, and the step whose weights are kept, are chosen on validation patients. The recipe's
own settings freeze the backbone for the first steps (``training.frozen_steps``) and give it a
rate of its own (``training.backbone_scale``, ``training.layer_decay``).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from medssl.downstream.base import DownstreamTask
from medssl.evaluation.protocols.base import Cell, Prediction, Protocol, ProtocolConfig, Setting
from medssl.randomness import derive_seed
from medssl.training.loop import Calls, start_state, train
from medssl.training.network import build_network
from medssl.training.settings import TrainingConfig
from medssl.training.state import TrainingState
from medssl.transforms.augmentation import AugmentationConfig
from medssl.transforms.sampling import CropSampler

_log = logging.getLogger(__name__)

_CHUNK = 32
"""Slices that go through the network at once."""


class Config(ProtocolConfig):
    """Configuration of fine-tuning.

    Attributes:
        training: steps, batch and rates; the same for every init.
        learning_rates: tried one after the other instead of ``training.learning_rate``, each with
            the same head, batches and steps.
        patience: validations (``training.validate_every``) without a better score after which a
            training ends. None: all steps are made.
        augmentation: what is varied in training.
        validation_slices: slices of a 3D scan that validation looks at, evenly spaced; test
            cases are always whole.
    """

    name: Literal["fine_tune"] = "fine_tune"
    training: TrainingConfig = TrainingConfig(steps=300)
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = ()
    patience: int | None = Field(default=None, gt=0)
    augmentation: AugmentationConfig = AugmentationConfig()
    validation_slices: int = Field(default=8, gt=0)

    @field_validator("training")
    @classmethod
    def _profile_pretraining_alone(cls, training: TrainingConfig) -> TrainingConfig:
        if training.profile:
            raise ValueError("profile records a pretraining; leave it out here")
        return training

    @model_validator(mode="after")
    def _validated_often_enough(self) -> Config:
        if self.patience is not None and not self.training.validate_every:
            raise ValueError(
                "patience counts validations, and training.validate_every is 0; set both or none"
            )
        return self

    def recipes(self) -> list[TrainingConfig]:
        """Return the trainings that are tried in every cell, whatever the init."""
        rates = self.learning_rates or (self.training.learning_rate,)
        return [self.training.model_copy(update={"learning_rate": rate}) for rate in rates]

    def budget(self) -> str:
        number, steps = len(self.recipes()), self.training.steps
        most = "up to " * (self.patience is not None)
        return f"{number} training{'s' * (number > 1)} of {most}{steps} steps"


class FineTune(Protocol):
    """Train everything on the labelled patients."""

    config: Config

    def run(
        self,
        cell: Cell,
        setting: Setting,
        log: Callable[[int, dict[str, float]], None],
    ) -> list[Prediction]:
        labelled = setting.labelled_scans(cell)
        task = setting.task.for_training(labelled)
        val_scans = setting.scans_of(setting.splits.val)
        best = _Best()
        steps_before = 0
        for recipe in self.config.recipes():
            state = self._start(cell, setting, task, recipe)
            watch = _Watch(best, recipe.learning_rate, self.config.patience)

            def logged(step: int, metrics: dict[str, float], before: int = steps_before) -> None:
                log(before + step, metrics)

            def validate(
                _: int, network: nn.Module = state.result, watch: _Watch = watch
            ) -> dict[str, float]:
                scores = predict(network, setting, val_scans, self.config.validation_slices)
                return {"score": watch.see(setting.score(val_scans, scores), network)}

            sampler = CropSampler(
                setting.store,
                labelled,
                task.request(setting.request),
                seed=derive_seed(setting.seed, "fine_tune", cell.seed),
                purpose="fine_tune",
            )
            train(
                state,
                task,
                sampler,
                recipe,
                seed=sampler.seed,
                device=setting.device,
                augmentation=self.config.augmentation,
                calls=Calls(logged, validate, enough=watch.enough),
            )
            steps_before += state.step
        if best.weights is not None:
            state.result.load_state_dict(best.weights)
            log(steps_before, {"val/best_score": best.score, "best_learning_rate": best.rate})
        else:
            _log.warning(
                "the score of validation patients is undefined (perhaps they are all of one "
                "class), so nothing was chosen by it: the last training's last step answers. "
                "Raise splits.val_fraction."
            )
        test_scans = setting.scans_of(setting.splits.test)
        scores = predict(state.result, setting, test_scans, max_slices=None)
        return [
            Prediction("", True, key, setting.task.targets[key], tuple(values))
            for key, values in zip(test_scans, scores, strict=True)
        ]

    def _start(
        self, cell: Cell, setting: Setting, task: DownstreamTask, recipe: TrainingConfig
    ) -> TrainingState:
        """Return the init's backbone with the cell's head, the same one for every init.

        But for the decoder of an init that brings its own.
        """
        backbone = setting.new_backbone(cell.seed)
        network = build_network(backbone, task, derive_seed(setting.seed, "head", cell.seed))
        setting.start_decoder(network.head)
        return start_state(network, recipe, setting.device)


@dataclass
class _Best:
    """The weights that validation patients prefer, over all recipes of a cell."""

    score: float = -math.inf
    rate: float = math.nan
    weights: dict[str, Tensor] | None = None


class _Watch:
    """Follows one training: keeps its weights where they are the best, tells when it is over."""

    def __init__(self, best: _Best, rate: float, patience: int | None) -> None:
        self._best, self._rate, self._patience = best, rate, patience
        self._own_best = -math.inf
        self._in_vain = 0

    def see(self, score: float, network: nn.Module) -> float:
        """Take note of a validation and return its score."""
        self._in_vain = 0 if score > self._own_best else self._in_vain + 1
        self._own_best = self._own_best if math.isnan(score) else max(self._own_best, score)
        if score > self._best.score:
            self._best.score, self._best.rate = score, self._rate
            self._best.weights = copy.deepcopy(network.state_dict())
        return score

    def enough(self) -> bool:
        """Return whether the last validations were in vain."""
        return self._patience is not None and self._in_vain >= self._patience


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
