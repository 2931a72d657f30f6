"""What the store writes down of each prepared scan, and the address it keeps it under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

FORMAT = 1
"""Version of the folder's layout; a store of another version is prepared anew."""


@dataclass(frozen=True)
class Entry:
    """What the store knows of one scan.

    Attributes:
        shape: voxels along each spatial axis, (X, Y) or (X, Y, Z) in RAS order.
        affine: (4, 4) as rows, voxel index to RAS mm.
        spacing_mm: one number for each spatial axis.
        foreground_threshold: a voxel is foreground where the stored image exceeds this.
        foreground_counts: for each spatial axis, the foreground voxels of each slice across it.
        masks: names of the masks stored beside the image.
        files: sizes in bytes and sha256 of the files, for damage to be found.
    """

    address: str
    scan_key: str
    patient_key: str
    dims: str
    channels: int
    shape: tuple[int, ...]
    affine: tuple[tuple[float, ...], ...]
    spacing_mm: tuple[float, ...]
    foreground_threshold: float
    foreground_counts: tuple[tuple[int, ...], ...] = ()
    masks: tuple[str, ...] = ()
    files: Mapping[str, tuple[int, str]] | None = None

    @property
    def num_voxels(self) -> int:
        """Voxels of one channel."""
        return int(np.prod(self.shape))

    @property
    def foreground_fraction(self) -> float:
        """Part of the scan's voxels that are foreground."""
        return sum(self.foreground_counts[0]) / self.num_voxels if self.foreground_counts else 0.0

    def to_json(self) -> str:
        """Return the entry as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Entry:
        """Read what `to_json` wrote."""
        raw = json.loads(text)
        for name in ("shape", "spacing_mm", "masks"):
            raw[name] = tuple(raw[name])
        for name in ("affine", "foreground_counts"):
            raw[name] = tuple(tuple(row) for row in raw[name])
        raw["files"] = {name: (size, digest) for name, (size, digest) in raw["files"].items()}
        return cls(**raw)


def entry_of_row(row: Mapping[str, Any]) -> Entry:
    """Return the entry of a row of the store's table, which has no counts and no files."""
    affine = [float(number) for number in row["affine"]]
    return Entry(
        address=str(row["address"]),
        scan_key=str(row["scan_key"]),
        patient_key=str(row["patient_key"]),
        dims=str(row["dims"]),
        channels=int(row["channels"]),
        shape=tuple(int(size) for size in row["shape"]),
        affine=tuple(tuple(affine[start : start + 4]) for start in range(0, len(affine), 4)),
        spacing_mm=tuple(float(mm) for mm in row["spacing_mm"]),
        foreground_threshold=float(row["foreground_threshold"]),
        masks=tuple(str(name) for name in row["masks"]),
    )


def content_address(scan_digest: str, preprocessing_digest: str, masks: Mapping[str, str]) -> str:
    """Return the name under which a prepared scan is stored.

    Args:
        scan_digest: digest of the scan's voxels and geometry, from the index.
        preprocessing_digest: digest of the preprocessing config.
        masks: sha256 of each mask's file, by name.
    """
    text = json.dumps([FORMAT, scan_digest, preprocessing_digest, sorted(masks.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
