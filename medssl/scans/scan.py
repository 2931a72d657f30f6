"""One usable scan: voxels and where they lie in the patient."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from medssl.scans.geometry import orientation_of, spacing_of

if TYPE_CHECKING:
    from monai.data.meta_tensor import MetaTensor

    from medssl.scans.index import Index

Dims = Literal["2D", "3D", "2D+t"]
Intensity = Literal["HU", "arbitrary"]


@dataclass(frozen=True)
class Scan:
    """One 2D image or 3D volume, read whole.

    Attributes:
        scan_key: its name outside `medssl.scans`.
        voxels_CXYZ: (C, X, Y), (C, X, Y, Z) or, for a cine, (C, X, Y, T) float32, in the voxel
            order of its files.
        affine: (4, 4) float64; ``affine @ (x, y, z, 1)`` is in RAS mm. A 2D image or a cine lies at
            z = 0.
        dims: what kind of scan it is.
        intensity: ``HU`` for calibrated CT, else ``arbitrary``.
        flags: what the index found worth telling, for example ``colour``.
    """

    scan_key: str
    voxels_CXYZ: npt.NDArray[np.float32]
    affine: npt.NDArray[np.float64]
    dims: Dims
    intensity: Intensity
    flags: tuple[str, ...] = ()

    @property
    def num_spatial_dims(self) -> int:
        """2 or 3; the frames of a cine are no spatial dimension."""
        return 2 if self.dims == "2D+t" else self.voxels_CXYZ.ndim - 1

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Distance between neighbouring voxels along X, Y[, Z]."""
        return spacing_of(self.affine)[: self.num_spatial_dims]

    @property
    def orientation(self) -> str:
        """Where the voxel axes point to, for example ``RAS``."""
        return orientation_of(self.affine)


def read_scan(index: Index, scan_key: str) -> Scan:
    """Read one accepted scan of an index as NumPy arrays.

    Raises:
        DataError: the key is not an accepted scan of this index, its files are gone, cannot be read
            any more, or differ from what was indexed.
    """
    row = index.row(scan_key)
    volume = index.read_volume(scan_key)
    return Scan(
        scan_key=scan_key,
        voxels_CXYZ=volume.voxels_CXYZ,
        affine=volume.affine,
        dims=row["dims"],
        intensity=row["intensity"],
        flags=tuple(row["flags"]),
    )


def load_scan(index: Index | Path | str, scan_key: str) -> MetaTensor:
    """Read one accepted scan as MONAI's tensor with an affine.

    Args:
        index: an index, or the folder that holds one.

    Returns:
        (C, X, Y[, Z]) float32; ``.affine`` maps voxel indices to RAS mm.

    Raises:
        DataError: see `read_scan`.
    """
    import torch
    from monai.data.meta_tensor import MetaTensor

    from medssl.scans.index import Index

    if not isinstance(index, Index):
        index = Index.open(Path(index))
    scan = read_scan(index, scan_key)
    meta: dict[str, Any] = {"scan_key": scan.scan_key, "space": "RAS"}
    return MetaTensor(
        torch.from_numpy(scan.voxels_CXYZ), affine=torch.from_numpy(scan.affine), meta=meta
    )
