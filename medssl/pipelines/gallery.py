"""Nearest neighbours of scan patches under each init of a finished study: numbers and pictures.

Queries and database are patches of validation patients; test patients are not looked at, as
whoever reads this may choose an init by it. Nothing is trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medssl.atomic import atomic_write
from medssl.config import ComponentConfig, load_config
from medssl.downstream.base import DownstreamTask
from medssl.errors import ConfigError, DataError, WeightsError
from medssl.evaluation.neighbours import (
    Agreement,
    Array,
    Patches,
    chance_share,
    cut_patches,
    draw_patients,
    embed_patches,
    find_neighbours,
    interval,
)
from medssl.models.checkpoints import CONTRACT_FILE, WEIGHTS_FILE
from medssl.models.inits.base import LoadReport
from medssl.models.inits.checkpoint import Config as CheckpointConfig
from medssl.pipelines import prepare
from medssl.pipelines.cells import Evaluation
from medssl.pipelines.facts import data_digests
from medssl.pipelines.progress import Progress, silent
from medssl.pipelines.study import StudyConfig
from medssl.pipelines.transfer import build_tasks
from medssl.randomness import numpy_generator
from medssl.reports.contents import init_names
from medssl.reports.gallery import PIXELS, Block, Tile, save_gallery, save_layers
from medssl.scans.index import Index
from medssl.scans.splits import Splits
from medssl.scans.store import Store
from medssl.training.devices import select_device
from medssl.transforms.requests import SampleRequest

_MAX_PATIENTS = 200
"""More would sharpen the interval little."""

_SMALLEST_PATCH = 16
"""Voxels: below it most backbones' stages shrink to a single position."""

_QUERIES_SHOWN, _NEIGHBOURS_SHOWN = 6, 5


@dataclass(frozen=True)
class Gallery:
    """What `run` wrote.

    Attributes:
        folder: holds ``gallery.csv``, ``gallery.json``, ``gallery_layers.png``, and where the
            study includes images ``gallery.png``.
        table: one row an init and layer, as in ``gallery.csv``.
        facts: as in ``gallery.json``.
    """

    folder: Path
    table: pd.DataFrame
    facts: dict[str, Any]


def run(
    run_folder: Path,
    out: Path | None = None,
    *,
    k: int = 10,
    per_class: int = 8,
    patch_size: Sequence[int] | None = None,
    layer: str | None = None,
    progress: Progress = silent,
) -> Gallery:
    """Compare the neighbours that each init of a study finds, and write tables and pictures.

    Args:
        run_folder: of a study whose backbones are pretrained.
        out: where to write; the folder ``gallery`` inside the run folder by default.
        k: neighbours that are counted.
        per_class: patches of each structure and patient, at most; fewer where all would take more
            than `PATCH_BYTES`, and then ``gallery.json`` has a note.
        patch_size: voxels along each axis of the prepared scans; by default half the study's
            crop, so that a patch shows little beside the structure at its centre.
        layer: the stage that pictures and verdict are of; the last by default. All are counted.
        progress: receives how far it is.

    Returns:
        The table has the columns ``init, pretext, layer, k, share, ci_low, ci_high, chance,
        reference, difference, difference_low, difference_high, num_queries, num_patients``. The
        interval is over patients, and so is that of the difference to the study's reference
        init, whose queries are the same. The row `PIXELS` compares the patches voxel by voxel.

    Raises:
        ConfigError: the folder holds no study, the study no masks, k, layer or patch_size does
            not fit, or a few patches alone exceed the memory.
        WeightsError: a backbone is not pretrained yet, or was made under another contract.
        DataError: index, store or splits are gone or differ from those of the study, or the
            patches are of fewer than two patients or of fewer than two structures.
    """
    config = _study_of(run_folder)
    inits = _inits_of(config, run_folder)
    evaluation = _evaluation(config, run_folder, inits)
    task, request = _task_with_masks(evaluation, patch_size)
    patches = _cut(evaluation, task, request, per_class)
    draws = draw_patients(
        patches, config.statistics.num_resamples, numpy_generator(config.seed, "gallery resamples")
    )
    found: dict[tuple[str, str], Array] = {
        (PIXELS, "image"): find_neighbours(patches.images.flatten(1), patches.patients, k)
    }
    reports: dict[str, LoadReport] = {}
    for number, init in enumerate(inits):
        progress("gallery", number, len(inits), init)
        neighbours, reports[init] = _neighbours(evaluation, init, patches, k, layer)
        found |= neighbours
    progress("gallery", len(inits), len(inits))
    shown = layer or list(found)[-1][1]
    agreements = {name: Agreement(part, patches) for name, part in found.items()}
    table = _table(evaluation, patches, agreements, draws, k)
    folder = out or run_folder / "gallery"
    facts: dict[str, Any] = {
        "study": config.name,
        "task": task.name,
        "patients_of": "validation",
        "k": k,
        "layer": shown,
        "patch_size": list(request.crop_size),
        "plane": request.plane,
        "num_patches": patches.counts(),
        "num_patients": len(patches.patient_keys),
        "num_scans_smaller_than_a_patch": patches.num_small_scans,
        "note": patches.note,
        "chance": chance_share(patches),
        "share": {init: part.share for (init, stage), part in agreements.items() if stage == shown},
        "share_by_structure": {
            f"{init} {stage}": part.by_class for (init, stage), part in agreements.items()
        },
        "names": init_names(
            config.model_dump(mode="json"),
            {label: report.to_dict() for label, report in reports.items()},
        ),
        "inits": {label: str(report) for label, report in reports.items()},
        "pictures_of_patients": config.include_images,
    }
    atomic_write(folder / "gallery.csv", lambda temporary: table.to_csv(temporary, index=False))
    atomic_write(folder / "gallery.json", json.dumps(facts, indent=2) + "\n")
    names: dict[str, str] = facts["names"]
    reference = config.statistics.reference
    save_layers(
        folder / "gallery_layers.png",
        table.assign(init=table["init"].replace(names)),
        names.get(reference, reference),
    )
    picture = folder / "gallery.png"
    if config.include_images:
        blocks = _blocks(patches, request, table, found, list(inits), shown, config.seed, names)
        heading = f"Nearest patches by layer {shown} ({config.name}, validation patients)"
        save_gallery(picture, blocks, heading)
    else:
        picture.unlink(missing_ok=True)  # of an earlier start that was allowed to
    return Gallery(folder, table, facts)


def describe(gallery: Gallery) -> list[str]:
    """Return the outcome in lines for people."""
    facts = gallery.facts
    heading = (
        f"Share of the {facts['k']} nearest patches of other patients that show the same "
        f"structure, layer {facts['layer']} ({facts['num_patients']} validation patients; "
        f"drawn blindly {facts['chance']:.3f}):"
    )
    lines = [heading]
    names = facts["names"]
    rows = gallery.table[gallery.table["layer"].isin([facts["layer"], "image"])]
    for _, row in rows.iterrows():
        init, reference = (names.get(row[key], row[key]) for key in ("init", "reference"))
        line = f"{init}: {row['share']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
        if row["reference"]:
            line += (
                f", {row['difference']:+.3f} [{row['difference_low']:+.3f}, "
                f"{row['difference_high']:+.3f}] against {reference}"
            )
        lines.append(line)
    return [*lines, facts["note"]] if facts["note"] else lines


def _study_of(run_folder: Path) -> StudyConfig:
    file = run_folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(
            f"{run_folder.name!r} is not the run folder of a study: it has no config.yaml. "
            "Give the folder that medssl study wrote."
        )
    return load_config(file, StudyConfig)


def _inits_of(config: StudyConfig, run_folder: Path) -> dict[str, ComponentConfig]:
    """Return each init as the study's matrix has it; a pretrained one is its checkpoint."""
    inits: dict[str, ComponentConfig] = {}
    missing = []
    for label, init in config.inits.items():
        checkpoint = run_folder / "checkpoints" / label
        if init.pretext is None:
            inits[label] = init.init
            continue
        inits[label] = CheckpointConfig(path=checkpoint)
        if not all((checkpoint / name).is_file() for name in (CONTRACT_FILE, WEIGHTS_FILE)):
            missing.append(label)
    if missing:
        raise WeightsError(
            f"the run folder {run_folder.name!r} has no pretrained backbone for "
            f"{', '.join(missing)} (looked for checkpoints/{missing[0]}/{WEIGHTS_FILE} and its "
            f"{CONTRACT_FILE}). Let the study finish first: give its medssl study command again."
        )
    return inits


def _evaluation(
    config: StudyConfig, run_folder: Path, inits: Mapping[str, ComponentConfig]
) -> Evaluation:
    """Open what the study worked on, and refuse data that have changed since."""
    index = Index.open(config.workplace / "index").select(config.select)
    store = Store.open(prepare.store_folder(config.workplace, config.preprocessing))
    splits = Splits.read(run_folder / "splits.json")
    tasks = build_tasks(config, config.sampling, index)
    digests = data_digests(index, store, splits, tasks.values())
    pinned = _pinned(run_folder)
    changed = [name for name, digest in digests.items() if pinned.get(name, digest) != digest]
    if changed:
        raise DataError(
            f"the data have changed since the study was run ({', '.join(changed)}), so its "
            "patients and weights may no longer fit them. Bring the earlier data back, or run "
            "the study again in a new folder."
        )
    pretexts = {
        label: init.pretext.name if init.pretext else "" for label, init in config.inits.items()
    }
    return Evaluation(
        config, config.backbone, config.sampling, config.seed, select_device(config.device),
        inits, pretexts, index, store, splits, tasks,
    )  # fmt: skip


def _pinned(run_folder: Path) -> dict[str, str]:
    """Return the digests of the data that the study was started on; empty where unknown."""
    try:
        content = json.loads((run_folder / "provenance.json").read_text(encoding="utf-8"))
        return dict(content["data"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _task_with_masks(
    evaluation: Evaluation, patch_size: Sequence[int] | None
) -> tuple[DownstreamTask, SampleRequest]:
    """Return the first task that has masks, and the request for its patches."""
    crop = evaluation.sampling.crop_size
    half = tuple(min(size, max(_SMALLEST_PATCH, size // 2)) for size in crop)
    size = tuple(patch_size) if patch_size is not None else half
    for task in evaluation.tasks.values():
        request = task.request(evaluation.sampling.request())
        if request.mask is not None and task.answer == "class":  # points are no regions
            return task, replace(request, crop_size=size)
    raise ConfigError(
        "no task of the study has masks, and patches are told apart by what a mask says of them. "
        "Give the run folder of a study with a segmentation task (tasks)."
    )


def _cut(
    evaluation: Evaluation, task: DownstreamTask, request: SampleRequest, per_class: int
) -> Patches:
    """Return the patches of validation patients, the same for every init."""
    generator = numpy_generator(evaluation.seed, "gallery patches")
    patients = sorted(evaluation.splits.val)
    if len(patients) > _MAX_PATIENTS:
        patients = [patients[i] for i in generator.permutation(len(patients))[:_MAX_PATIENTS]]
    # Which scans there are is the same under every init.
    scans = evaluation.setting(task.name, next(iter(evaluation.inits))).scans_of(patients)
    return cut_patches(
        evaluation.store, scans, request, task.classes, per_class=per_class, generator=generator
    )


def _neighbours(
    evaluation: Evaluation, init: str, patches: Patches, k: int, layer: str | None
) -> tuple[dict[tuple[str, str], Array], LoadReport]:
    """Return the neighbours by every stage under an init, and what was loaded into it.

    Random weights are those of the matrix's first seed. Features live no longer than this call, so
    that those of one init alone are in memory.

    Raises:
        ConfigError: there is no such layer, or k does not fit.
    """
    seed = evaluation.section.matrix.seeds[0] if evaluation.inits[init].name == "random" else 0
    backbone, report = evaluation.new_backbone(init, seed)
    backbone = backbone.to(evaluation.device)
    if layer not in (None, *(stage.name for stage in backbone.stages)):
        names = ", ".join(stage.name for stage in backbone.stages)
        raise ConfigError(f"there is no layer {layer!r}. There are: {names}.")
    features = embed_patches(backbone, patches.images, device=evaluation.device)
    return {
        (init, stage): find_neighbours(rows, patches.patients, k)
        for stage, rows in features.items()
    }, report


def _table(
    evaluation: Evaluation,
    patches: Patches,
    agreements: Mapping[tuple[str, str], Agreement],
    draws: Array,
    k: int,
) -> pd.DataFrame:
    statistics = evaluation.section.statistics
    chance = chance_share(patches)
    samples = {name: part.resampled(draws) for name, part in agreements.items()}
    rows = []
    for (init, stage), part in agreements.items():
        low, high = interval(samples[init, stage], patches, statistics.alpha)
        row: dict[str, Any] = {
            "init": init, "pretext": evaluation.pretexts.get(init, ""), "layer": stage, "k": k,
            "share": part.share, "ci_low": low, "ci_high": high, "chance": chance,
            "reference": "", "difference": np.nan, "difference_low": np.nan,
            "difference_high": np.nan, "num_queries": len(patches.classes),
            "num_patients": len(patches.patient_keys),
        }  # fmt: skip
        base = (statistics.reference, stage)
        if base in agreements and init != statistics.reference:
            change = samples[init, stage] - samples[base]
            row["reference"] = statistics.reference
            row["difference"] = part.share - agreements[base].share
            row["difference_low"], row["difference_high"] = interval(
                change, patches, statistics.alpha
            )
        rows.append(row)
    return pd.DataFrame(rows)


def _blocks(
    patches: Patches,
    request: SampleRequest,
    table: pd.DataFrame,
    found: Mapping[tuple[str, str], Array],
    inits: Sequence[str],
    layer: str,
    seed: int,
    names: Mapping[str, str],
) -> list[Block]:
    queries = _queries(patches, numpy_generator(seed, "gallery queries"))
    shares = table[table["layer"] == layer].set_index("init")["share"]
    blocks = []
    for init in inits:
        rows = []
        for query in queries:
            nearest = found[init, layer][query, :_NEIGHBOURS_SHOWN]
            same = patches.classes[nearest] == patches.classes[query]
            row = [_tile(patches, request, query, None)]
            row += [
                _tile(patches, request, int(place), bool(equal))
                for place, equal in zip(nearest, same, strict=True)
            ]
            rows.append(row)
        k = found[init, layer].shape[1]
        name = names.get(init, init)
        title = f"{name}: {shares[init]:.0%} of the {k} nearest show the same structure"
        blocks.append(Block(title, rows))
    return blocks


def _queries(patches: Patches, generator: np.random.Generator) -> list[int]:
    """Return a few patches, as many of each structure, of different patients if there are."""
    present = np.unique(patches.classes)[:_QUERIES_SHOWN]
    each = max(1, _QUERIES_SHOWN // len(present))
    chosen: list[int] = []
    for number in present:
        drawn = generator.permutation(np.flatnonzero(patches.classes == number))
        used = {int(patches.patients[place]) for place in chosen}
        fresh = []
        for place in drawn:
            if int(patches.patients[place]) not in used:
                used.add(int(patches.patients[place]))
                fresh.append(int(place))
        rest = [int(place) for place in drawn if int(place) not in fresh]
        chosen += [*fresh, *rest][:each]
    return chosen


def _tile(patches: Patches, request: SampleRequest, place: int, same: bool | None) -> Tile:
    """Return a patch as a picture: its own slice of the first sequence, or a volume's middle."""
    image_S = patches.images[place, request.num_neighbours].numpy()
    image_XY = image_S if image_S.ndim == 2 else image_S[..., image_S.shape[2] // 2]
    return Tile(image_XY, patches.class_names[patches.classes[place]], same)
