"""Small stores for tests, made from arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medssl.scans.store import Entry, Store

Array = npt.NDArray[Any]


def numbered_volume(shape: Sequence[int]) -> Array:
    """Return a float16 volume whose voxels all differ from their neighbours, in [0, 1]."""
    count = int(np.prod(shape))
    return ((np.arange(count) * 7) % 1021 / 1021).reshape(shape).astype(np.float16)


def make_store(
    folder: Path,
    images: Mapping[str, Array],
    *,
    masks: Mapping[str, Mapping[str, Array]] | None = None,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    foreground_threshold: float = 0.1,
) -> Store:
    """Return a finished store; the image of each scan has no channel axis, or one in front.

    Args:
        images: by scan key; the patient of ``a1`` is ``a``.
        masks: by scan key, then by name.
    """
    store = Store.create(folder, {"spacing_mm": list(spacing_mm)})
    addresses = []
    for key, image in images.items():
        image_CS = image if image.ndim == 4 else image[np.newaxis]
        dims = image_CS.ndim - 1
        entry = Entry(
            address=f"address-{key}",
            scan_key=key,
            patient_key=key[0],
            dims=f"{dims}D",
            channels=len(image_CS),
            shape=image_CS.shape[1:],
            affine=tuple(tuple(row) for row in np.diag([*spacing_mm, 1.0]).tolist()),
            spacing_mm=tuple(spacing_mm)[:dims],
            foreground_threshold=foreground_threshold,
        )
        store.put(entry, image_CS.astype(np.float16), (masks or {}).get(key))
        addresses.append(entry.address)
    store.commit(addresses)
    return Store.open(folder)
