"""Filters to find runs and models in MLflow by: for its search box, and for its client.

Texts in capitals are to be replaced; `filled` does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medssl.tracking.datasets import short_digest


@dataclass(frozen=True)
class Recipe:
    """One search.

    Attributes:
        question: what it answers.
        where: ``runs`` (``search_runs``) or ``versions`` (``search_model_versions``).
        filter: the filter string.
        order_by: what comes first; empty: the newest.
    """

    question: str
    where: Literal["runs", "versions"]
    filter: str
    order_by: str = ""


RECIPES: dict[str, Recipe] = {
    "runs_on_index": Recipe(
        "Which studies and pretrainings worked on this index? (36 characters of its digest)",
        "runs",
        "dataset.digest = 'INDEX'",
    ),
    "run_of_model": Recipe(
        "Which run made these weights? (its `run_id`, and the tag `study_run_id`)",
        "versions",
        "tag.weights_sha256 = 'WEIGHTS'",
    ),
    "models_of_index": Recipe(
        "Which registered backbones saw this index?",
        "versions",
        "tag.index_digest = 'DIGEST'",
    ),
    "best_probe": Recipe(
        "Which cells of the probe did best on validation patients? (the first row of each init)",
        "runs",
        "params.protocol = 'linear_probe' and params.task = 'TASK'",
        "metrics.`val/score` DESC",
    ),
    "failed_cells": Recipe(
        "Which cells failed?",
        "runs",
        "attributes.status = 'FAILED' and attributes.run_name LIKE 'cell/%'",
    ),
    "suspicious": Recipe(
        "Which pretrainings did the monitor find suspicious?",
        "runs",
        "attributes.run_name LIKE 'pretrain/%' and tags.health LIKE '%suspicious%'",
    ),
    "cells_of_study": Recipe(
        "What belongs to this study?",
        "runs",
        "tags.mlflow.parentRunId = 'STUDY'",
    ),
}


def filled(name: str, **values: str) -> str:
    """Return a recipe's filter with values in place of its capitals.

    Args:
        name: of the recipe.
        values: by the word in lower case; a digest of ``index`` is cut as MLflow cuts it.

    Raises:
        ValueError: a value could not stand between quotes.
    """
    found = RECIPES[name].filter
    for word, value in values.items():
        if "'" in value:
            raise ValueError(f"{word}: a value of a filter holds no quote.")
        text = short_digest(value) if word == "index" else value
        found = found.replace(f"'{word.upper()}'", f"'{text}'")
    return found
