"""A finished study opened again: its configuration, its inits, and the data it worked on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from medssl.config import ComponentConfig, load_config
from medssl.errors import ConfigError, DataError, WeightsError
from medssl.models.checkpoints import CONTRACT_FILE, WEIGHTS_FILE
from medssl.models.inits.checkpoint import Config as CheckpointConfig
from medssl.pipelines import prepare
from medssl.pipelines.cells import Evaluation
from medssl.pipelines.facts import data_digests
from medssl.pipelines.study import StudyConfig
from medssl.pipelines.transfer import build_tasks
from medssl.scans.index import Index
from medssl.scans.splits import Splits
from medssl.scans.store import Store
from medssl.training.devices import select_device


def study_of(run_folder: Path) -> StudyConfig:
    """Return the configuration of a study from its run folder.

    Raises:
        ConfigError: the folder holds no study.
    """
    file = run_folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(
            f"{run_folder.name!r} is not the run folder of a study: it has no config.yaml. "
            "Give the folder that medssl study wrote."
        )
    return load_config(file, StudyConfig)


def inits_of(config: StudyConfig, run_folder: Path) -> dict[str, ComponentConfig]:
    """Return each init as the study's matrix has it; a pretrained one is its checkpoint.

    Raises:
        WeightsError: a backbone is not pretrained yet.
    """
    inits: dict[str, ComponentConfig] = {}
    missing = []
    for label, init in config.inits.items():
        checkpoint = run_folder / "checkpoints" / label
        if init.pretext is None:
            inits[label] = init.init
            continue
        inits[label] = CheckpointConfig(path=checkpoint)
        if not all((checkpoint / name).is_file() for name in (CONTRACT_FILE, WEIGHTS_FILE)):
            missing.append(label)
    if missing:
        raise WeightsError(
            f"the run folder {run_folder.name!r} has no pretrained backbone for "
            f"{', '.join(missing)} (looked for checkpoints/{missing[0]}/{WEIGHTS_FILE} and its "
            f"{CONTRACT_FILE}). Let the study finish first: give its medssl study command again."
        )
    return inits


def evaluation_of(
    config: StudyConfig, run_folder: Path, inits: Mapping[str, ComponentConfig]
) -> Evaluation:
    """Open what the study worked on.

    Raises:
        DataError: index, store or splits are gone, or have changed since.
    """
    index = Index.open(config.workplace / "index").select(config.select)
    store = Store.open(prepare.store_folder(config.workplace, config.preprocessing))
    splits = Splits.read(run_folder / "splits.json")
    tasks = build_tasks(config, config.sampling, index)
    digests = data_digests(index, store, splits, tasks.values())
    pinned = _pinned(run_folder)
    changed = [name for name, digest in digests.items() if pinned.get(name, digest) != digest]
    if changed:
        raise DataError(
            f"the data have changed since the study was run ({', '.join(changed)}), so its "
            "patients and weights may no longer fit them. Bring the earlier data back, or run "
            "the study again in a new folder."
        )
    pretexts = {
        label: init.pretext.name if init.pretext else "" for label, init in config.inits.items()
    }
    return Evaluation(
        config, config.backbone, config.sampling, config.seed, select_device(config.device),
        inits, pretexts, index, store, splits, tasks,
    )  # fmt: skip


def _pinned(run_folder: Path) -> dict[str, str]:
    """Return the digests of the data that the study was started on; empty where unknown."""
    try:
        content = json.loads((run_folder / "provenance.json").read_text(encoding="utf-8"))
        return dict(content["data"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
