"""Affines: voxel indices to millimetres."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Affine = npt.NDArray[np.float64]

RAS_FROM_LPS: Affine = np.diag([-1.0, -1.0, 1.0, 1.0])
RAS_FROM_LPS.setflags(write=False)
_LETTERS = ("LR", "PA", "IS")  # the negative and the positive end of each axis of the patient


def spacing_of(affine: Affine) -> tuple[float, float, float]:
    """Return the distance in mm between neighbouring voxels along X, Y and Z."""
    x, y, z = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)
    return float(x), float(y), float(z)


def orientation_of(affine: Affine) -> str:
    """Return where each voxel axis points to, for example ``"RAS"`` or ``"LPS"``.

    Each of the patient's axes is used once: the strongest match is taken first.
    """
    directions = np.asarray(affine)[:3, :3] / np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)
    weights = np.abs(directions)
    letters = ["", "", ""]
    for _ in range(3):
        world, voxel = np.unravel_index(int(np.argmax(weights)), weights.shape)
        letters[voxel] = _LETTERS[world][int(directions[world, voxel] > 0)]
        weights[world, :] = -1.0
        weights[:, voxel] = -1.0
    return "".join(letters)


def shear_of(affine: Affine) -> float:
    """Return the largest |cosine| between two voxel axes: 0 when they are perpendicular."""
    matrix = np.asarray(affine)[:3, :3]
    directions = matrix / np.linalg.norm(matrix, axis=0)
    return float(np.abs(directions.T @ directions - np.eye(3)).max())


def flip_axis(affine: Affine, axis: int, size: int) -> Affine:
    """Return the affine of the same scan with one voxel axis reversed."""
    flip = np.eye(4)
    flip[axis, axis], flip[axis, 3] = -1.0, size - 1.0
    return np.asarray(affine @ flip)
