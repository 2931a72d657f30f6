"""Hippocampus MR volumes with masks: task 4 of the Medical Segmentation Decathlon."""

from __future__ import annotations

import re
import shutil
from pathlib import Path, PurePosixPath
from typing import ClassVar

from medssl.atomic import atomic_write
from medssl.errors import DataError
from medssl.scans.datasets._download import Archive, Progress, check, download, extract
from medssl.scans.datasets.base import Card, Dataset, Origin, unreachable

_SCAN = re.compile(r"hippocampus_(\d+)\.nii\.gz")
_FOLDERS = {"imagesTr": "images", "labelsTr": "labels"}
_PAIR_RULE = (
    "patients.csv was made from the rule that scans 2k-1 and 2k are the two sides of one person; "
    "intensity statistics show it, the publisher does not state it."
)


class Hippocampus(Dataset):
    """T1-weighted MR at 1 mm, cropped to one hippocampus; masks 1 anterior, 2 posterior."""

    card: ClassVar[Card] = Card(
        name="hippocampus",
        title="Medical Segmentation Decathlon, Task04 Hippocampus",
        licence="CC-BY-SA 4.0",
        citation=(
            "Antonelli et al., The Medical Segmentation Decathlon, "
            "Nature Communications 13, 4128, 2022"
        ),
        images="images",
        masks={"hippocampus": "labels"},
        patients="patients.csv",
        archives=(
            Archive(
                url="https://msd-for-monai.s3-us-west-2.amazonaws.com/Task04_Hippocampus.tar",
                algorithm="md5",
                checksum="9d24dba78a72977dbd1d2e110310f31b",
                size_bytes=28_000_000,
            ),
        ),
    )

    def fill(
        self, folder: Path, mirror: Path | None, *, network: bool, progress: Progress | None
    ) -> Origin:
        """See `Dataset.fill`."""
        (archive,) = self.card.archives
        if mirror is not None and (mirror / "hippocampus" / "images").is_dir():
            return _copy(mirror / "hippocampus", folder)
        if mirror is not None and (mirror / archive.file_name).is_file():
            check(mirror / archive.file_name, archive)
            return _unpack(mirror / archive.file_name, folder, "mirror")
        if not network:
            raise unreachable(self.card)
        tar = folder / archive.file_name
        download(archive, tar, progress)
        origin = _unpack(tar, folder, "network")
        tar.unlink()
        return origin


def _copy(source: Path, folder: Path) -> Origin:
    names = sorted(path.name for path in (source / "images").glob("*.nii.gz"))
    for part in ("images", "labels"):
        (folder / part).mkdir()
        for name in names:
            if not (source / part / name).is_file():
                raise DataError(f"the mirror has no {part} for one of {len(names)} scans.")
            shutil.copyfile(source / part / name, folder / part / name)
    shutil.copyfile(source / "patients.csv", folder / "patients.csv")
    return Origin("mirror", (f"{len(names)} of the 260 labelled volumes.",))


def _unpack(tar: Path, folder: Path, kind: str) -> Origin:
    def wanted(member: str) -> str | None:
        path = PurePosixPath(member)
        target = _FOLDERS.get(path.parent.name)
        # The archive also holds macOS's "._" files, and 130 volumes without masks (imagesTs).
        return f"{target}/{path.name}" if target and _SCAN.fullmatch(path.name) else None

    extract(tar, folder, wanted)
    names = sorted(path.name for path in (folder / "images").glob("*.nii.gz"))
    if not names or names != sorted(path.name for path in (folder / "labels").glob("*.nii.gz")):
        raise DataError(f"{tar.name} does not hold one mask for each volume.")
    write_patients(folder / "patients.csv", names)
    notes = (f"{len(names)} labelled volumes; those without masks were left out.", _PAIR_RULE)
    return Origin("mirror" if kind == "mirror" else "network", notes)


def write_patients(path: Path, names: list[str]) -> None:
    """Write who is who, by the rule that scans 2k-1 and 2k are one person's two sides.

    Args:
        path: the table, with columns ``scan`` (file name without endings) and ``patient``.
        names: file names such as ``hippocampus_003.nii.gz``.
    """
    lines = ["scan,patient"]
    for name in names:
        match = _SCAN.fullmatch(name)
        if match is None:
            raise DataError(f"{name} is not named like a scan of this data set.")
        lines.append(f"{name.removesuffix('.nii.gz')},subject_{(int(match[1]) + 1) // 2:03d}")
    atomic_write(path, "\n".join(lines) + "\n")
