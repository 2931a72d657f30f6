"""Write a volume as a DICOM series: for the phantom data set and for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import DSfloat

from medssl.atomic import atomic_write
from medssl.errors import GeometryError

SOP_CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
}
_LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_PERPENDICULAR_TOLERANCE = 1e-4


def write_series(
    folder: Path,
    volume_XYZ: npt.NDArray[Any],
    affine: npt.NDArray[np.float64],
    *,
    modality: str = "MR",
    rescale: tuple[float, float] = (1.0, 0.0),
    patient_id: str,
    patient_name: str = "",
    study_uid: str | None = None,
    series_uid: str | None = None,
    shuffle: np.random.Generator | None = None,
    extra: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write one single-frame file per slice along Z.

    X becomes the column index, Y the row index and Z the slice.

    Args:
        folder: created when absent; files are named ``0001.dcm`` onward.
        volume_XYZ: stored values, an integer array that fits 16 bits; a negative value or a signed
            dtype makes the pixels signed.
        affine: (4, 4), voxel index to RAS millimetres. X and Y must be perpendicular; Z may lean,
            which writes what a tilted gantry writes.
        modality: one of CT, MR, PT, CR, DX.
        rescale: slope and intercept; value = stored * slope + intercept.
        study_uid, series_uid: made up when absent.
        shuffle: numbers files and instances in random order instead of slice order.
        extra: DICOM keywords and values that are set last, on every file.

    Returns:
        The files, in slice order.

    Raises:
        GeometryError: the volume is not a 16-bit integer volume, or X and Y are not perpendicular.

    Source: DICOM PS3.3, section C.7.6.2.
    """
    stored = _stored_values(volume_XYZ)
    lps = _LPS_FROM_RAS @ np.asarray(affine, dtype=np.float64)
    spacing_mm = np.linalg.norm(lps[:3, :3], axis=0)
    directions = lps[:3, :3] / spacing_mm
    if abs(float(directions[:, 0] @ directions[:, 1])) > _PERPENDICULAR_TOLERANCE:
        raise GeometryError("X and Y are not perpendicular: a DICOM slice cannot be sheared.")
    study_uid = study_uid or generate_uid()
    series_uid = series_uid or generate_uid()
    num_slices = stored.shape[2]
    order = np.arange(num_slices) if shuffle is None else shuffle.permutation(num_slices)
    paths = []
    for index in range(num_slices):
        number = int(order[index]) + 1
        dataset = _slice_header(modality, series_uid, study_uid, index)
        dataset.PatientID, dataset.PatientName = patient_id, patient_name
        dataset.InstanceNumber = number
        dataset.ImagePositionPatient = _decimals(lps[:3, 3] + index * lps[:3, 2])
        dataset.ImageOrientationPatient = _decimals(directions[:, :2].T.ravel())
        dataset.PixelSpacing = _decimals(spacing_mm[[1, 0]])
        dataset.SliceThickness = _decimals(spacing_mm[2:])[0]
        _set_pixels(dataset, stored[:, :, index], modality, rescale)
        for keyword, value in (extra or {}).items():
            setattr(dataset, keyword, value)
        path = folder / f"{number:04d}.dcm"
        _save(dataset, path)
        paths.append(path)
    return paths


def _save(dataset: Dataset, path: Path) -> None:
    atomic_write(path, lambda part: dataset.save_as(part, enforce_file_format=True))


def _stored_values(volume_XYZ: npt.NDArray[Any]) -> npt.NDArray[Any]:
    volume = np.asarray(volume_XYZ)
    if volume.ndim != 3 or volume.dtype.kind not in "iu":
        raise GeometryError(
            f"a series is written from an integer volume of 3 axes, found {volume.ndim} axes of "
            f"{volume.dtype}. Round to stored values and give rescale=(slope, intercept)."
        )
    dtype = np.dtype(np.int16 if volume.dtype.kind == "i" else np.uint16)
    limits = np.iinfo(dtype)
    if volume.size and (volume.min() < limits.min or volume.max() > limits.max):
        raise GeometryError(
            f"stored values run from {volume.min()} to {volume.max()}, but {dtype} holds "
            f"{limits.min} to {limits.max}. Use a larger slope."
        )
    return volume.astype(dtype)


def _slice_header(modality: str, series_uid: str, study_uid: str, index: int) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = UID(SOP_CLASSES[modality])
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[series_uid, str(index)])
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if modality == "CT" else "M"]
    dataset.Modality = modality
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_uid, series_uid
    dataset.FrameOfReferenceUID = generate_uid(entropy_srcs=[study_uid, "frame of reference"])
    for keyword in _EMPTY_TYPE_2:
        setattr(dataset, keyword, "")
    dataset.SeriesNumber = 1
    return dataset


_EMPTY_TYPE_2 = (
    "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "PatientBirthDate",
    "PatientSex", "StudyID", "Manufacturer", "PositionReferenceIndicator", "PatientPosition",
)  # fmt: skip


def _set_pixels(
    dataset: Dataset, stored_XY: npt.NDArray[Any], modality: str, rescale: tuple[float, float]
) -> None:
    pixels = np.ascontiguousarray(stored_XY.T)
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    if modality in ("CT", "PT") or tuple(rescale) != (1.0, 0.0):
        dataset.RescaleSlope, dataset.RescaleIntercept = _decimals(np.asarray(rescale))
        dataset.RescaleType = "HU" if modality == "CT" else "US"
    little_endian = pixels.dtype.newbyteorder("<")
    dataset.PixelData = pixels.astype(little_endian).tobytes()


def _decimals(values: npt.NDArray[np.float64]) -> list[DSfloat]:
    """Return decimal strings of at most 16 characters, as DICOM wants them."""
    return [DSfloat(float(value), auto_format=True) for value in values]
