"""Models into MLflow's registry: uploaded to the run that made them, then given version and alias.

It happens after a run and not within it, and may be repeated: a version of the same weights is
found again by their hash, so a second attempt adds nothing but what is missing.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medssl.tracking.batch import MAX_TAG_LENGTH, run_key, tag_key
from medssl.tracking.journal import HEADER, JOURNAL_NAME, read_journal
from medssl.tracking.mlflow import KEY_TAG
from medssl.tracking.privacy import public_text
from medssl.tracking.pyfunc import CHECKPOINT, quiet_mlflow
from medssl.tracking.registry import (
    HASH_TAG,
    LAYOUT_TAG,
    SCHEME,
    check_name,
    client_of,
    experiment_of,
    quoted,
)

LOGGED_MODEL = "backbone"
"""What the model is called on its run's page."""


@dataclass(frozen=True)
class Source:
    """The run that a model comes from.

    Attributes:
        run_folder: holds the journal.
        run: its name there, for example ``pretrain/rotation``.
    """

    run_folder: Path
    run: str


@dataclass(frozen=True)
class Published:
    """A version of a registered model.

    Attributes:
        uri: ``models:/name/version``.
        aliases: that point to it now.
        is_new: whether this call made it; otherwise the registry had these weights already.
        pretraining_run: id of the MLflow run that made the weights; empty where its journal was
            not delivered to this store.
    """

    uri: str
    aliases: tuple[str, ...]
    is_new: bool
    pretraining_run: str


def publish_model(
    write: Callable[[Path], None],
    name: str,
    weights_sha256: str,
    *,
    aliases: Sequence[str] = (),
    tags: Mapping[str, Any],
    source: Source | None = None,
    experiment: str = "medssl",
    store: str | None = None,
) -> Published:
    """Register a model, or find the version that its weights have already.

    Args:
        write: writes the model into a new folder (`medssl.tracking.pyfunc.write_model`); asked only
            where the registry has none of these weights.
        name: of the registered model; made where there is none.
        weights_sha256: of its weights: what tells versions apart.
        aliases: moved to the version.
        tags: where it comes from; paths and accounts are not sent on.
        source: the run that made the weights; where MLflow has it, the version belongs to it, and
            otherwise to a run of its own.
        experiment: of a run of its own.
        store: tracking URI; by default that of the environment.

    Raises:
        ConfigError: the name or an alias makes no URI.
        MachineError: no registry, or it does not answer. Nothing is half registered: repeat it.
    """
    for alias in aliases or (None,):
        check_name(name, alias)
    sent = {tag_key(key): public_text(value)[:MAX_TAG_LENGTH] for key, value in tags.items()}
    sent[HASH_TAG] = weights_sha256
    with client_of(store) as client:
        experiment_id = experiment_of(client, experiment)
        run = _delivered(client, experiment_id, source)
        if run is not None:
            sent["pretraining_run_id"] = run.info.run_id
            parent = run.data.tags.get("mlflow.parentRunId")
            if parent:
                sent["study_run_id"] = parent
        known = _version_of_weights(client, name, weights_sha256)
        if known is None:
            with tempfile.TemporaryDirectory(prefix="medssl-model-") as made:
                folder = Path(made, "model")
                write(folder)
                version = _upload(client, folder, name, sent, experiment_id, run)
        else:
            version = str(known.version)
            for key, value in sent.items():
                if dict(known.tags).get(key) != value:
                    client.set_model_version_tag(name, version, key, value)
        for alias in aliases:
            client.set_registered_model_alias(name, alias, version)
        return Published(
            f"{SCHEME}/{name}/{version}",
            tuple(aliases),
            known is None,
            run.info.run_id if run is not None else "",
        )


def _is_local(client: Any) -> bool:
    """Return whether a client writes into a database itself, without a server."""
    return urlsplit(client.tracking_uri).scheme not in ("http", "https")


def _delivered(client: Any, experiment_id: str, source: Source | None) -> Any:
    """Return the MLflow run that a journal's run was delivered to; None where there is none."""
    if source is None:
        return None
    journal = read_journal(source.run_folder / JOURNAL_NAME)
    journal_id = next((r["id"] for r, _ in journal if r["kind"] == HEADER), None)
    if journal_id is None:
        return None
    wanted = f"tags.`{KEY_TAG}` = '{run_key(journal_id, source.run)}'"
    found = client.search_runs([experiment_id], wanted, max_results=1)
    return found[0] if found else None


def _version_of_weights(client: Any, name: str, weights_sha256: str) -> Any:
    """Return the newest version that holds a model of these weights."""
    found = client.search_model_versions(
        f"name = '{quoted(name)}' and tag.`{HASH_TAG}` = '{weights_sha256}'"
    )
    models = [version for version in found if LAYOUT_TAG in dict(version.tags)]
    return max(models, key=lambda version: int(version.version), default=None)


def _upload(
    client: Any, folder: Path, name: str, tags: Mapping[str, str], experiment_id: str, run: Any
) -> str:
    """Upload a model and make a version of it; the version comes last, when all of it is there."""
    with quiet_mlflow():
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

    own_run = run is None
    if run is None:
        run = client.create_run(experiment_id, run_name=f"register/{name}", tags=dict(tags))
    run_id = run.info.run_id
    logged = client.create_logged_model(
        experiment_id, LOGGED_MODEL, source_run_id=run_id, tags=dict(tags), model_type="backbone"
    )
    try:
        content = Model.load(str(folder))
        content.model_id = content.model_uuid = logged.model_id
        content.run_id = run_id
        content.artifact_path = logged.artifact_location
        content.save(str(folder / "MLmodel"))
        client.log_model_artifacts(logged.model_id, str(folder))
        client.finalize_logged_model(logged.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        if not client.search_registered_models(f"name = '{quoted(name)}'"):
            client.create_registered_model(name)
        version = client.create_model_version(
            name,
            # A local store would look the model up in the process's own store instead of in itself.
            logged.artifact_location if _is_local(client) else f"{SCHEME}/{logged.model_id}",
            run_id=run_id,
            tags={
                **tags,
                LAYOUT_TAG: f"artifacts/{CHECKPOINT}",
                "logged_model_id": logged.model_id,
            },
            model_id=logged.model_id,
        ).version
    except BaseException:
        with contextlib.suppress(Exception):  # the registry that failed may not take this either
            client.finalize_logged_model(logged.model_id, "FAILED")
        with contextlib.suppress(Exception):
            if own_run:
                client.set_terminated(run_id, status="FAILED")
        raise
    if own_run:
        client.set_terminated(run_id)
    return str(version)
