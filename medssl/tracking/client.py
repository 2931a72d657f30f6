"""How MLflow's own client is to behave: in the environment, before it is imported."""

from __future__ import annotations

import logging
import os

URI_VARIABLE = "MLFLOW_TRACKING_URI"

# The client must not phone home, nor wait minutes for a dead server (FIELD_NOTES §5).
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_MODEL_CATALOG_URI": "",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the journal itself is the retry
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def prepare_environment() -> None:
    """Keep MLflow from phoning home, waiting for minutes and chatting; before its import."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):  # both announce the tables they create
        logging.getLogger(name).setLevel(logging.WARNING)
