"""Real scans, and scans written on the spot, for all tests.

A *linear* volume has at every voxel a linear function of its place in the patient. Whatever was
read, reordered or turned, the value at a voxel must still be the function of its place: one look at
``voxels == linear(affine @ index)`` proves the whole geometry.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from medssl.scans.formats._dicom_writer import write_series
from medssl.scans.index import Index

DATA = Path(
    os.environ.get(
        "MEDSSL_DATA_MIRROR", Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    )
).resolve()

LINEAR_WEIGHTS = np.array([3.0, 7.0, 11.0])  # per mm along R, A, S

NAME = "DOE^JANE^PLANTED"
PATIENT_ID = "MRN-7341-PLANTED"
UID_ROOT = "1.2.826.0.1.3680043.8.498.7341"
PLANTED = ("DOE", "JANE", "PLANTED", "7341", UID_ROOT)


def real_data(*parts: str) -> Path:
    """Return a part of the shared real data, or skip the test where it is absent."""
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(
            f"the real scans ({'/'.join(parts)}) are not on this machine; set MEDSSL_DATA_MIRROR"
        )
    return path


def hippocampus(number: int = 1) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Return the voxels and affine of one real hippocampus volume."""
    path = real_data("hippocampus", "images", f"hippocampus_{number:03d}.nii.gz")
    image: Any = nib.load(path)
    return np.asarray(image.dataobj), np.array(image.affine)


def rotation_affine(
    angles_deg: tuple[float, float, float] = (0.0, 0.0, 0.0),
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    origin_mm: tuple[float, float, float] = (-20.0, -25.0, -15.0),
) -> npt.NDArray[np.float64]:
    """Return a voxel to RAS affine, turned about X, then Y, then Z."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.radians(angles_deg)):
        first, second = (index for index in range(3) if index != axis)
        step = np.eye(3)
        step[first, first] = step[second, second] = np.cos(angle)
        step[first, second], step[second, first] = -np.sin(angle), np.sin(angle)
        turn = step @ turn
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing_mm)
    affine[:3, 3] = origin_mm
    return affine


OBLIQUE = rotation_affine((12.0, -8.0, 25.0), (0.9, 1.1, 2.5), (-41.5, 12.25, -60.0))


def world_of(affine: npt.NDArray[np.float64], shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Return the RAS place in mm of every voxel, (*shape, 3)."""
    full = (*shape, 1, 1)[: max(3, len(shape))]
    index = np.stack(np.meshgrid(*map(np.arange, full), indexing="ij"), axis=-1)
    place = index @ affine[:3, :3].T + affine[:3, 3]
    return np.asarray(place.reshape(*shape, 3))


def linear_values(
    affine: npt.NDArray[np.float64], shape: tuple[int, ...]
) -> npt.NDArray[np.float64]:
    """Return the linear function of the place of every voxel."""
    return np.asarray(world_of(affine, shape) @ LINEAR_WEIGHTS)


def linear_volume(
    shape: tuple[int, ...] = (8, 7, 6), affine: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[np.int16]:
    """Return the linear function, rounded to whole numbers of either sign."""
    return np.rint(linear_values(np.eye(4) if affine is None else affine, shape)).astype(np.int16)


def write_nifti(
    path: Path,
    voxels: npt.NDArray[Any] | None = None,
    affine: npt.NDArray[np.float64] | None = None,
    *,
    seed: int = 0,
) -> Path:
    """Write a NIfTI file; random voxels of shape (8, 7, 6) unless told otherwise."""
    if voxels is None:
        voxels = np.random.default_rng(seed).normal(100, 20, (8, 7, 6)).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(voxels, rotation_affine() if affine is None else affine).to_filename(path)
    return path


def write_dicom_series(
    volume_XYZ: npt.NDArray[Any],
    affine: npt.NDArray[np.float64],
    folder: Path,
    *,
    signed: bool = True,
    rescale: tuple[float, float] = (1.0, 0.0),
    modality: str = "MR",
    patient_id: str = PATIENT_ID,
    patient_name: str = NAME,
    number: int = 1,
    seed: int | None = 0,
    extra: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write values as a DICOM series whose identifiers are all planted.

    Args:
        volume_XYZ: values; stored = (value - intercept) / slope, rounded.
        affine: voxel to RAS mm.
        folder: where to.
        signed: of the stored pixels.
        number: distinguishes the series and study of a patient.
        seed: of the order in which files and instances are numbered; None keeps slice order.
    """
    slope, intercept = rescale
    stored = np.rint((volume_XYZ.astype(np.float64) - intercept) / slope)
    return write_series(
        folder,
        stored.astype(np.int16 if signed else np.uint16),
        affine,
        modality=modality,
        rescale=rescale,
        patient_id=patient_id,
        patient_name=patient_name,
        study_uid=f"{UID_ROOT}.1.{number}",
        series_uid=f"{UID_ROOT}.2.{number}",
        shuffle=None if seed is None else np.random.default_rng(seed),
        extra=extra,
    )


def reasons(index: Index) -> list[str]:
    """Return the reason of every rejected row of an index, sorted."""
    table = index.table
    return sorted(table.loc[table["status"] == "rejected", "reason"])
