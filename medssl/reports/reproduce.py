"""How to do a run again: commands, configuration, seeds, digests; no place of anybody's disk."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from medssl.reports.contents import Contents
from medssl.scans.datasets import DATASETS

_ABSOLUTE = re.compile(r"^(/|~|\\\\|[A-Za-z]:[\\/])")
_CHANGED = "+changes"


@dataclass(frozen=True)
class Step:
    """One step, in words, and its commands."""

    words: str
    commands: str = ""


def steps(contents: Contents) -> list[Step]:
    """Return what to do, one after the other; empty where the folder holds no configuration."""
    if not contents.config:
        return []
    kind = kind_of(contents.config)
    if kind == "compare":
        return [*_code(contents), _comparison(contents), _report()]
    found = [*_code(contents)]
    dataset = str(contents.data.get("dataset") or "")
    if dataset in DATASETS.names():
        found.append(
            Step("Fetch the data set, with its checksums.", f"medssl datasets fetch {dataset}")
        )
    if kind != "study":
        found.append(
            Step("Index the scans; the digest of the index is among the digests below.",
                 "medssl index FOLDER_OF_THE_SCANS")
        )  # fmt: skip
    found.append(
        Step(
            "Save the configuration below as config.yaml, and fill in folders, files and columns "
            "of your own: what reads (withheld) or begins with …/.",
            shlex.join(["medssl", kind, "config.yaml", "--out", f"runs/{contents.name}"]),
        )
    )
    return [*found, _report()]


def kind_of(config: dict[str, Any]) -> str:
    """Return the command that a configuration is for."""
    if "runs" in config:
        return "compare"
    if "pretext" in config:
        return "pretrain"
    return "study" if "workspace" in config or "tasks" not in config else "transfer"


def seeds(contents: Contents) -> str:
    """Return the seeds in words; empty where none is known."""
    config, matrix = contents.config, contents.config.get("matrix")
    found = [f"{config['seed']} for splits, puzzles and pretraining"] if "seed" in config else []
    if isinstance(matrix, dict) and matrix.get("seeds"):
        found.append(f"{', '.join(map(str, matrix['seeds']))} for the cells")
    return "; ".join(found)


def digests(contents: Contents) -> list[tuple[str, str]]:
    """Return all digests in full, by what they are of."""
    facts = contents.provenance
    pinned = facts.get("data")
    weights = {
        f"weights of {name}": report.get("sha256")
        for name, report in (facts.get("inits") or {}).items()
    }
    named = {
        "configuration": facts.get("config_digest"),
        **(pinned if isinstance(pinned, dict) else {}),
        **weights,
    }
    return [(str(name), str(digest)) for name, digest in named.items() if digest]


def config_to_show(contents: Contents) -> str:
    """Return the configuration as YAML, as it may travel: the page goes to MLflow and to others.

    It is the run's own public copy (`medssl.tracking.privacy`), without folders, files, columns,
    patterns and salts, which name accounts, projects and sometimes patients. Where there is none,
    absolute paths and servers are cut short.
    """
    if contents.public_config or not contents.config:
        return contents.public_config
    return yaml.safe_dump(
        without_places(contents.config), sort_keys=False, allow_unicode=True, width=100
    )


def without_places(value: Any) -> Any:
    """Return a value of a configuration with its absolute paths and addresses cut short."""
    if isinstance(value, dict):
        return {key: without_places(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_places(part) for part in value]
    if isinstance(value, str) and "://" in value:
        return f"{value.partition('://')[0]}://…"
    if isinstance(value, str) and _ABSOLUTE.match(value):
        last = re.split(r"[\\/]", value.rstrip("\\/"))[-1]
        return f"…/{last}"
    return value


def _code(contents: Contents) -> list[Step]:
    commit = str(contents.provenance.get("git_commit") or "")
    if not commit:
        return []
    words = "Take the same code and packages."
    if commit.endswith(_CHANGED):
        words = "Take the same code and packages; the code had changes that no commit holds."
    return [Step(words, f"git checkout {commit.removesuffix(_CHANGED)}\nmake setup")]


def _comparison(contents: Contents) -> Step:
    runs = [f"runs/{name}" for name in contents.config["runs"]]
    reference = contents.config["statistics"]["reference"]
    command = ["medssl", "compare", *runs, "--reference", reference, "--out"]
    return Step(
        "Compare the run folders; their predictions are all that is needed.",
        shlex.join([*command, f"runs/{contents.name}"]),
    )


def _report() -> Step:
    return Step("Make this page again, from a run folder alone.", "medssl report RUN_FOLDER")
