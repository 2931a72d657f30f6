"""Register pretrained backbones as MLflow models: after a run, repeatable, never in its way."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from medssl.atomic import disk_errors
from medssl.config import validate_config
from medssl.errors import ConfigError, MedsslError, WeightsError
from medssl.evaluation.statistics.families import BETTER, WORSE
from medssl.models.checkpoints import (
    CONTRACT_FILE,
    WEIGHTS_FILE,
    Contract,
    find_checkpoint,
    lineage,
    load_backbone,
    load_contract,
    read_weights,
)
from medssl.models.export.base import Subject
from medssl.models.export.program import write_program
from medssl.pipelines.export import preparation_of, run_of
from medssl.pipelines.serving import SERVING_FILE, serving_facts
from medssl.provenance import package_versions
from medssl.tracking.base import TrackingConfig
from medssl.tracking.client import URI_VARIABLE
from medssl.tracking.publishing import Published, Source, publish_model
from medssl.tracking.pyfunc import CHECKPOINT, Pieces, write_model

log = logging.getLogger(__name__)

CANDIDATE = "candidate"
"""Alias of the version that was registered last, and is to be tried."""

_CODE = Path(__file__).with_name("served_model.py")
_CHECKPOINTS = "checkpoints"
_REQUIRED = ("medssl", "mlflow", "torch")
_EXAMPLE_BATCH = 2  # of one, a program would take the size for a constant
_EXAMPLE_SIZE = 8  # voxels along each axis: the example is text
_NOT_IN_AN_ALIAS = re.compile(r"[^\w-]+")


@dataclass(frozen=True)
class Choice:
    """The init that a study's verdicts name for a task.

    Attributes:
        init: its label; empty where the verdicts name none.
        reason: in words.
    """

    init: str
    reason: str


def run(
    source: Path, name: str, alias: str | None = None, *, store: str | None = None
) -> list[Published]:
    """Register a checkpoint, or every checkpoint of a study, and set their aliases.

    Of a study every pretrained init becomes a version with the alias ``candidate_<init>``, and the
    one that `best_by_verdict` names for a task gets ``best_for_<task>``. Anything else becomes one
    version with the alias ``candidate``, unless another is given.

    Args:
        source: a run folder, a checkpoint folder, or its weight file.
        name: of the registered model.
        alias: instead of ``candidate``.
        store: tracking URI; by default that of the run, of the environment, or of the database
            beside the run.

    Raises:
        WeightsError: there is no checkpoint, or its files do not belong together.
        ConfigError: the name or the alias makes no URI, or an alias is given for several versions.
        MachineError: the registry does not answer. Repeat it: what is there is found again.
    """
    labels = _labels_of(source)
    if not labels:
        return [_publish(find_checkpoint(source), name, [alias or CANDIDATE], {}, store)]
    if alias is not None:
        raise ConfigError(
            f"one alias cannot name the {len(labels)} versions of a study. Leave --alias out, or "
            f"name one checkpoint: {source.name}/{_CHECKPOINTS}/{labels[0]}."
        )
    aliases = {label: [alias_of(CANDIDATE, label)] for label in labels}
    notes: dict[str, dict[str, str]] = {label: {} for label in labels}
    for task, choice in best_by_verdict(source).items():
        if choice.init in aliases:
            aliases[choice.init].append(alias_of("best_for", task))
            notes[choice.init][alias_of("best_for", task)] = choice.reason
        log.info("%s: %s", task, choice.reason)
    return [
        _publish(source / _CHECKPOINTS / label, name, aliases[label], notes[label], store)
        for label in labels
    ]


def facts_of(version: Published) -> dict[str, Any]:
    """Return what to tell of a version: its aliases as URIs, and the run that it belongs to."""
    model = version.uri.rpartition("/")[0]
    return {
        "alias": ", ".join(f"{model}@{alias}" for alias in version.aliases),
        "pretraining_run": version.pretraining_run or "not in this MLflow",
        "new": version.is_new,
    }


def after_run(run_folder: Path, tracking: TrackingConfig) -> list[Published]:
    """Register what a finished run has pretrained, if its config says so; a failure is only told.

    Returns:
        The versions; empty where none was asked for, or the registry did not answer.
    """
    if tracking.register_as is None:
        return []
    try:
        return run(run_folder, tracking.register_as)
    # Whatever a store or its driver throws: the run itself is complete.
    except Exception as error:  # noqa: BLE001
        # Only our own messages are known to hold no address and no password.
        problem = error if isinstance(error, MedsslError) else f"{type(error).__name__}."
        log.warning(
            "The run is complete, but its backbones are not in MLflow's registry yet: %s Repeat it "
            "with: medssl weights register %s %s",
            problem, run_folder, tracking.register_as,
        )  # fmt: skip
        return []


def best_by_verdict(run_folder: Path) -> dict[str, Choice]:
    """Return which init a study's own verdicts name for each task, or why they name none.

    The rule: of the inits that have a verdict ``better`` than the reference and none ``worse``, the
    one with the most ``better`` over the task's comparisons. The verdicts were reached on the test
    patients once, for a family of comparisons that was fixed before and is corrected for its size;
    nothing else of those patients is looked at, no score and no effect. So a tie names none.
    """
    file = run_folder / "comparisons.csv"
    if not file.is_file():
        return {}
    table = pd.read_csv(file)
    return {str(task): _choose(rows) for task, rows in table.groupby("task", sort=True)}


def _choose(rows: pd.DataFrame) -> Choice:
    reference, number = rows["reference"].iloc[0], Counter(rows["init"].astype(str))
    better = Counter(rows.loc[rows["verdict"] == BETTER, "init"].astype(str))
    for init in rows.loc[rows["verdict"] == WORSE, "init"].astype(str).unique():
        better.pop(init, None)
    if not better:
        return Choice("", f"no init was shown to be better than {reference} and nowhere worse")
    most = max(better.values())
    first = sorted(init for init, count in better.items() if count == most)
    if len(first) > 1:
        return Choice(
            "",
            f"{' and '.join(first)} are each better than {reference} in {most} comparisons; the "
            "verdicts do not choose between them",
        )
    init = first[0]
    return Choice(
        init, f"{init} better than {reference} in {most} of {number[init]} comparisons, never worse"
    )


def alias_of(kind: str, name: str) -> str:
    """Return an alias for a task or an init: MLflow takes letters, digits, _ and - alone."""
    return f"{kind}_{_NOT_IN_AN_ALIAS.sub('_', name)}"


def write(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint as an MLflow model, without a server.

    Args:
        checkpoint: the folder of weights and contract.
        folder: must not exist yet.

    Raises:
        WeightsError: the files do not belong together.
        MachineError: the disk is full.
    """
    backbone, contract = load_backbone(checkpoint)
    run_folder = run_of(checkpoint)
    crop_size = (_config_of(run_folder).get("sampling") or {}).get("crop_size")
    subject = Subject(backbone, contract, str((contract.pretext or {}).get("name", "none")))
    versions = package_versions()
    sizes = (_EXAMPLE_SIZE,) * contract.spatial_dims
    example = subject.sample_images(_EXAMPLE_BATCH, sizes).double().mul(100).round().div(100)
    with disk_errors(folder), tempfile.TemporaryDirectory(prefix="medssl-publish-") as made:
        weights = Path(made, CHECKPOINT)
        weights.mkdir()
        for name in (WEIGHTS_FILE, CONTRACT_FILE):
            shutil.copyfile(checkpoint / name, weights / name)
        preparation = serving_facts(preparation_of(contract, run_folder), crop_size)
        (weights / SERVING_FILE).write_text(json.dumps(preparation, indent=2) + "\n")
        program, taken = _program(subject, Path(made, "model.pt2"))
        pieces = Pieces(
            _CODE,
            weights,
            program,
            example.tolist(),
            [f"{name}=={versions[name].partition('+')[0]}" for name in _REQUIRED],
            metadata={
                "image": {
                    "dtype": "float32",
                    "shape": [-1, contract.in_channels, *(-1 for _ in sizes)],
                },
                "program_takes": taken,
                "weights_sha256": contract.weights_sha256,
                **_facts(contract, run_folder),
            },
        )
        write_model(folder, pieces)


def _program(subject: Subject, file: Path) -> tuple[Path | None, str]:
    """Write the ExportedProgram; return its file and which images it takes."""
    try:
        write_program(subject, file)
    except WeightsError as error:
        log.warning("The model is registered without an ExportedProgram: %s", error)
        return None, "there is no program"
    return file, subject.captured.rule


def _facts(contract: Contract, run_folder: Path | None) -> dict[str, str]:
    """Return where a backbone comes from, for the tags of its version."""
    provenance: dict[str, Any] = {}
    file = run_folder / "provenance.json" if run_folder else None
    if file is not None and file.is_file():
        provenance = json.loads(file.read_text(encoding="utf-8"))
    found = {
        "backbone": contract.backbone["name"],
        "pretext": (contract.pretext or {}).get("name", "none"),
        "init": contract.init["name"],
        "lineage": lineage(contract),
        "parent_sha256": contract.init.get("sha256"),
        "index_digest": contract.index_digest,
        "store_digest": contract.store_digest,
        "splits_digest": (provenance.get("data") or {}).get("splits"),
        "config_digest": provenance.get("config_digest"),
    }
    return {key: str(value) for key, value in found.items() if value}


def _publish(
    checkpoint: Path, name: str, aliases: list[str], notes: Mapping[str, str], store: str | None
) -> Published:
    contract = load_contract(checkpoint)
    read_weights(checkpoint, contract)  # refuses what does not belong together
    run_folder = run_of(checkpoint)
    tracking = validate_config(
        _config_of(run_folder).get("tracking") or {}, TrackingConfig, source="config.yaml: tracking"
    )
    return publish_model(
        functools.partial(write, checkpoint),
        name,
        str(contract.weights_sha256),
        aliases=aliases,
        tags={**_facts(contract, run_folder), **notes},
        source=Source(run_folder, f"pretrain/{checkpoint.name}") if run_folder else None,
        experiment=tracking.experiment,
        store=store or _store_of(run_folder, tracking),
    )


def _labels_of(source: Path) -> list[str]:
    """Return the names of a study's checkpoints; empty for anything else."""
    found = sorted(path.parent.name for path in (source / _CHECKPOINTS).glob(f"*/{CONTRACT_FILE}"))
    return [] if "backbone" in found else found


def _store_of(run_folder: Path | None, tracking: TrackingConfig) -> str | None:
    """Return where a run was delivered to, as its delivery decides it."""
    if tracking.uri or run_folder is None or os.environ.get(URI_VARIABLE):
        return tracking.uri
    beside = run_folder.parent / "mlflow.db"
    return f"sqlite:///{beside.resolve()}" if beside.is_file() else None


def _config_of(run_folder: Path | None) -> dict[str, Any]:
    if run_folder is None:
        return {}
    content = yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
