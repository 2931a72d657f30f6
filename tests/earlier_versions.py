"""How earlier versions of medssl registered a checkpoint: its two files as artifacts of a run."""

from __future__ import annotations

import hashlib
from pathlib import Path

from medssl.tracking.registry import FILES, HASH_TAG, client_of, experiment_of, quoted


def register_checkpoint(folder: Path, name: str, alias: str) -> str:
    """Register a checkpoint folder as a new version of a model, and return its URI."""
    digest = hashlib.sha256((folder / FILES[0]).read_bytes()).hexdigest()
    with client_of() as client:
        run = client.create_run(experiment_of(client, "medssl"), run_name=f"register/{name}")
        for file in FILES:
            client.log_artifact(run.info.run_id, str(folder / file), "checkpoint")
        client.set_terminated(run.info.run_id)
        if not client.search_registered_models(f"name = '{quoted(name)}'"):
            client.create_registered_model(name)
        version = client.create_model_version(
            name,
            f"runs:/{run.info.run_id}/checkpoint",
            run_id=run.info.run_id,
            tags={HASH_TAG: digest},
        ).version
        client.set_registered_model_alias(name, alias, version)
    return f"models:/{name}/{version}"
