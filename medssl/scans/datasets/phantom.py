"""Synthetic CT of made-up patients, for machines that reach no public data. It proves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from medssl.scans.datasets._download import Progress
from medssl.scans.datasets.base import Card, Dataset, Origin
from medssl.scans.phantom import write_phantom

NUM_PATIENTS = 24
SEED = 0


class Phantom(Dataset):
    """DICOM series with masks 1 liver, 2 lesion, and a class: cyst or solid lesion."""

    card: ClassVar[Card] = Card(
        name="phantom",
        title="Synthetic abdominal CT, generated on this machine",
        licence="Apache-2.0 (made by medssl)",
        citation="none: synthetic data prove nothing",
        images="images",
        masks={"liver": "masks"},
        labels="labels.csv",
        synthetic=True,
    )

    def fill(
        self, folder: Path, mirror: Path | None, *, network: bool, progress: Progress | None
    ) -> Origin:
        """See `Dataset.fill`; needs neither mirror nor network."""
        del mirror, network
        write_phantom(folder, num_patients=NUM_PATIENTS, seed=SEED, progress=progress)
        return Origin("generated", (f"{NUM_PATIENTS} made-up patients, seed {SEED}.",))
