"""A small transfer evaluation for the tests: real scans on disk, a real index, store and tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from medssl.config import ComponentConfig, validate_config
from medssl.pipelines import index as indexing
from medssl.pipelines import prepare
from medssl.pipelines.cells import Evaluation
from medssl.pipelines.pretrain import draw_splits
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
