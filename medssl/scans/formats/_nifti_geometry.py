"""Where the voxels of a NIfTI file lie in the patient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from medssl.errors import RejectedScan

_MAX_SHEAR = 1e-3  # cosine between the two axes of a slice
_AFFINE_TOLERANCE_MM = 1e-2
_SPACING_TOLERANCE = 0.01  # of the spacing, between pixdim and the affine in use
_SPACING_MM = (1e-4, 250.0)  # from below a cell to beyond any slice: what is outside is in error
_MIN_DETERMINANT = 1e-3  # of the axes' directions; 1 when they are perpendicular
_FAR_MM = 1e6  # no scanner is a kilometre long
_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metre, millimetre, micrometre
_MAX_QUATERNION_EXCESS = 1e-5  # of its squared norm above 1, from rounding to float32
_HALF_TURN = 4e-7  # the squared real part that rounding three float32 can leave of a zero
_CODES = range(1, 6)  # scanner, aligned, Talairach, MNI, other template

Affine = npt.NDArray[np.float64]


def affine_of(fields: Any, num_axes: int) -> tuple[Affine, list[str]]:
    """Return the affine of a header: the sform where it is set, else the qform.

    Two transforms that disagree about left and right leave no safe choice: such a file is rejected.
    Any other disagreement is flagged (a sform may lead into a template, a qform to the scanner).

    Args:
        fields: of a NIfTI header.
        num_axes: of the image in space, 2 or 3. The third spacing of a 2D image may be absent.

    Returns:
        (4, 4), voxel index to RAS mm, whose first two axes are perpendicular; and flags.

    Raises:
        RejectedScan: ``no_orientation``, ``nonfinite_geometry`` or ``gantry_tilt``.

    Source: nifti1.h, "3D IMAGE (VOLUME) ORIENTATION AND LOCATION IN SPACE".
    """
    has_sform, has_qform = (int(fields[name]) in _CODES for name in ("sform_code", "qform_code"))
    if not has_sform and not has_qform:
        raise RejectedScan("no_orientation", "neither sform nor qform is set")
    spacing = np.array(fields["pixdim"], dtype=np.float64)[1:4]
    valid = (spacing > 0) & (spacing < _FAR_MM)
    if not valid[:num_axes].all():
        raise RejectedScan("nonfinite_geometry", "a spacing is missing, negative or not finite")
    if not valid[2]:
        spacing[2] = 1.0
    flags: list[str] = []
    qform = _qform(fields, spacing) if has_qform else None
    if has_sform:
        affine = np.eye(4)
        affine[:3] = [fields["srow_x"], fields["srow_y"], fields["srow_z"]]
        flags += _compare(affine, spacing[:num_axes], qform, has_qform=has_qform)
    elif qform is None:
        raise RejectedScan("nonfinite_geometry", "the quaternion of the qform is not finite")
    else:
        affine = qform
    unit = int(fields["xyzt_units"]) & 7
    if unit not in _MM_PER_UNIT:
        raise RejectedScan("nonfinite_geometry", f"unit of length {unit} is unknown")
    affine[:3] *= _MM_PER_UNIT[unit]
    _check(affine, num_axes)
    return affine, flags


def _qform(fields: Any, spacing: npt.NDArray[np.float64]) -> Affine | None:
    """Return the affine that quaternion, offset and spacing stand for, or None when invalid."""
    b, c, d = (float(fields[f"quatern_{name}"]) for name in "bcd")
    origin = [float(fields[f"qoffset_{name}"]) for name in "xyz"]
    rest = 1.0 - (b * b + c * c + d * d)
    if not math.isfinite(rest) or rest < -_MAX_QUATERNION_EXCESS or not _all_near(origin):
        return None
    handedness = float(fields["pixdim"][0])
    if handedness not in (-1.0, 0.0, 1.0):
        raise RejectedScan("no_orientation", "qfac is neither 1 nor -1: left and right are unsafe")
    a = math.sqrt(max(rest, 0.0))
    if rest < _HALF_TURN:
        a = 0.0
        b, c, d = np.array([b, c, d]) / math.sqrt(b * b + c * c + d * d)
    turn = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing * [1.0, 1.0, -1.0 if handedness < 0 else 1.0]
    affine[:3, 3] = origin
    return affine


def _compare(
    sform: Affine, spacing: npt.NDArray[np.float64], qform: Affine | None, *, has_qform: bool
) -> list[str]:
    """Return flags for what the two transforms and the spacing disagree about."""
    flags = []
    if not _all_near(sform):
        raise RejectedScan("nonfinite_geometry", "the sform is not finite")
    if has_qform and (qform is None or not np.allclose(sform, qform, atol=_AFFINE_TOLERANCE_MM)):
        flags.append("sform_qform_differ")
    if qform is not None:
        mirrored = np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0
        # The first row is the direction towards the patient's right, in voxels.
        if mirrored or float(sform[0, :3] @ qform[0, :3]) < 0:
            raise RejectedScan("no_orientation", "sform and qform disagree about left and right")
    lengths = np.linalg.norm(sform[:3, :3], axis=0)[: len(spacing)]
    if not has_qform and not np.allclose(lengths, spacing, rtol=_SPACING_TOLERANCE, atol=0):
        flags.append("pixdim_differs")
    return flags


def _all_near(values: npt.ArrayLike) -> bool:
    """Say whether all numbers are finite and lie within any conceivable scanner, in mm."""
    return bool((np.abs(np.asarray(values, dtype=np.float64)) < _FAR_MM).all())


def _check(affine: Affine, num_axes: int) -> None:
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if lengths.min() <= 0:
        raise RejectedScan("nonfinite_geometry", "the affine has an axis of no length")
    low, high = _SPACING_MM
    if lengths[:num_axes].min() < low or lengths[:num_axes].max() > high:
        raise RejectedScan(
            "nonfinite_geometry", f"the spacing is not between {low:g} and {high:g} mm"
        )
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < _MIN_DETERMINANT:
        raise RejectedScan("nonfinite_geometry", "the axes lie in one plane")
    shear = abs(float(affine[:3, 0] @ affine[:3, 1])) / float(lengths[0] * lengths[1])
    if shear > _MAX_SHEAR:
        raise RejectedScan("gantry_tilt", f"the axes of a slice have a cosine of {shear:.4f}")
