"""What the frozen features of a finished study know: maps of scans, likeness of inits, groups.

Scans of training and validation patients are looked at, never those of test patients, as whoever
reads this may choose an init or a layer by it. Nothing is trained but linear classifiers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from medssl.atomic import atomic_write
from medssl.errors import DataError
from medssl.evaluation.features import extract_features
from medssl.evaluation.similarity import linear_cka, project, told_apart
from medssl.pipelines.cells import Evaluation
from medssl.pipelines.finished import evaluation_of, inits_of, study_of
from medssl.pipelines.progress import Progress, silent
from medssl.pipelines.transfer import labelled_patients
from medssl.randomness import derive_seed, numpy_generator
from medssl.reports.contents import init_names
from medssl.reports.features import save_likeness, save_maps
from medssl.transforms.cases import CaseReader

Array = npt.NDArray[Any]

LABEL, SCANNER, SITE = "label", "scanner", "site"
_MAX_SCANS = 1000
_MAX_SLICES = 12
_MIN_SCANS = 5
_METHODS = ("pca", "tsne")


@dataclass(frozen=True)
class FeatureMaps:
    """What `run` wrote.

    Attributes:
        folder: holds ``likeness.csv``, ``told_apart.csv``, ``maps.parquet`` and their pictures.
        likeness: ``init, layer, other_init, other_layer, cka``.
        told: ``init, layer, what, balanced_accuracy, chance, num_scans``.
        num_scans, num_patients: looked at.
    """

    folder: Path
    likeness: pd.DataFrame
    told: pd.DataFrame
    num_scans: int
    num_patients: int


def run(run_folder: Path, out: Path | None = None, *, progress: Progress = silent) -> FeatureMaps:
    """Look at the features of every init of a study, and write tables and pictures.

    Args:
        run_folder: of a study whose backbones are pretrained.
        out: where to write; the folder ``features_of_scans`` inside the run folder by default.
        progress: receives how far it is.

    Raises:
        ConfigError: the folder holds no study.
        WeightsError: a backbone is not pretrained yet.
        DataError: the data are gone or have changed, or there are too few scans.
    """
    config = study_of(run_folder)
    inits = inits_of(config, run_folder)
    evaluation = evaluation_of(config, run_folder, inits)
    scans = _scans(evaluation)
    reports = {}
    features: dict[tuple[str, str], Array] = {}
    for number, init in enumerate(inits):
        progress("features", number, len(inits), init)
        layers, reports[init] = _features(evaluation, init, scans)
        features |= {(init, layer): rows for layer, rows in layers.items()}
    progress("features", len(inits), len(inits))
    patients = [evaluation.store.listed(key).patient_key for key in scans]
    groups = _groups(evaluation, scans)
    folder = out or run_folder / "features_of_scans"
    names = init_names(
        config.model_dump(mode="json"), {init: report.to_dict() for init, report in reports.items()}
    )
    likeness = _likeness(features)
    told = _told(features, groups, patients)
    maps = _maps(features, scans, patients, groups, evaluation.seed)
    atomic_write(folder / "likeness.csv", likeness.to_csv(index=False))
    atomic_write(folder / "told_apart.csv", told.to_csv(index=False))
    atomic_write(folder / "maps.parquet", maps.to_parquet)
    shown = {"init": maps["init"].replace(names)}
    save_likeness(folder / "likeness.png", likeness, names)
    for what in [*groups, "patient"]:
        save_maps(folder / f"maps_by_{what}.png", maps.assign(**shown), what)
    return FeatureMaps(folder, likeness, told, len(scans), len(set(patients)))


def describe(found: FeatureMaps) -> list[str]:
    """Return the outcome in lines for people."""
    heading = (
        f"{found.num_scans} scans of {found.num_patients} training and validation patients; "
        "balanced accuracy of a linear classifier on frozen features, cross-validated by patient:"
    )
    lines = [heading]
    for (init, what), part in found.told.groupby(["init", "what"], sort=False):
        best = part.sort_values("balanced_accuracy").iloc[-1]
        lines.append(
            f"{init} tells the {what} at {best['balanced_accuracy']:.2f} in layer {best['layer']} "
            f"(guessing {best['chance']:.2f})"
        )
    if found.told.empty:
        lines.append(
            "nothing to tell apart: no class, scanner or site has scans of five patients or more "
            "beside another."
        )
    return lines


def _scans(evaluation: Evaluation) -> list[str]:
    """Return the scans that are looked at, sorted; at most `_MAX_SCANS`, drawn by the seed."""
    patients = {*evaluation.splits.train, *evaluation.splits.val}
    store = evaluation.store
    keys = [key for key in store.scan_keys if store.listed(key).patient_key in patients]
    if len(keys) < _MIN_SCANS:
        raise DataError(
            f"{len(keys)} scans of training and validation patients are too few to compare "
            f"features on; at least {_MIN_SCANS} are needed."
        )
    if len(keys) > _MAX_SCANS:
        drawn = numpy_generator(evaluation.seed, "feature scans").permutation(len(keys))
        keys = sorted(keys[place] for place in drawn[:_MAX_SCANS])
    return keys


def _features(
    evaluation: Evaluation, init: str, scans: Sequence[str]
) -> tuple[dict[str, Array], Any]:
    """Return the mean feature of every scan by layer, (N, channels), and what was loaded."""
    seed = evaluation.section.matrix.seeds[0] if evaluation.inits[init].name == "random" else 0
    backbone, report = evaluation.new_backbone(init, seed)
    found = extract_features(
        backbone.to(evaluation.device),
        CaseReader(evaluation.store, scans, evaluation.sampling.request(), max_slices=_MAX_SLICES),
        device=evaluation.device,
        dense=False,
        max_features=1,
    )
    layers = [stage.name for stage in backbone.stages]
    return {
        layer: np.stack([found[key].layers[layer].numpy() for key in scans]) for layer in layers
    }, report


def _groups(evaluation: Evaluation, scans: Sequence[str]) -> dict[str, list[str]]:
    """Return what the scans are grouped by: class, scanner, site; empty texts where unknown."""
    table = evaluation.index.accepted.set_index("scan_key")
    found = {
        what: [str(table.at[key, column] or "") for key in scans]
        for what, column in ((SCANNER, "scanner_key"), (SITE, "site_key"))
    }
    classes = labelled_patients(evaluation.tasks, evaluation.index)
    owners = [evaluation.store.listed(key).patient_key for key in scans]
    found[LABEL] = [
        "" if classes.get(owner) is None else f"class {classes[owner]}" for owner in owners
    ]
    return {what: names for what, names in found.items() if len({*names} - {""}) > 1}


def _likeness(features: Mapping[tuple[str, str], Array]) -> pd.DataFrame:
    rows = [
        {
            "init": first[0], "layer": first[1], "other_init": second[0], "other_layer": second[1],
            "cka": linear_cka(features[first], features[second]),
        }
        for first, second in combinations_with_replacement(features, 2)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _told(
    features: Mapping[tuple[str, str], Array],
    groups: Mapping[str, Sequence[str]],
    patients: Sequence[str],
) -> pd.DataFrame:
    columns = ["init", "layer", "what", "balanced_accuracy", "chance", "num_scans"]
    rows = []
    for what, names in groups.items():
        for (init, layer), rows_ND in features.items():
            found = told_apart(rows_ND, names, patients)
            if found is not None:
                rows.append([init, layer, what, *found, sum(map(bool, names))])
    return pd.DataFrame(rows, columns=columns)


def _maps(
    features: Mapping[tuple[str, str], Array],
    scans: Sequence[str],
    patients: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    seed: int,
) -> pd.DataFrame:
    """Return two coordinates a scan, init and method, by the last layer."""
    last = {init: rows for (init, _), rows in features.items()}  # the last layer comes last
    parts = []
    for init, rows in last.items():
        for method in _METHODS:
            placed = project(rows, method, derive_seed(seed, "maps") % 2**32)
            parts.append(
                pd.DataFrame(
                    {
                        "init": init, "method": method, "scan_key": scans, "patient": patients,
                        "x": placed[:, 0], "y": placed[:, 1], **groups,
                    }
                )
            )  # fmt: skip
    return pd.concat(parts, ignore_index=True)
