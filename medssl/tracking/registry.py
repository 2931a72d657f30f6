"""Checkpoints in MLflow's model registry: register a folder, and get one back by its name.

``models:/name@alias`` and ``models:/name/version`` are MLflow's own URIs. A registered checkpoint
is the folder with its two files, weights and contract, as artifacts of a run; whoever loads it
applies the same checks as to any folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medssl.errors import ConfigError, DataError, MachineError
from medssl.tracking.client import URI_VARIABLE, prepare_environment

SCHEME = "models:"
FILES = ("backbone.safetensors", "contract.json")
CACHE_VARIABLE = "MEDSSL_CACHE"
DEFAULT_STORE = Path("runs") / "mlflow.db"
"""Where runs of the working directory are tracked when `MLFLOW_TRACKING_URI` is not set."""

HASH_TAG = "weights_sha256"
LAYOUT_TAG = "checkpoint_at"
"""Tag of a version that is a whole MLflow model: where in it the checkpoint lies."""

_NAME = re.compile(r"[^/@:\s](?:[^/@:\n]*[^/@:\s])?")
"""Names that MLflow takes and that can be told apart from the rest of a URI."""

_ALIAS = re.compile(r"(?!(?i:latest|v\d+)$)[\w-]+")
"""As MLflow takes them: latest and v1 have a meaning of their own there."""

_URI = re.compile(r"^models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$")
_FORM = "models:/NAME@ALIAS or models:/NAME/VERSION"


def is_registry_uri(path: Path | str) -> bool:
    """Return whether a path is not one, but a model of the registry."""
    return str(path).startswith(f"{SCHEME}/")


def check_name(name: str, alias: str | None) -> None:
    """Refuse a name or an alias that cannot be told apart from the rest of a URI.

    Raises:
        ConfigError: it cannot; the message says which letters there may be.
    """
    if _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"{name!r} makes no URI of the form {_FORM}. Choose a name without /, @ and :."
        )
    if alias is not None and _ALIAS.fullmatch(alias) is None:
        raise ConfigError(
            f"alias {alias!r} makes no URI of the form {_FORM}. Choose one of letters, digits, _ "
            "and -; latest, and v with a number, belong to MLflow."
        )


def resolve(uri: str) -> Path:
    """Return a folder with the files of a registered checkpoint, downloaded once.

    An alias is looked up once in a process, so that one run uses one version throughout.

    Args:
        uri: ``models:/name@alias`` or ``models:/name/version``.

    Raises:
        ConfigError: the URI is malformed, or the registry has no such model, alias or version; the
            message names those it has.
        DataError: the version is no checkpoint of medssl.
        MachineError: no registry, it does not answer, or the disk is full.
    """
    found = _URI.match(uri)
    if found is None:
        raise ConfigError(f"{uri!r} is not of the form {_FORM}. Correct it.")
    return _resolved(uri, found["name"], found["alias"], found["version"], _store())


@functools.cache
def _resolved(uri: str, name: str, alias: str | None, version: str | None, store: str) -> Path:
    with client_of(store) as client:
        model = _version_of(client, uri, name, alias, version)
        key = json.dumps([store, name, model.version, model.creation_timestamp, model.source])
        folder = _cache() / hashlib.sha256(key.encode()).hexdigest()[:32]
        if not _is_whole(folder):
            _download(client, model, uri, folder)
    _check_registered(folder, model, uri)
    return folder


def _check_registered(folder: Path, model: Any, uri: str) -> None:
    """Refuse files that are not those that were registered, in the cache or in the registry.

    Weights and contract could both have been replaced, and would agree with one another.
    """
    registered = dict(model.tags).get(HASH_TAG)
    if registered is None:  # registered by other means than ours
        return
    weights = folder / FILES[0]
    with weights.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != registered:
        raise DataError(
            f"{uri}: {weights.name} has sha256 {found[:12]}, registered was {registered[:12]}. "
            f"Delete the cached folder {folder.name} (${CACHE_VARIABLE}, or ~/.cache/medssl), and "
            "register the checkpoint again if that does not help."
        )


def _version_of(client: Any, uri: str, name: str, alias: str | None, version: str | None) -> Any:
    models = client.search_registered_models(f"name = '{quoted(name)}'")
    if not models:
        known = sorted(model.name for model in client.search_registered_models(max_results=100))
        raise ConfigError(
            f"{uri}: the registry has no model {name!r}. "
            f"There are: {', '.join(known) or 'none'}. Register it, or correct the name."
        )
    if alias is not None:
        aliases = dict(models[0].aliases)
        if alias not in aliases:
            raise ConfigError(
                f"{uri}: model {name!r} has no alias {alias!r}. Its aliases: "
                f"{', '.join(sorted(aliases)) or 'none'}. Set it in MLflow, or give a version."
            )
        version = str(aliases[alias])
    versions = client.search_model_versions(f"name = '{quoted(name)}'")
    by_number = {str(found.version): found for found in versions}
    if version not in by_number:
        raise ConfigError(
            f"{uri}: model {name!r} has no version {version}. Its versions: "
            f"{', '.join(sorted(by_number, key=int)) or 'none'}. Give one of them."
        )
    return by_number[version]


def _download(client: Any, model: Any, uri: str, folder: Path) -> None:
    """Bring both files into the cache, under their final name only when both are there."""
    from mlflow.artifacts import download_artifacts

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as place:
        source = client.get_model_version_download_uri(model.name, model.version)
        inside = dict(model.tags).get(LAYOUT_TAG)
        if inside is not None:  # a whole MLflow model, of which two files are wanted
            source = f"{source.rstrip('/')}/{inside}"
        arrived = Path(
            download_artifacts(
                artifact_uri=source, dst_path=place, tracking_uri=client.tracking_uri
            )
        )
        if not _is_whole(arrived):
            raise DataError(
                f"{uri}: this version holds no {' and '.join(FILES)}, so it is no checkpoint of "
                "medssl. Give another version, or register one with medssl weights register."
            )
        shutil.rmtree(folder, ignore_errors=True)
        arrived.replace(folder)


@contextmanager
def client_of(store: str | None = None) -> Iterator[Any]:
    """Yield a client of the registry; what it cannot do becomes a message without addresses."""
    store = store or _store()
    prepare_environment()
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        yield MlflowClient(tracking_uri=store, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI"))
    except (MlflowException, OSError) as error:
        kind = getattr(error, "error_code", "") or type(error).__name__
        raise MachineError(
            f"MLflow's model registry ({_public(store)}) could not do it ({kind}). Check that the "
            f"server of {URI_VARIABLE} is up and answers, or give the path of a checkpoint folder."
        ) from None


def _store() -> str:
    """Return the tracking URI: of the environment, else the database of the working directory."""
    given = os.environ.get(URI_VARIABLE)
    if given:
        return given
    if not DEFAULT_STORE.is_file():
        raise MachineError(
            f"no model registry is known: {URI_VARIABLE} is not set, and there is no "
            f"{DEFAULT_STORE.as_posix()} here. Set it to your server's address, or give the path "
            "of a checkpoint folder."
        )
    return f"sqlite:///{DEFAULT_STORE.resolve()}"


def experiment_of(client: Any, name: str) -> str:
    """Return the id of an experiment; made where there is none, restored where it was deleted."""
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name, _local_artifacts(client.tracking_uri)))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _local_artifacts(store: str) -> str | None:
    """Return where a local store keeps artifacts: beside its database, as runs do."""
    if urlsplit(store).scheme != "sqlite":
        return None
    return str(Path(store.removeprefix("sqlite:///")).resolve().parent / "mlartifacts")


def _public(store: str) -> str:
    parts = urlsplit(store)
    return parts.scheme if parts.scheme == "sqlite" else f"{parts.scheme}://{parts.hostname or ''}"


def _cache() -> Path:
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given).expanduser() / "models"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "medssl" / "models"


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def quoted(name: str) -> str:
    """Return a name as MLflow's filters take it between quotes."""
    return name.replace("'", "''")
