"""Prepare the scans of an index: preprocess each once and keep it in a store."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field, StringConstraints

from medssl.config import Config
from medssl.errors import DataError, MachineError
from medssl.executors.local import Config as LocalConfig
from medssl.executors.local import LocalExecutor, auto_workers
from medssl.pipelines.progress import Progress, silent
from medssl.scans.entry import Entry, content_address
from medssl.scans.index import Index
from medssl.scans.labels import match_masks, read_mask
from medssl.scans.scan import read_scan
from medssl.scans.store import Store
from medssl.transforms.preprocessing import PreprocessingConfig, preprocess

MaskName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,40}$")]

_COMPRESSED = 0.65
"""Size of a stored image against its raw float16 voxels (0.63 measured on hippocampus MR)."""

_SECONDS_A_SCAN, _SECONDS_A_VOXEL = 0.02, 1.5e-7
"""Work of preprocessing, measured on one core: a fixed part, and one that grows with voxels."""

_WORTHWHILE_SECONDS = 90.0
"""Below this much work, starting processes that import MONAI (10 s each) gains nothing."""

_SHOWN = 5  # failures that a message spells out


class PrepareConfig(Config):
    """Configuration of ``medssl prepare``.

    Attributes:
        index: folder of the index, from ``medssl index``.
        preprocessing: what is done to each scan.
        masks: folders of masks, by a name of small letters, digits and underscores.
        out: folder of the store; beside the index's table by default.
        num_workers: processes; absent: as many as pay off; 0: this one.
    """

    index: Path
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    masks: dict[MaskName, Path] = Field(default_factory=dict)
    out: Path | None = None
    num_workers: int | None = Field(default=None, ge=0)


def run(config: PrepareConfig, progress: Progress = silent) -> Store:
    """Prepare all accepted scans of an index. See `prepare`."""
    return prepare(
        Index.open(config.index),
        config.preprocessing,
        store_folder(config.index, config.preprocessing, config.out),
        masks=config.masks,
        num_workers=config.num_workers,
        progress=progress,
    )


def plan(config: PrepareConfig) -> dict[str, Any]:
    """Return what `run` would do, touching nothing."""
    index = Index.open(config.index)
    folder = store_folder(config.index, config.preprocessing, config.out)
    jobs = _jobs(index, config.preprocessing, folder, config.masks)
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
    masks: Mapping[str, Path] | None = None,
    *,
    num_workers: int | None = None,
    progress: Progress = silent,
) -> Store:
    """Bring a store up to date with an index; scans that are there already are not touched.

    Args:
        index: whose accepted scans to prepare.
        preprocessing: what is done to each.
        out: the store's folder.
        masks: folders of masks, by name; a scan without a mask is prepared without.
        num_workers: processes; absent: as many as pay off; 0: this one.
        progress: is told ``"prepare"``, scans done, all scans.

    Raises:
        DataError: the index has no accepted scan, or some cannot be prepared: all others are
            done and kept, and the message says what is wrong with which, by key.
        LabelError: a mask folder fits no scan.
        MachineError: the disk is full or not writable.
    """
    jobs = _jobs(index, preprocessing, out, masks or {})
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
    executor = LocalExecutor(
        LocalConfig(num_workers=_workers(index, preprocessing, len(missing), num_workers))
    )
    failures: list[str] = []
    for failure in executor.map(_prepare_scan, missing, lost=_lost, chunk_size=1):
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
    """One scan to prepare; plain data, so that it can be sent to a worker."""

    index: Path
    index_digest: str
    store: Path
    scan_key: str
    patient_key: str
    address: str
    preprocessing: PreprocessingConfig
    masks: Mapping[str, Path]


def _jobs(
    index: Index, preprocessing: PreprocessingConfig, out: Path, masks: Mapping[str, Path]
) -> list[_Job]:
    matched = {name: match_masks(index, folder) for name, folder in masks.items()}
    jobs = []
    table = index.accepted
    for scan_key, patient_key, digest in zip(
        table["scan_key"], table["patient_key"], table["digest"], strict=True
    ):
        own = {name: paths[scan_key] for name, paths in matched.items() if scan_key in paths}
        address = content_address(
            str(digest),
            preprocessing.versioned_digest(),
            {name: _sha256(path) for name, path in own.items()},
        )
        jobs.append(
            _Job(
                index.folder,
                index.digest,
                out,
                scan_key,
                patient_key,
                address,
                preprocessing,
                own,
            )
        )
    return jobs


def _prepare_scan(job: _Job) -> str | None:
    """Prepare one scan into the store; return what is wrong with it, if anything."""
    try:
        scan = read_scan(_open_index(job.index, job.index_digest), job.scan_key)
        masks = {name: read_mask(path, scan) for name, path in job.masks.items()}
        prepared = preprocess(scan, masks, job.preprocessing)
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
    Store(job.store, {}).put(entry, prepared.image_CS, prepared.masks)
    return None


def _lost(job: _Job) -> str:
    return (
        f"scan {job.scan_key}: its worker process died, most likely for lack of memory. "
        "Use fewer workers (num_workers=1) or coarser voxels."
    )


@lru_cache(maxsize=1)
def _open_index(folder: Path, digest: str) -> Index:
    """Open an index once a process; its digest tells a rebuilt one from the one before."""
    del digest
    return Index.open(folder)


def _workers(
    index: Index, preprocessing: PreprocessingConfig, missing: int, wanted: int | None
) -> int:
    if wanted is not None:
        return wanted
    table = index.accepted
    found = sum(float(np.prod(shape)) for shape in table["shape"])
    voxels = max(found, sum(_prepared_voxels(table, preprocessing)))
    seconds = missing * (_SECONDS_A_SCAN + _SECONDS_A_VOXEL * voxels / max(1, len(table)))
    return auto_workers(missing, 2) if seconds > _WORTHWHILE_SECONDS else 0


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


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
