"""Write linear DICOM series, and spoil them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from hostile_outcomes import Rejected, Right, linear
from samples import OBLIQUE, linear_volume, write_dicom_series

Outcome = tuple[Right | Rejected, ...]
SHAPE = (9, 8, 6)
NUM = SHAPE[2]


def series(
    folder: Path,
    shape: tuple[int, int, int] = SHAPE,
    affine: npt.NDArray[np.float64] = OBLIQUE,
    **options: Any,
) -> list[Path]:
    """Write a linear series, numbered in slice order unless a seed says otherwise."""
    options.setdefault("seed", None)
    return write_dicom_series(linear_volume(shape, affine), affine, folder, **options)


def edit(paths: Path | Sequence[Path], change: Callable[[Dataset], object]) -> None:
    """Change the data sets of files."""
    for path in [paths] if isinstance(paths, Path) else paths:
        dataset = dcmread(path, force=True)
        change(dataset)
        dataset.save_as(path)


def set_to(**values: Any) -> Callable[[Dataset], None]:
    """Return a change that sets values, and takes away those that are None."""

    def change(dataset: Dataset) -> None:
        for keyword, value in values.items():
            if value is None:
                if keyword in dataset:
                    delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)

    return change


def copy_of(path: Path, name: str, change: Callable[[Dataset], object]) -> Path:
    """Write a changed copy with an instance UID of its own beside a file."""
    new = path.with_name(name)
    dataset = dcmread(path)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    change(dataset)
    dataset.save_as(new)
    return new


def patch(paths: Path | Sequence[Path], old: bytes, new: bytes) -> None:
    """Replace bytes of the same length: values that no honest writer writes."""
    if len(old) != len(new):
        raise ValueError("a patch keeps the length")
    for path in [paths] if isinstance(paths, Path) else paths:
        content = path.read_bytes()
        if old not in content:
            raise ValueError("nothing to patch")
        path.write_bytes(content.replace(old, new))


def whole(shape: tuple[int, int, int] = SHAPE, **options: Any) -> Right:
    """Return the expectation of the whole linear series."""
    return Right(shape, linear(), **options)


def simple_itk_volume(
    files: Sequence[Path],
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Read an even, straight series by SimpleITK, its files put in order by their place."""

    def place(path: Path) -> float:
        dataset = dcmread(path, stop_before_pixels=True)
        cosines = np.array(dataset.ImageOrientationPatient, float)
        normal = np.cross(cosines[:3], cosines[3:])
        return float(np.array(dataset.ImagePositionPatient, float) @ normal)

    image = SimpleITK.ReadImage([str(path) for path in sorted(files, key=place)])
    affine = np.eye(4)
    directions = np.array(image.GetDirection()).reshape(3, 3)
    affine[:3, :3] = directions * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    voxels = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)
    return voxels, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
