"""A small transfer evaluation for the tests: real scans on disk, a real index, store and tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from medssl.config import ComponentConfig, validate_config
from medssl.evaluation.features import CaseFeatures
from medssl.evaluation.protocols.base import FrozenConfig, Setting
from medssl.pipelines import index as indexing
from medssl.pipelines import prepare
from medssl.pipelines.cells import Evaluation
from medssl.pipelines.pretraining import draw_splits
from medssl.pipelines.study import StudyConfig
from medssl.pipelines.transfer import build_tasks, labelled_patients, mask_folders
from studies import settings, write_archive


def make_evaluation(folder: Path, **changes: Any) -> Evaluation:
    """Return the evaluation of two inits on the tiny study's archive; CPU."""
    content = settings(write_archive(folder / "archive"), **changes)
    content["inits"] = {"random": {"init": "random"}, "other": {"init": "random"}}
    config = validate_config(content, StudyConfig)
    index = indexing.run(config.index, folder / "index")
    tasks = build_tasks(config, config.sampling, index)
    store = prepare.prepare(
        index, config.preprocessing, folder / "store", masks=mask_folders(config)
    )
    inits = {label: ComponentConfig(name="random") for label in config.inits}
    return Evaluation(
        config, config.backbone, config.sampling, config.seed, torch.device("cpu"), inits,
        dict.fromkeys(inits, ""), index, store,
        draw_splits(config.splits, labelled_patients(tasks, index), config.seed), tasks,
    )  # fmt: skip


@dataclass
class Labels:
    """A task that protocols on frozen features can be run on: answers by scan, and no more."""

    answer: str
    targets: Mapping[str, tuple[float, ...]]
    metric: str = "accuracy"
    dense: bool = False

    @property
    def num_outputs(self) -> int:
        return len(next(iter(self.targets.values())))

    def request(self, base: Any) -> Any:
        return base

    def stratum(self, scan_key: str) -> None:
        return None


def with_task(setting: Setting, task: Any) -> Setting:
    """Return a setting with another task; by its metric all answers are alike."""
    other = replace(setting, task=task, _kept={})
    other.score = lambda scan_keys, scores: 0.0  # type: ignore[method-assign]
    return other


def give_features(
    setting: Setting, config: FrozenConfig, features: dict[str, CaseFeatures], seed: int = 0
) -> None:
    """Let a setting's backbone have given these features."""
    setting._kept[("features", seed, config.max_slices, config.max_features)] = features
