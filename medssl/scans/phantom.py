"""A generator of synthetic patients: real DICOM series, masks and class labels.

Each patient is an ellipsoid body with lungs, spine, kidneys and a liver that holds one lesion,
drawn in the patient's own millimetres and then scanned: on a tilted or straight grid, with signed
or unsigned stored values, and with several rescale slopes. It exercises the whole road from files
to report; a result on it says nothing about medicine.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from medssl.atomic import atomic_write
from medssl.randomness import derive_seed, numpy_generator
from medssl.scans.formats._dicom_writer import write_series

Array = npt.NDArray[np.float64]

CLASSES = ("cyst", "solid")
LIVER, LESION = 1, 2

SHAPE = (64, 56, 24)
"""Voxels of a series: columns, rows, slices."""

_AIR, _FAT, _MUSCLE, _LIVER_HU, _KIDNEY, _LUNG, _BONE = -1000, -90, 50, 105, 150, -820, 450
_LESION_HU = {"cyst": 8, "solid": 165}
_TEXTURE_HU, _NOISE_HU = 14.0, 10.0

_STORED = (
    # dtype, slope, intercept: HU = stored * slope + intercept
    (np.int16, 1.0, 0.0),
    (np.uint16, 1.0, -1024.0),
    (np.int16, 2.0, -24.0),
    (np.uint16, 0.5, -1024.0),
)


@dataclass(frozen=True)
class Patient:
    """One synthetic patient, scanned.

    Attributes:
        hounsfield_XYZ: float64 HU, (X, Y, Z) in the order columns, rows, slices.
        mask_XYZ: uint8; 0 background, 1 liver, 2 lesion.
        affine: (4, 4), voxel index to RAS mm.
        label: ``cyst`` or ``solid``.
    """

    hounsfield_XYZ: Array
    mask_XYZ: npt.NDArray[np.uint8]
    affine: Array
    label: str


def draw_patient(
    generator: np.random.Generator, label: str, *, oblique: bool, shape: tuple[int, ...] = SHAPE
) -> Patient:
    """Draw and scan one patient.

    Args:
        generator: decides the anatomy, the texture, the noise and the scanner's grid.
        label: one of `CLASSES`.
        oblique: tilt the scanner's grid against the patient.
        shape: voxels along columns, rows and slices.
    """
    affine = _grid(generator, shape, oblique=oblique)
    indices = np.indices(shape, dtype=np.float64).reshape(3, -1)
    points_mm = (affine[:3, :3] @ indices + affine[:3, 3:]).reshape(3, *shape)
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)

    size = generator.uniform(0.88, 1.0, 3) * (150, 112, 130)
    image = np.full(shape, float(_AIR))
    body = _ellipsoid(points_mm, (0, 0, 0), size, power=2.6)
    image[body] = _FAT
    image[_ellipsoid(points_mm, (0, 0, 0), size - 14, power=2.6)] = _MUSCLE
    for side in (-1, 1):
        lung_mm = generator.uniform(0.85, 1.1, 3) * (48, 62, 60)
        image[_ellipsoid(points_mm, (side * 70, 5, 88), lung_mm)] = _LUNG
        kidney_mm = generator.uniform(0.85, 1.1, 3) * (22, 26, 46)
        image[_ellipsoid(points_mm, (side * 58, -52, -48), kidney_mm)] = _KIDNEY
    spine_mm = np.array([20, 20, np.inf]) * generator.uniform(0.9, 1.1)
    image[_ellipsoid(points_mm, (0, -72, 0), spine_mm)] = _BONE

    liver_centre = np.array([52, 18, -5]) + generator.normal(0, 6, 3)
    liver_mm = generator.uniform(0.8, 1.1, 3) * (62, 54, 52)
    liver = _ellipsoid(points_mm, liver_centre, liver_mm) & body & (image > _FAT)
    image[liver] = _LIVER_HU + generator.normal(0, 6)
    lesion_centre = liver_centre + generator.uniform(-0.4, 0.4, 3) * liver_mm
    lesion = liver & _ellipsoid(points_mm, lesion_centre, generator.uniform(14, 24, 3))
    image[lesion] = _LESION_HU[label]

    texture = gaussian_filter(generator.normal(size=shape), 4.0 / spacing_mm, mode="wrap")
    image[body] += _TEXTURE_HU * (texture / texture.std())[body]
    image += generator.normal(0, _NOISE_HU, shape)
    mask = np.zeros(shape, np.uint8)
    mask[liver] = LIVER
    mask[lesion] = LESION
    return Patient(np.clip(image, -1024, 3071), mask, affine, label)


def write_phantom(
    folder: Path,
    *,
    num_patients: int = 24,
    seed: int = 0,
    shape: tuple[int, ...] = SHAPE,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write synthetic patients: ``images/``, ``masks/`` with ``masks.csv``, and ``labels.csv``.

    Args:
        folder: where to.
        num_patients: classes, grids and stored types take turns among them.
        seed: the same seed gives the same voxels, identifiers and labels.
        shape: voxels along columns, rows and slices of each series.
        progress: called with the patients done and their number.
    """
    masks, labels = [("scan", "mask")], [("patient", "series", "label")]
    for number in range(num_patients):
        generator = numpy_generator(seed, "phantom", number)
        label = CLASSES[number % len(CLASSES)]
        patient = draw_patient(generator, label, oblique=number % 4 >= 2, shape=shape)
        dtype, slope, intercept = _STORED[(number // 2) % len(_STORED)]
        stored = np.rint((patient.hounsfield_XYZ - intercept) / slope).astype(dtype)
        name = f"phantom-{number + 1:03d}"
        # 2.25 is the root for identifiers that are plain numbers (DICOM PS3.5, B.2).
        series_uid = f"2.25.{derive_seed(seed, 'phantom series', number)}"
        write_series(
            folder / "images" / name,
            stored,
            patient.affine,
            modality="CT",
            rescale=(slope, intercept),
            patient_id=name,
            patient_name=f"Phantom^{number + 1:03d}",
            study_uid=f"2.25.{derive_seed(seed, 'phantom study', number)}",
            series_uid=series_uid,
            shuffle=generator,
        )
        _write_mask(folder / "masks" / f"{name}.nii.gz", patient)
        masks.append((series_uid, f"{name}.nii.gz"))
        labels.append((name, series_uid, label))
        if progress:
            progress(number + 1, num_patients)
    _write_table(folder / "masks" / "masks.csv", masks)
    _write_table(folder / "labels.csv", labels)


def _grid(generator: np.random.Generator, shape: tuple[int, ...], *, oblique: bool) -> Array:
    """Return the scanner's affine; the grid's middle is near the patient's."""
    field_mm = np.array([330.0, 260.0, 200.0]) * generator.uniform(0.97, 1.06)
    in_plane = field_mm[0] / shape[0]
    spacing_mm = np.round([in_plane, in_plane, field_mm[2] / shape[2]], 3)
    turn = np.eye(3)
    if oblique:
        for axis, degrees in enumerate(generator.uniform(-14, 14, 3)):
            turn = _rotation(axis, np.deg2rad(degrees)) @ turn
    affine = np.eye(4)
    # Columns run to the patient's left, rows to the back, slices to the head.
    affine[:3, :3] = turn @ np.diag([-1.0, -1.0, 1.0]) @ np.diag(spacing_mm)
    middle = (np.asarray(shape) - 1) / 2
    affine[:3, 3] = generator.normal(0, 3, 3) - affine[:3, :3] @ middle
    return affine


def _rotation(axis: int, angle: float) -> Array:
    first, second = (i for i in range(3) if i != axis)
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def _ellipsoid(
    points_mm: Array, centre_mm: npt.ArrayLike, semi_axes_mm: npt.ArrayLike, power: float = 2.0
) -> npt.NDArray[np.bool_]:
    """Return where points lie inside; a power above 2 makes it boxier, an infinite axis a tube."""
    centre = np.asarray(centre_mm, dtype=np.float64).reshape(3, 1, 1, 1)
    semi_axes = np.asarray(semi_axes_mm, dtype=np.float64).reshape(3, 1, 1, 1)
    inside: npt.NDArray[np.bool_] = (np.abs((points_mm - centre) / semi_axes) ** power).sum(0) <= 1
    return inside


def _write_mask(path: Path, patient: Patient) -> None:
    image = nib.nifti1.Nifti1Image(patient.mask_XYZ, patient.affine)
    image.header.set_xyzt_units("mm")

    def save(part: Path) -> None:
        named = part.with_name(f"{part.name}.nii.gz")  # nibabel goes by the ending
        image.to_filename(named)
        named.replace(part)

    atomic_write(path, save)


def _write_table(path: Path, rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    atomic_write(path, text.getvalue())
