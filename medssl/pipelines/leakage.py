"""Guards against leakage: test patients, or copies of their images, where they must not be.

Patients are found by key. The same image under two names is found by its perceptual hash (see
`medssl.scans.image_hashes`): a patient with two identities, an export that was converted twice, a
public data set inside the archive.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medssl.config import ComponentConfig
from medssl.errors import LeakageError
from medssl.executors.local import Config as LocalConfig
from medssl.executors.local import LocalExecutor
from medssl.models.checkpoints import find_checkpoint, load_contract
from medssl.models.inits.base import name_some
from medssl.pipelines.progress import Progress, silent
from medssl.scans.image_hashes import hashes_of, keep_hashes, kept_hashes, same_images
from medssl.scans.splits import Splits
from medssl.scans.store import Store

log = logging.getLogger(__name__)

_HASHES = ".image_hashes.parquet"
"""After the name of a checkpoint's folder: a file beside it, of the images it was pretrained on. It
stays out of the folder, which is exported and sent to MLflow: whoever has an image could tell by
the hashes whether it was among these."""

_FEW_SCANS = 64
"""Hashing so many takes a second or two: processes would start for longer."""


@dataclass(frozen=True)
class Leakage:
    """What was found and allowed, for the report.

    Attributes:
        patients: test patients that some init was pretrained on, by key.
        images: test scans whose image is also a training, validation or pretraining scan of
            another patient.
        repeated: test scans, by key, that show the same image as one of another test patient.
        unknown: inits whose pretraining images nobody can look at: no hashes lie beside their
            checkpoint, which was exported or copied without them.
    """

    patients: int = 0
    images: int = 0
    repeated: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def warn(self) -> None:
        """Log what makes results less sure than they look."""
        for label in self.unknown:
            log.warning(
                "init %r: no hashes of the images it was pretrained on lie beside its checkpoint, "
                "so copies of test images under other names cannot be found there; test patients "
                "are looked for by key alone.",
                label,
            )
        if self.repeated:
            log.warning(
                "%d scans of test patients show the same images as those of other test patients "
                "(%s): intervals take them for more people than they are.",
                len(self.repeated), name_some(self.repeated),
            )  # fmt: skip


def check_leakage(
    inits: Mapping[str, ComponentConfig],
    store: Store,
    splits: Splits,
    *,
    pool: Sequence[str] = (),
    allow_patients: bool = False,
    allow_images: bool = False,
    progress: Progress = silent,
) -> Leakage:
    """Look for test patients in pretraining pools, and for their images on any other side.

    Args:
        inits: by label.
        store, splits: the data; patients on no side, and not in the pool, take no part.
        pool: patients that this run pretrains on.
        allow_patients: permit test patients in pretraining pools.
        allow_images: permit their images elsewhere.

    Raises:
        LeakageError: there are some, and the config does not allow it.
    """
    patients = overlap_with_pretraining(inits, splits, allowed=allow_patients)
    test = set(splits.test)
    keys = store.scan_keys
    hashes = hash_scans(store, keys, progress)
    of_test = [key for key in keys if store.listed(key).patient_key in test]
    learned = {*splits.train, *splits.val, *pool} - test
    others = [key for key in keys if store.listed(key).patient_key in learned]
    known = [hashes[key] for key in of_test]
    pairs = same_images(known, [hashes[key] for key in others])
    found = {of_test[ours]: others[theirs] for ours, theirs, _ in pairs}
    if found and not allow_images:
        (ours, theirs), *_ = found.items()
        raise LeakageError(
            f"{len(found)} of the {len(of_test)} scans of test patients show the same image as a "
            f"scan of a training, validation or pretraining patient ({name_some(sorted(found))}). "
            f"Scan {ours} of test patient {store.listed(ours).patient_key} is scan {theirs} of "
            f"patient {store.listed(theirs).patient_key}. If the two are one person, name patients "
            "under `patients` in the index config; else leave one of the scans out, or set "
            "allow_duplicated_images: true, and the report will say so."
        )
    images, unknown = set(found), []
    for label, init in inits.items():
        folder = _checkpoint_folder(init)
        if folder is None:
            continue
        if not hashes_beside(folder).is_file():
            unknown.append(label)
        seen = {of_test[n] for n, _, _ in same_images(known, kept_hashes(hashes_beside(folder)))}
        if seen and not (allow_images or allow_patients):
            raise LeakageError(
                f"init {label!r} was pretrained on the images of {len(seen)} of the {len(of_test)} "
                f"scans of test patients ({name_some(sorted(seen))}), under other names. Pretrain "
                "it without them, or set allow_duplicated_images: true, and the report will say so."
            )
        images |= seen
    repeated = {
        of_test[position]
        for first, second, _ in same_images(known, known)
        if first != second
        and store.listed(of_test[first]).patient_key != store.listed(of_test[second]).patient_key
        for position in (first, second)
    }
    return Leakage(patients, len(images), tuple(sorted(repeated)), tuple(unknown))


def overlap_with_pretraining(
    inits: Mapping[str, ComponentConfig], splits: Splits, *, allowed: bool
) -> int:
    """Return how many test patients an init was pretrained on.

    Raises:
        LeakageError: there are some, and the config does not allow it.
    """
    test = set(splits.test)
    worst = 0
    for label, init in inits.items():
        if init.name != "checkpoint" or not hasattr(init, "path"):
            continue
        shared = test & set(load_contract(init.path).patients)
        worst = max(worst, len(shared))
        if shared and not allowed:
            raise LeakageError(
                f"init {label!r} was pretrained on scans of {len(shared)} of the {len(test)} test "
                "patients. Pretrain it with the same splits file (splits.file), or set "
                "allow_test_patients_in_pretraining: true, and the report will say so."
            )
    return worst


def hash_scans(
    store: Store, scan_keys: Sequence[str], progress: Progress = silent
) -> dict[str, bytes]:
    """Return the perceptual hash of scans by key, made by all cores where there are many."""
    workers = 0 if len(scan_keys) <= _FEW_SCANS else None
    executor = LocalExecutor(LocalConfig(num_workers=workers))
    return hashes_of(store, scan_keys, executor, lambda *done: progress("leakage", *done))


def write_hashes(
    folder: Path, store: Store, scan_keys: Sequence[str], earlier: ComponentConfig
) -> None:
    """Write, beside a checkpoint, hashes of the images it was pretrained on, now and before.

    Args:
        folder: of the checkpoint.
        store, scan_keys: what it was pretrained on.
        earlier: the init that it started from.
    """
    before = _checkpoint_folder(earlier)
    known = kept_hashes(hashes_beside(before)) if before is not None else []
    keep_hashes(hashes_beside(folder), [*known, *hash_scans(store, scan_keys).values()])


def hashes_beside(checkpoint: Path) -> Path:
    """Return where the hashes of the images lie that a checkpoint was pretrained on."""
    return checkpoint.with_name(checkpoint.name + _HASHES)


def _checkpoint_folder(init: ComponentConfig) -> Path | None:
    """Return the folder of the checkpoint that an init loads, if it loads one."""
    path = getattr(init, "path", None)
    return find_checkpoint(path) if init.name == "checkpoint" and path else None
