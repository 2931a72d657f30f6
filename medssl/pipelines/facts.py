"""What a report says of the data: counts and digests, nobody's name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medssl.atomic import atomic_write
from medssl.downstream.base import DownstreamTask
from medssl.pipelines.leakage import Leakage
from medssl.scans.datasets.base import PROVENANCE
from medssl.scans.index import Index
from medssl.scans.splits import Splits
from medssl.scans.store import Store

DATASET_FILE = "dataset.json"


def data_facts(
    index: Index,
    store: Store,
    splits: Splits,
    *,
    pretraining_pool: Sequence[str],
    leakage: Leakage,
    tasks: Iterable[DownstreamTask] = (),
) -> dict[str, Any]:
    """Return the content of a run folder's ``data.json``.

    Args:
        index, store, splits: the data.
        pretraining_pool: patients that backbones were pretrained on in this run.
        leakage: what was found and allowed.
        tasks: whose labels are told, with what did not fit between them and the scans.
    """
    table, accepted = index.table, index.accepted
    rejected = table[table["status"] == "rejected"]
    dataset = _dataset(index)
    return {
        "dataset": dataset.get("name", ""),
        "synthetic": bool(dataset.get("synthetic", False)),
        "licence": dataset.get("licence", ""),
        "citation": dataset.get("citation", ""),
        "num_scans": len(store.scan_keys),
        "num_accepted": len(accepted),
        "num_patients": int(accepted["patient_key"].nunique()),
        "splits": {
            "train": len(splits.train), "val": len(splits.val), "test": len(splits.test),
            "unused": len(splits.unused),
        },
        "rejected": {str(k): int(v) for k, v in rejected["reason"].value_counts().items()},
        "modalities": {str(k): int(v) for k, v in accepted["modality"].value_counts().items()},
        "spacing_mm": store.preprocessing.get("spacing_mm"),
        "pretraining_pool": len(pretraining_pool),
        "test_patients_in_pool": leakage.patients,
        "test_images_elsewhere": leakage.images,
        "test_images_repeated": len(leakage.repeated),
        "inits_not_looked_into": list(leakage.unknown),
        "index_digest": index.digest,
        "store_digest": store.digest,
        "labels": {task.name: task.labels.to_dict() for task in tasks},
    }  # fmt: skip


def data_digests(
    index: Index, store: Store, splits: Splits, tasks: Iterable[DownstreamTask] = ()
) -> dict[str, str]:
    """Return digests of all that the results of a run depend on, beside its configuration."""
    return {
        "index": index.digest,
        "store": store.digest,
        "splits": splits.digest,
        **{f"labels of {task.name}": task.digest for task in tasks},
    }


def keep_dataset_facts(folder: Path, index_folder: Path) -> None:
    """Keep, beside the index, what a public or synthetic data set says of itself.

    ``medssl datasets fetch`` leaves a ``provenance.json`` in the data set's folder; scans lie in
    that folder or one below it.
    """
    for candidate in (folder, folder.parent):
        try:
            content = json.loads((candidate / PROVENANCE).read_text(encoding="utf-8"))
            facts = {name: content[name] for name in ("name", "licence", "citation", "synthetic")}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a fetched data set: the folder is the user's own archive
        atomic_write(index_folder / DATASET_FILE, json.dumps(facts, indent=2) + "\n")
        return


def _dataset(index: Index) -> dict[str, Any]:
    source = index.folder / DATASET_FILE
    if not source.is_file():
        return {}
    content: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    return content
