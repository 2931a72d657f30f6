"""The kinds of config files: how to tell them apart, and their JSON Schemas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medssl.atomic import atomic_write
from medssl.config import Config, load_config, read_yaml
from medssl.errors import ConfigError
from medssl.pipelines.prepare import PrepareConfig
from medssl.pipelines.pretrain import PretrainConfig
from medssl.pipelines.study import StudyConfig
from medssl.pipelines.transfer import TransferConfig
from medssl.scans.building import IndexConfig

KINDS: dict[str, type[Config]] = {
    "index": IndexConfig,
    "prepare": PrepareConfig,
    "pretrain": PretrainConfig,
    "transfer": TransferConfig,
    "study": StudyConfig,
}


def load_any(path: Path, overrides: Sequence[str] = ()) -> tuple[str, Config]:
    """Read a config file of any kind; the kind is told by its keys.

    Raises:
        ConfigError: it is of no kind, or does not fit its kind.
    """
    keys = set(read_yaml(path))
    fitting = {kind: len(keys & set(cls.model_fields)) for kind, cls in KINDS.items()}
    kind = max(fitting, key=lambda name: (fitting[name], -len(KINDS[name].model_fields)))
    if not fitting[kind]:
        raise ConfigError(
            f"{path.name} has none of the keys of a config file (index, prepare, pretrain, "
            "transfer, study). Start from a file in configs/."
        )
    return kind, load_config(path, KINDS[kind], overrides)


def schema(kind: str) -> dict[str, Any]:
    """Return the JSON Schema of one kind of config.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"there is no kind of config {kind!r}. There are: {', '.join(KINDS)}.")
    return KINDS[kind].model_json_schema()


def write_schemas(folder: Path) -> None:
    """Write the JSON Schema of every kind into a folder."""
    for kind in KINDS:
        atomic_write(folder / f"{kind}.json", json.dumps(schema(kind), indent=2) + "\n")
