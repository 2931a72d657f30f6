"""The data of a run as MLflow's dataset inputs: digests, and no place and no patient.

MLflow keeps 36 characters of a digest; whoever filters runs by one cuts it likewise
(`short_digest`). The whole digest is in the dataset's source.
"""

from __future__ import annotations

import json
from typing import Any

from medssl.tracking.journal import Record
from medssl.tracking.privacy import public_name

MAX_DIGEST_LENGTH = 36  # MLflow's own limit, in characters
SOURCE_TYPE = "medssl"
_CONTEXT = "mlflow.data.context"


def short_digest(digest: str) -> str:
    """Return a digest as MLflow holds it."""
    return digest[:MAX_DIGEST_LENGTH]


def dataset_inputs(record: Record) -> list[Any]:
    """Return MLflow's own objects for a record of kind ``inputs``.

    Sending them again changes nothing: MLflow holds a dataset once by name and digest, and a run's
    input once by dataset.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    context = InputTag(_CONTEXT, public_name(record["context"]))
    return [
        DatasetInput(
            Dataset(
                name=public_name(name),
                digest=short_digest(digest),
                source_type=SOURCE_TYPE,
                source=json.dumps({"digest": digest}),
            ),
            [context],
        )
        for name, digest in record["digests"].items()
    ]
