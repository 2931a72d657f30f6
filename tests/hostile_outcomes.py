"""What must become of a folder that is hostile: the right scans and reason codes, nothing else.

A case writes files and says what must come out. Scans are checked by their voxels: either a linear
function of the place in the patient holds at every voxel (any scramble, shear, flip or wrong
spacing breaks it), or every voxel equals the one of the original that lies at the same place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medssl.errors import DataError
from medssl.pipelines import index as pipeline
from medssl.scans.index import Index
from medssl.scans.scan import Scan, read_scan
from samples import LINEAR_WEIGHTS, world_of

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Found:
    """A volume that some reader returned: voxels (C, X, Y[, Z or T]) and affine to RAS mm."""

    voxels_CXYZ: Array
    affine: npt.NDArray[np.float64]


Check = Callable[[Found], str]
"""Says what is wrong with a volume, or "" when it is right."""


@dataclass(frozen=True)
class Right:
    """A scan that must be accepted.

    Attributes:
        shape: without the channel axis; 0 where any size will do (a resampled axis).
        check: of its voxels and affine.
        flags: that its row must hold, among others.
        num_files: of its row.
    """

    shape: tuple[int, ...]
    check: Check
    dims: str = "3D"
    num_channels: int = 1
    flags: frozenset[str] = frozenset()
    intensity: str = ""

    @property
    def fits(self) -> Callable[[tuple[int, ...]], bool]:
        """Say whether a shape is this one."""
        return lambda shape: (
            len(shape) == len(self.shape)
            and all(want in (0, size) for want, size in zip(self.shape, shape, strict=True))
        )


@dataclass(frozen=True)
class Rejected:
    """Files that must be rejected, by one of the reasons (the first is the best one)."""

    reasons: tuple[str, ...]
    num_files: int = 1


def rejected(reasons: str, num_files: int = 1) -> Rejected:
    """Return the expectation for reasons written ``a|b``."""
    return Rejected(tuple(reasons.split("|")), num_files)


@dataclass(frozen=True)
class Case:
    """One hostile folder.

    Attributes:
        name: what is hostile about it.
        build: writes it, and returns what must come out; skips where real data are absent.
        settings: of the index config.
    """

    name: str
    build: Callable[[Path], tuple[Right | Rejected, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)


def linear(
    *,
    atol: float = 0.6,
    scale: float = 1.0,
    offset: float = 0.0,
    inside: tuple[npt.NDArray[np.float64], tuple[int, ...]] | None = None,
) -> Check:
    """Return the check that value = scale * (weights @ place) + offset at every voxel.

    Args:
        atol: of the value; 0.6 leaves room for stored whole numbers.
        scale, offset: of the function, for pixels that hold few bits.
        inside: affine and shape of the original; only voxels inside it are checked, and they must
            be at least a third of all: for resampled volumes, padded at their edges.
    """

    def check(found: Found) -> str:
        voxels = np.asarray(found.voxels_CXYZ[0], dtype=np.float64)
        places = world_of(found.affine, voxels.shape)
        wanted = scale * (places @ LINEAR_WEIGHTS) + offset
        within = np.ones(voxels.shape, dtype=bool)
        if inside is not None:
            affine, shape = inside
            back = np.linalg.inv(affine)
            index = places @ back[:3, :3].T + back[:3, 3]
            within = ((index >= -1e-3) & (index <= np.array(shape) - 0.999)).all(-1)
            if within.mean() < 1 / 3:
                return f"only {within.mean():.0%} of the voxels lie inside the original"
        worst = float(np.abs(voxels - wanted)[within].max())
        return "" if worst <= atol else f"off the linear function by up to {worst:.1f}"

    return check


def same_as(voxels_CXYZ: Array, affine: npt.NDArray[np.float64], *, atol: float = 1e-3) -> Check:
    """Return the check that each voxel equals the original voxel at its place in the patient."""
    original = np.asarray(voxels_CXYZ, dtype=np.float64)

    def check(found: Found) -> str:
        voxels = np.asarray(found.voxels_CXYZ, dtype=np.float64)
        if voxels.size != original.size:
            return f"{voxels.shape} instead of {original.shape}"
        places = world_of(found.affine, voxels.shape[1:])
        back = np.linalg.inv(affine)
        index = places @ back[:3, :3].T + back[:3, 3]
        nearest = np.rint(index).astype(int)
        if np.abs(index - nearest).max() > 0.02:
            return f"voxels lie {np.abs(index - nearest).max():.2f} voxels off the original grid"
        sizes = (*original.shape[1:], 1)[:3]
        if nearest.min() < 0 or (nearest.reshape(-1, 3).max(0) >= sizes).any():
            return "voxels lie outside the original"
        wanted = original.reshape(original.shape[0], *sizes)[
            (slice(None), *np.moveaxis(nearest, -1, 0))
        ]
        worst = float(np.abs(voxels - wanted).max())
        return "" if worst <= atol else f"values differ by up to {worst:.3g}"

    return check


def pixels(
    wanted_CXYZ: Array,
    *,
    atol: float = 1e-3,
    spacing_mm: tuple[float, ...] | None = None,
) -> Check:
    """Return the check of the values in their order, for images without a place in a patient."""

    def check(found: Found) -> str:
        if found.voxels_CXYZ.shape != wanted_CXYZ.shape:
            return f"{found.voxels_CXYZ.shape} instead of {wanted_CXYZ.shape}"
        worst = float(np.abs(found.voxels_CXYZ.astype(np.float64) - wanted_CXYZ).max())
        if worst > atol:
            return f"values differ by up to {worst:.3g}"
        if spacing_mm is not None:
            spacing = np.linalg.norm(found.affine[:3, :3], axis=0)[: len(spacing_mm)]
            if not np.allclose(spacing, spacing_mm, rtol=1e-4):
                return f"spacing {spacing.round(4).tolist()} mm instead of {list(spacing_mm)}"
        return ""

    return check


def inverted(stored_CXY: Array) -> Check:
    """Return the check that an image is the mirror image in value of what is stored."""

    def check(found: Found) -> str:
        if found.voxels_CXYZ.shape != stored_CXY.shape:
            return f"{found.voxels_CXYZ.shape} instead of {stored_CXY.shape}"
        total = found.voxels_CXYZ.astype(np.float64) + stored_CXY
        return "" if np.ptp(total) < 1e-3 else "not inverted"

    return check


def index_case(folder: Path, out: Path, settings: Mapping[str, Any]) -> Index:
    """Index a folder, also when nothing in it is a scan."""
    local = {"name": "local", "num_workers": 0}
    config = pipeline.Config(**{"folder": folder, "executor": local, **settings})
    try:
        return pipeline.run(config, out)
    except DataError as error:
        if "usable scan" not in str(error):
            raise
        return Index.open(out)


def differences(index: Index, expected: tuple[Right | Rejected, ...]) -> list[str]:
    """Say how an index differs from what was expected: nothing missing, nothing more."""
    table = index.table
    accepted = table[table["status"] == "accepted"].to_dict("records")
    rights = [item for item in expected if isinstance(item, Right)]
    problems = _match_scans(index, accepted, rights)
    found = Counter[str]()
    for row in table[table["status"] == "rejected"].to_dict("records"):
        found[str(row["reason"])] += int(row["num_files"])
    for item in expected:
        if isinstance(item, Rejected):
            reason = next((name for name in item.reasons if found[name] >= item.num_files), "")
            if reason:
                found[reason] -= item.num_files
            else:
                problems.append(f"not rejected: {item.num_files} × {'|'.join(item.reasons)}")
    left = {reason: count for reason, count in found.items() if count}
    return [*problems, *([f"also rejected: {left}"] if left else [])]


def _match_scans(index: Index, accepted: list[dict[str, Any]], rights: list[Right]) -> list[str]:
    problems = []
    left = list(rights)
    for row in accepted:
        said = []
        try:
            scan = read_scan(index, str(row["scan_key"]))
        except DataError as error:
            problems.append(f"accepted, but cannot be read: {str(error)[:80]}")
            continue
        for right in left:
            wrong = _wrong(row, scan, right)
            if not wrong:
                left.remove(right)
                break
            said.append(wrong)
        else:
            problems.append(
                f"accepted {tuple(map(int, row['shape']))}: {said or 'one scan too many'}"
            )
    return [*problems, *(f"no scan of shape {right.shape}" for right in left)]


def _wrong(row: Mapping[str, Any], scan: Scan, right: Right) -> str:
    shape = tuple(int(size) for size in row["shape"])
    if row["dims"] != right.dims or scan.dims != right.dims:
        return f"{row['dims']} instead of {right.dims}"
    if not right.fits(shape) or not right.fits(scan.voxels_CXYZ.shape[1:]):
        return f"shape {shape} instead of {right.shape}"
    if scan.voxels_CXYZ.shape[0] != right.num_channels:
        return f"{scan.voxels_CXYZ.shape[0]} channels instead of {right.num_channels}"
    if missing := right.flags - set(row["flags"]):
        return f"flags lack {sorted(missing)}, found {sorted(row['flags'])}"
    if right.intensity and row["intensity"] != right.intensity:
        return f"intensity {row['intensity']} instead of {right.intensity}"
    return right.check(Found(scan.voxels_CXYZ, scan.affine))
