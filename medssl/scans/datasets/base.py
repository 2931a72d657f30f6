"""What a public data set states about itself, and how it gets onto this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from medssl.atomic import atomic_write, disk_errors
from medssl.errors import DataError, MachineError
from medssl.scans.datasets import DATASETS
from medssl.scans.datasets._download import Archive, Progress
from medssl.scans.datasets._mirror import find_mirror

PROVENANCE = "dataset.json"
"""What a fetched folder says of itself; the index keeps a copy, and the report prints it."""


@dataclass(frozen=True)
class Card:
    """What a user must know before using a data set.

    Attributes:
        licence: as the publisher names it.
        citation: whom to cite.
        images: folder to index, relative to the data set's own.
        masks: folder of masks, by name.
        patients: table of scan and patient, where the files do not say who is who.
        labels: table of class labels.
        synthetic: made up, so that no result on it proves anything.
        archives: what is downloaded, with checksums.
    """

    name: str
    title: str
    licence: str
    citation: str
    images: str
    masks: Mapping[str, str]
    patients: str | None = None
    labels: str | None = None
    synthetic: bool = False
    archives: tuple[Archive, ...] = ()


@dataclass(frozen=True)
class Origin:
    """Where the files came from."""

    kind: Literal["mirror", "network", "generated"]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fetched:
    """A data set on this machine."""

    card: Card
    folder: Path
    origin: str

    @property
    def images(self) -> Path:
        """The folder to index."""
        return self.folder / self.card.images

    @property
    def masks(self) -> dict[str, Path]:
        """Folders of masks, by name."""
        return {name: self.folder / path for name, path in self.card.masks.items()}

    @property
    def patients(self) -> Path | None:
        """Table of scan and patient, or None."""
        return self.folder / self.card.patients if self.card.patients else None

    @property
    def labels(self) -> Path | None:
        """Table of class labels, or None."""
        return self.folder / self.card.labels if self.card.labels else None

    @property
    def synthetic(self) -> bool:
        """Whether results on it prove nothing."""
        return self.card.synthetic


class Dataset(ABC):
    """One public data set. A file in this package defines one subclass."""

    card: ClassVar[Card]

    @abstractmethod
    def fill(
        self, folder: Path, mirror: Path | None, *, network: bool, progress: Progress | None
    ) -> Origin:
        """Put the files into an empty folder.

        Args:
            folder: where to.
            mirror: a folder that may hold the data set already.
            network: whether downloading is allowed.
            progress: called with bytes or items done, and their total.

        Raises:
            MachineError: neither the mirror nor the network has it.
            DataError: what came differs from its checksum.
        """


def cards() -> list[Card]:
    """Return the cards of all data sets, by name."""
    return [DATASETS.load(name).card for name in DATASETS.names()]


def fetch(
    name: str,
    folder: Path,
    *,
    mirror: Path | None = None,
    network: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Fetched:
    """Bring a data set to this machine; nothing happens when it is there already.

    Args:
        name: of the data set.
        folder: where to; must be absent, empty, or hold the same data set.
        mirror: a folder that holds data sets; found by itself when absent (`find_mirror`).
        network: whether downloading is allowed.
        progress: called with the amount done and the total.

    Raises:
        ConfigError: there is no such data set.
        DataError: the folder holds something else, or a checksum differs.
        MachineError: neither mirror nor network has it, or the disk is full.
    """
    member = DATASETS.load(name)
    folder = Path(folder)
    provenance = _provenance(folder)
    if provenance is not None and provenance.get("name") == name:
        missing = [path for path in provenance["files"] if not (folder / path).is_file()]
        if not missing:
            return Fetched(member.card, folder, str(provenance["origin"]))
        raise DataError(
            f"the {name} folder has lost {len(missing)} of {len(provenance['files'])} files. "
            "Remove the folder and fetch it again."
        )
    if folder.exists() and any(folder.iterdir()):
        raise DataError(
            f"the folder for {name} is not empty and was not made by `medssl datasets fetch`. "
            "Choose another with --out."
        )
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            origin = member().fill(
                draft, mirror or find_mirror(), network=network, progress=progress
            )
            _write_provenance(draft, member.card, origin)
            draft.chmod(0o755)
            if folder.exists():
                folder.rmdir()
            draft.replace(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return Fetched(member.card, folder, origin.kind)


def verify(folder: Path) -> dict[str, list[str]]:
    """Compare a fetched data set with what was written down when it came.

    Returns:
        Paths inside the folder, as ``missing``, ``changed`` and ``added``.

    Raises:
        DataError: the folder holds no fetched data set.
    """
    provenance = _provenance(Path(folder))
    if provenance is None:
        raise DataError("the folder holds no fetched data set (no dataset.json). Fetch it.")
    wanted: dict[str, str] = provenance["files"]
    found = checksums(Path(folder))
    return {
        "missing": sorted(wanted.keys() - found.keys()),
        "changed": sorted(p for p in wanted.keys() & found.keys() if wanted[p] != found[p]),
        "added": sorted(found.keys() - wanted.keys()),
    }


def checksums(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file under a folder, by relative path, sorted."""
    result = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != PROVENANCE:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            result[path.relative_to(folder).as_posix()] = digest
    return result


def unreachable(card: Card) -> MachineError:
    """Return the error for a data set that is nowhere to be had."""
    urls = ", ".join(archive.url for archive in card.archives)
    return MachineError(
        f"data set {card.name} is not in a mirror and the network is not to be used. "
        f"Download {urls} elsewhere, and set MEDSSL_DATA_MIRROR to the folder that holds it."
    )


def _write_provenance(folder: Path, card: Card, origin: Origin) -> None:
    content = {
        "name": card.name,
        "title": card.title,
        "licence": card.licence,
        "citation": card.citation,
        "synthetic": card.synthetic,
        "archives": [vars(archive) for archive in card.archives],
        "origin": origin.kind,
        "notes": list(origin.notes),
        "files": checksums(folder),
    }
    atomic_write(folder / PROVENANCE, json.dumps(content, indent=2))


def _provenance(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fits = isinstance(content, dict) and {"name", "origin", "files"} <= content.keys()
    return content if fits else None
