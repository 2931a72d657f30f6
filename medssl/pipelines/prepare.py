"""Prepare the scans of an index: preprocess each once and keep it in a store."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field, StringConstraints

from medssl.config import ComponentConfig, Config, component
from medssl.errors import DataError, MachineError
from medssl.executors import EXECUTORS
from medssl.executors.base import Guard, Loss
from medssl.executors.local import Config as LocalConfig
from medssl.executors.local import LocalExecutor, available_cores
from medssl.pipelines.progress import Progress, silent
from medssl.scans.entry import Entry, content_address
from medssl.scans.index import Index
from medssl.scans.masks import MaskFolder, mask_digest, match_masks, read_mask
from medssl.scans.points import Point, PointSource, paint_points, points_digest
from medssl.scans.scan import Scan, read_scan
from medssl.scans.selection import SelectionConfig
from medssl.scans.store import Store
from medssl.transforms.preprocessing import PreprocessingConfig, preprocess

MaskSource = Path | MaskFolder | PointSource
"""A folder of masks (with the names of their classes), or points to be marked."""

MaskName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,40}$")]

_COMPRESSED = 0.65
"""Size of a stored image against its raw float16 voxels (0.63 measured on hippocampus MR)."""

_SECONDS_A_SCAN, _SECONDS_A_VOXEL = 0.02, 1.5e-7
"""Work of preprocessing, measured on one core: a fixed part, and one that grows with voxels."""

_WORTHWHILE_SECONDS = 90.0
"""Below this much work, starting processes that import MONAI (10 s each) gains nothing."""

_GUARD = Guard(seconds=1800.0, megabytes=65536)
"""For one scan: far more than a scan of the allowed size takes, and less than for ever."""

_LOSSES: dict[Loss, str] = {
    "too_slow": "it took longer than half an hour. Leave it out, or use coarser voxels.",
    "out_of_memory": "it took more than 64 GB of memory. Leave it out, or use coarser voxels.",
    "died": "its worker process died: the file is damaged, or memory ran out. Leave it out, or use "
    "fewer workers (executor.num_workers=1).",
}

_SHOWN = 5  # failures that a message spells out


class PrepareConfig(Config):
    """Configuration of ``medssl prepare``.

    Attributes:
        index: folder of the index, from ``medssl index``.
        preprocessing: what is done to each scan.
        masks: folders of masks, by a name of small letters, digits and underscores; segments of a
            DICOM segmentation keep their numbers here, and become a task's classes in a study.
        select: which scans.
        out: folder of the store; beside the index's table by default.
        executor: where scans are prepared: ``local`` processes, or ``ray``.
    """

    index: Path
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    masks: dict[MaskName, Path] = Field(default_factory=dict)
    select: SelectionConfig = SelectionConfig()
    out: Path | None = None
    executor: Annotated[ComponentConfig, component(EXECUTORS)] = LocalConfig()


def run(config: PrepareConfig, progress: Progress = silent) -> Store:
    """Prepare all accepted scans of an index. See `prepare`."""
    return prepare(
        Index.open(config.index).select(config.select),
        config.preprocessing,
        store_folder(config.index, config.preprocessing, config.out),
        masks=config.masks,
        executor=config.executor,
        progress=progress,
    )


def plan(config: PrepareConfig) -> dict[str, Any]:
    """Return what `run` would do, touching nothing."""
    index = Index.open(config.index).select(config.select)
    folder = store_folder(config.index, config.preprocessing, config.out)
    jobs = _jobs(index, config.preprocessing, config.masks)
    store = Store(folder, {})
    present = sum(store.has(job.address) for job in jobs)
    return {
        "store": str(folder),
        "scans_already_prepared": present,
        "scans_to_prepare": len(jobs) - present,
        "scans_with_mask": {name: sum(name in job.masks for job in jobs) for name in config.masks},
        **estimate(index, config.preprocessing),
    }


def store_folder(
    beside: Path, preprocessing: PreprocessingConfig, chosen: Path | None = None
) -> Path:
    """Return where a store lies: where it was chosen to, else in a folder of its own."""
    if chosen is not None:
        return chosen
    name = hashlib.sha256(preprocessing.versioned_digest().encode()).hexdigest()[:12]
    return Path(beside) / "stores" / name


def estimate(index: Index, preprocessing: PreprocessingConfig) -> dict[str, Any]:
    """Return how many scans and patients there are, and about how large their store becomes.

    The foreground crop is not foreseen, so the store is usually smaller.
    """
    table = index.accepted
    voxels = sum(_prepared_voxels(table, preprocessing))
    return {
        "scans": len(table),
        "patients": int(table["patient_key"].nunique()),
        "estimated_megabytes": round(2 * voxels * _COMPRESSED / 1e6, 1),
    }


def prepare(
    index: Index,
    preprocessing: PreprocessingConfig,
    out: Path,
    masks: Mapping[str, MaskSource] | None = None,
    *,
    executor: ComponentConfig | None = None,
    progress: Progress = silent,
) -> Store:
    """Bring a store up to date with an index; scans that are there already are not touched.

    Args:
        index: whose selected scans to prepare.
        preprocessing: what is done to each.
        out: the store's folder.
        masks: folders of masks, or points, by name; a scan without is prepared without.
        executor: where; by default processes on this machine, if there is enough to do for them.
        progress: is told ``"prepare"``, scans done, all scans.

    Raises:
        DataError: the index has no accepted scan, or some cannot be prepared: all others are
            done and kept, and the message says what is wrong with which, by key.
        LabelError: a mask folder fits no scan.
        MachineError: the disk is full or not writable.
    """
    jobs = _jobs(index, preprocessing, masks or {})
    if not jobs:
        raise DataError(
            "the index holds no accepted scan, so there is nothing to prepare. Its table gives "
            "the reason for each file (column reason)."
        )
    _check_space(index, preprocessing, out)
    store = Store.create(out, preprocessing.model_dump(mode="json"))
    missing = [job for job in jobs if not store.has(job.address)]
    done = len(jobs) - len(missing)
    progress("prepare", done, len(jobs))
    plan = _Plan(index.folder, index.digest, out, preprocessing)
    where = executor or LocalConfig()
    if where == LocalConfig() and not _is_worthwhile(index, preprocessing, len(missing)):
        results = _prepare_here(plan, missing)
    else:
        results = EXECUTORS.build(where).map(
            partial(_prepare_scan, plan), missing, lost=_lost, guard=_GUARD
        )
    failures: list[str] = []
    for failure in results:
        done += 1
        if failure is not None:
            failures.append(failure)
        progress("prepare", done, len(jobs), f"{len(failures)} failed" if failures else "")
    if failures:
        shown = "\n".join(f"  {failure}" for failure in failures[:_SHOWN])
        more = f"\n  and {len(failures) - _SHOWN} more" if len(failures) > _SHOWN else ""
        raise DataError(
            f"{len(failures)} of {len(jobs)} scans could not be prepared:\n{shown}{more}\n"
            "Mend them or take them out, index again, and prepare again: the others are kept."
        )
    store.commit(job.address for job in jobs)
    return store


@dataclass(frozen=True)
class _Job:
    """One scan to prepare."""

    scan_key: str
    patient_key: str
    address: str
    masks: Mapping[str, tuple[Path, tuple[str, ...]]]  # file, and names of the classes
    points: Mapping[str, tuple[Point, ...]]


@dataclass(frozen=True)
class _Plan:
    """What all scans to prepare have in common; sent to workers with each."""

    index_folder: Path
    index_digest: str
    store: Path
    preprocessing: PreprocessingConfig


def _jobs(
    index: Index, preprocessing: PreprocessingConfig, masks: Mapping[str, MaskSource]
) -> list[_Job]:
    points = {
        n: source.read(index) for n, source in masks.items() if isinstance(source, PointSource)
    }
    folders = {
        name: source if isinstance(source, MaskFolder) else MaskFolder(source)
        for name, source in masks.items()
        if not isinstance(source, PointSource)
    }
    matched = {name: match_masks(index, source.folder) for name, source in folders.items()}
    jobs = []
    table = index.accepted
    for scan_key, patient_key, digest in zip(
        table["scan_key"], table["patient_key"], table["digest"], strict=True
    ):
        own = {
            name: (paths[scan_key], folders[name].classes)
            for name, paths in matched.items()
            if scan_key in paths
        }
        marked = {name: found[scan_key] for name, found in points.items() if scan_key in found}
        digests = {name: mask_digest(*mask) for name, mask in own.items()}
        digests |= {name: points_digest(found) for name, found in marked.items()}
        address = content_address(str(digest), preprocessing.versioned_digest(), digests)
        jobs.append(_Job(scan_key, patient_key, address, own, marked))
    return jobs


def _prepare_here(plan: _Plan, jobs: Sequence[_Job]) -> Iterator[str | None]:
    """Prepare scans in this process, which has MONAI imported; decode in a guarded worker."""
    reader = LocalExecutor(LocalConfig(num_workers=1))
    scans = reader.map(partial(_read, plan), jobs, lost=_lost, guard=_GUARD)
    for job, scan in zip(jobs, scans, strict=True):
        yield scan if isinstance(scan, str) else _put(plan, job, scan)


def _prepare_scan(plan: _Plan, job: _Job) -> str | None:
    """Prepare one scan into the store; return what is wrong with it, if anything."""
    scan = _read(plan, job)
    return scan if isinstance(scan, str) else _put(plan, job, scan)


def _read(plan: _Plan, job: _Job) -> Scan | str:
    try:
        return read_scan(_kept(plan.index_folder, plan.index_digest), job.scan_key)
    except DataError as error:
        return str(error)


def _put(plan: _Plan, job: _Job, scan: Scan) -> str | None:
    try:
        masks = {name: read_mask(path, scan, names) for name, (path, names) in job.masks.items()}
        prepared = preprocess(scan, masks, plan.preprocessing)
        shape = prepared.image_CS.shape[1:]
        marked = {
            name: paint_points(points, prepared.affine, shape, job.scan_key)
            for name, points in job.points.items()
        }
    except DataError as error:
        return str(error)
    entry = Entry(
        address=job.address,
        scan_key=job.scan_key,
        patient_key=job.patient_key,
        dims=scan.dims,
        channels=prepared.image_CS.shape[0],
        shape=prepared.image_CS.shape[1:],
        affine=tuple(tuple(float(x) for x in row) for row in prepared.affine),
        spacing_mm=prepared.spacing_mm,
        foreground_threshold=prepared.foreground_threshold,
    )
    Store(plan.store, {}).put(entry, prepared.image_CS, {**prepared.masks, **marked})
    return None


def _lost(job: _Job, loss: Loss) -> str:
    return f"scan {job.scan_key}: {_LOSSES[loss]}"


@lru_cache(maxsize=1)
def _kept(folder: Path, digest: str) -> Index:
    """Open an index once a process; its digest tells a rebuilt one from the one before."""
    del digest
    return Index.open(folder)


def _is_worthwhile(index: Index, preprocessing: PreprocessingConfig, missing: int) -> bool:
    """Return whether starting processes that import MONAI gains anything."""
    table = index.accepted
    found = sum(float(np.prod(shape)) for shape in table["shape"])
    voxels = max(found, sum(_prepared_voxels(table, preprocessing)))
    seconds = missing * (_SECONDS_A_SCAN + _SECONDS_A_VOXEL * voxels / max(1, len(table)))
    return missing > 1 and available_cores() > 1 and seconds > _WORTHWHILE_SECONDS


def _prepared_voxels(table: pd.DataFrame, preprocessing: PreprocessingConfig) -> list[float]:
    """Return how many voxels each scan has once resampled, before any crop."""
    result = []
    for shape, spacing_mm in zip(table["shape"], table["spacing_mm"], strict=True):
        size = np.asarray(shape, dtype=np.float64)
        if preprocessing.spacing_mm is not None:
            extent_mm = size * np.asarray(spacing_mm, dtype=np.float64)[: len(size)]
            size = extent_mm / np.asarray(preprocessing.spacing_mm)[: len(size)]
        result.append(float(np.prod(np.maximum(1, size))))
    return result


def _check_space(index: Index, preprocessing: PreprocessingConfig, out: Path) -> None:
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    needed = estimate(index, preprocessing)["estimated_megabytes"]
    there = sum(p.stat().st_size for p in out.rglob("*.b2nd")) / 1e6 if out.exists() else 0.0
    free = shutil.disk_usage(existing).free / 1e6
    if free + there < needed:
        raise MachineError(
            f"the store needs about {needed:.0f} MB, and the disk has {free:.0f} MB free. "
            "Free some space, choose another --out, or prepare at coarser spacing_mm."
        )
