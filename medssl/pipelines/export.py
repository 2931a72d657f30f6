"""Export a pretrained backbone to the formats in which other software reads it."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml

from medssl.atomic import atomic_write, disk_errors
from medssl.errors import ConfigError, WeightsError
from medssl.models.checkpoints import (
    CONTRACT_FILE,
    Contract,
    check_contract,
    find_checkpoint,
    load_backbone,
)
from medssl.models.export import EXPORTS
from medssl.models.export._card import Result, render_card
from medssl.models.export.base import Export, Subject
from medssl.models.origin import beginning
from medssl.pipelines.progress import Progress, silent
from medssl.transforms.preprocessing import PreprocessingConfig

CARD_FILE, FACTS_FILE = "MODEL_CARD.md", "export.json"

NO_LICENCE = "not stated"
"""What documents say of the licence of weights for which none was given."""

_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Exported:
    """What `run` wrote.

    Attributes:
        folder: the export.
        facts: as in ``export.json``: sizes, outputs, the largest difference of each format.
    """

    folder: Path
    facts: dict[str, Any]


def run(
    source: Path,
    formats: Sequence[str],
    out: Path,
    *,
    values: Literal["hu", "arbitrary"] | None = None,
    image_size: tuple[int, ...] | None = None,
    licence: str | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Write a backbone in some formats, each compared with the backbone, with a model card.

    All of it appears at once or not at all: the export is made in a folder beside ``out``, which
    takes its place when every format has been compared.

    Args:
        source: a run folder, a checkpoint folder, or its weight file.
        formats: names of export formats (``medssl list exports``).
        out: the folder to write.
        values: what a MONAI bundle's images will hold; see `Subject`.
        image_size: capture the network at this size alone; None: at any, if it allows.
        licence: of the weights, for the documents.
        overwrite: replace an earlier export.
        progress: receives how far it is.

    Raises:
        WeightsError: there is no checkpoint, a format cannot hold this backbone, or what was
            written differs from it.
        ConfigError: an unknown format, or a folder that is not to be overwritten.
        MachineError: a package is missing, or the disk is full.
    """
    subject, chosen = _prepare(source, formats, values, image_size, licence)
    _check_out(out, overwrite=overwrite)
    facts: dict[str, Any] = {}
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".part"))
        try:
            for number, (name, export) in enumerate(chosen.items()):
                progress("export", number, len(chosen), name)
                facts[name] = export.write(subject, made)
            content = _facts(subject, facts)
            usages = {name: export.usage(subject) for name, export in chosen.items()}
            atomic_write(made / CARD_FILE, _with_usages(subject.card, usages))
            atomic_write(made / CONTRACT_FILE, _public_contract(subject.contract))
            atomic_write(made / FACTS_FILE, json.dumps(content, indent=2) + "\n")
            _let_others_read(made)
            _replace(out, made)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    progress("export", len(chosen), len(chosen))
    return Exported(out, content)


def plan(
    source: Path,
    formats: Sequence[str],
    out: Path,
    *,
    values: Literal["hu", "arbitrary"] | None = None,
    image_size: tuple[int, ...] | None = None,
    licence: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Return what `run` would write, after the same refusals; nothing is touched."""
    subject, chosen = _prepare(source, formats, values, image_size, licence)
    _check_out(out, overwrite=overwrite)
    files = [name for export in chosen.values() for name in export.files(subject)]
    return {
        "backbone": subject.backbone.describe(),
        "pretext": (subject.contract.pretext or {}).get("name", "none"),
        "formats": list(chosen),
        "outputs": list(subject.output_names()),
        "files": [*files, CARD_FILE, CONTRACT_FILE, FACTS_FILE],
        "out": str(out),
    }


def describe(exported: Exported) -> list[str]:
    """Return the outcome in lines for people."""
    lines = []
    for name, facts in exported.facts["formats"].items():
        sizes = f", images of {facts['images']}" if "images" in facts else ""
        lines.append(
            f"{name}: equal to the backbone within {facts['largest_difference']:.1e}{sizes}"
        )
    return lines


def _prepare(
    source: Path,
    formats: Sequence[str],
    values: Literal["hu", "arbitrary"] | None,
    image_size: tuple[int, ...] | None,
    licence: str | None,
) -> tuple[Subject, dict[str, Export]]:
    """Load the checkpoint, and refuse what cannot be exported before anything is written."""
    if not formats:
        raise ConfigError(f"name at least one --format. There are: {', '.join(EXPORTS.names())}.")
    chosen = {name: EXPORTS.load(name)() for name in dict.fromkeys(formats)}
    checkpoint = _one_checkpoint(source)
    backbone, contract = load_backbone(checkpoint)
    if image_size is not None and len(image_size) != contract.spatial_dims:
        raise ConfigError(
            f"--image-size must hold {contract.spatial_dims} numbers of voxels, found "
            f"{' '.join(map(str, image_size))}."
        )
    run_folder = run_of(checkpoint)
    pretext = str((contract.pretext or {}).get("name", "no pretext task"))
    title = pretext if checkpoint.name in ("backbone", _CHECKPOINTS) else checkpoint.name
    first, _ = beginning(contract.model_dump(mode="json"))
    origin = backbone.imagenet_weights if first == "imagenet" else None
    subject = Subject(
        backbone,
        contract,
        title,
        preprocessing=preparation_of(contract, run_folder),
        values=values,
        image_size=image_size,
        card=render_card(
            title,
            backbone,
            contract,
            data=_read_json(run_folder, "data.json"),
            validation=_read_json(checkpoint, "validation.json"),
            results=_results(run_folder, checkpoint.name),
            licence=licence or NO_LICENCE,
            imagenet_licence=origin.licence if origin else None,
        ),
        licence=licence or "",
    )
    for export in chosen.values():
        export.check(subject)
    return subject, chosen


def _one_checkpoint(source: Path) -> Path:
    """Return the checkpoint folder; of a study, which has several, one must be named."""
    folder = source / _CHECKPOINTS
    labels = sorted(path.parent.name for path in folder.glob(f"*/{CONTRACT_FILE}"))
    if labels and "backbone" not in labels:
        raise WeightsError(
            f"the run folder {source.name!r} holds {len(labels)} checkpoint(s). Name one: "
            f"{', '.join(f'{source.name}/{_CHECKPOINTS}/{label}' for label in labels)}."
        )
    return find_checkpoint(source)


def run_of(checkpoint: Path) -> Path | None:
    """Return the run folder that a checkpoint lies in, if it does."""
    folder = checkpoint.resolve().parent
    run_folder = folder.parent
    inside = folder.name == _CHECKPOINTS and (run_folder / "config.yaml").is_file()
    return run_folder if inside else None


def preparation_of(contract: Contract, run_folder: Path | None) -> dict[str, Any] | None:
    """Return how scans were prepared: as the contract says, or else the run's configuration.

    Raises:
        WeightsError: the run's configuration contradicts the contract.
    """
    if contract.preprocessing is not None:
        return contract.preprocessing
    if run_folder is None:
        return None
    content = yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))
    found = PreprocessingConfig.model_validate(content["preprocessing"])
    check_contract(
        contract,
        spacing_mm=found.spacing_mm,
        orientation=found.orientation,
        intensity=found.intensity.model_dump(mode="json"),
        blank=found.blank,
    )
    return found.model_dump(mode="json")


def _results(run_folder: Path | None, label: str) -> list[Result]:
    """Return the verdicts of a run on one of its inits, with intervals; none where it has none."""
    file = run_folder / "results.csv" if run_folder else None
    if file is None or not file.is_file():
        return []
    table = pd.read_csv(file)
    rows = table[(table["init"] == label) & table["selected"].astype(bool)]
    return [
        Result(
            task=str(row["task"]),
            protocol=str(row["protocol"]),
            num_labelled_patients=int(row["num_labelled_patients"]),
            metric=str(row["metric"]),
            value=float(row["value"]),
            low=_number(row["ci_low"]),
            high=_number(row["ci_high"]),
            num_patients=int(row["num_patients"]),
            against=_against(run_folder, row),
        )
        for _, row in rows.iterrows()
    ]


def _against(run_folder: Path | None, row: Any) -> str:
    """Return the difference from the run's reference init, in words."""
    file = run_folder / "comparisons.csv" if run_folder else None
    if file is None or not file.is_file():
        return ""
    table = pd.read_csv(file)
    same = ("init", "task", "protocol", "label_fraction", "num_labelled_patients")
    for _, found in table.iterrows():
        if all(found[name] == row[name] for name in same):
            low, high = _number(found["ci_low"]), _number(found["ci_high"])
            between = "" if low is None or high is None else f" [{low:+.3f}, {high:+.3f}]"
            return f"{found['effect']:+.3f}{between} from {found['reference']}"
    return ""


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _let_others_read(made: Path) -> None:
    """Give folders and files the usual permissions; some libraries write for their user alone."""
    made.chmod(0o755)
    for path in made.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds anything, unless it is an export that may be replaced."""
    if out.is_symlink():
        raise ConfigError(
            f"{out.name!r} is a symbolic link, and an export takes the place of a whole folder. "
            "Give the folder itself as --out."
        )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / FACTS_FILE).is_file():
        raise ConfigError(
            f"{out.name!r} exists and is no export of medssl, so it is left alone. "
            "Choose another --out."
        )
    if not overwrite:
        raise ConfigError(
            f"{out.name!r} already holds an export. Give --overwrite to replace all of it, or "
            "choose another --out."
        )


def _replace(out: Path, made: Path) -> None:
    """Put the new folder into place; the old one, if any, is moved aside and then removed."""
    if not out.exists():
        made.rename(out)
        return
    aside = made.with_name(f"{made.name}.old")
    out.rename(aside)
    try:
        made.rename(out)
    except OSError:
        aside.rename(out)
        raise
    shutil.rmtree(aside)


def _facts(subject: Subject, formats: dict[str, Any]) -> dict[str, Any]:
    backbone = subject.backbone
    return {
        "title": subject.title,
        "backbone": backbone.config.model_dump(mode="json"),
        "weights_sha256": subject.contract.weights_sha256,
        "input": {
            "name": "image",
            "channels": backbone.in_channels,
            "spatial_dims": backbone.spatial_dims,
            "range": [0, 1],
        },
        "outputs": {
            **{
                stage.name: {"channels": stage.channels, "stride": list(stage.stride)}
                for stage in backbone.stages
            },
            "embedding": {"channels": backbone.embedding_channels},
        },
        "formats": formats,
    }


def _public_contract(contract: Contract) -> str:
    """Return the contract with the number of patients in place of their keys."""
    content = contract.model_dump(mode="json")
    content["num_patients"] = len(content.pop("patients"))
    return json.dumps(content, indent=2) + "\n"


def _with_usages(card: str, usages: Mapping[str, str]) -> str:
    parts = [card.rstrip("\n"), "", "## How to load", ""]
    for name, usage in usages.items():
        parts += [f"### {name}", "", usage]
    return "\n".join(parts).rstrip("\n") + "\n"


def _read_json(folder: Path | None, name: str) -> dict[str, Any]:
    """Return what a run wrote beside its weights, or nothing where it did not."""
    file = folder / name if folder else None
    if file is None or not file.is_file():
        return {}
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
