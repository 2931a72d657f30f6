"""Large made-up archives for the benchmarks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pydicom

from medssl.scans.formats._dicom_writer import write_series
from samples import real_data

FILES_A_FOLDER = 200
_PLACEHOLDER = "1.2.826.0.1.3680043.8.498.1{:011d}.1{:06d}"  # of one length, with no leading 0


def copy_real_slices(folder: Path, copies: int) -> list[Path]:
    """Write real CT and MR slices several times, each copy of an instance and series of its own."""
    sources = sorted(real_data("dicom", "siim_chest_ct").rglob("*.dcm"))
    sources += sorted(real_data("dicom", "sag_mprage").rglob("*.dcm"))
    written = []
    for number, source in enumerate(sources):
        dataset = pydicom.dcmread(source)
        series, instance = str(dataset.SeriesInstanceUID), str(dataset.SOPInstanceUID)
        for copy in range(copies):
            path = folder / f"{copy:03d}" / f"{number:04d}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            dataset.SeriesInstanceUID = f"{series[:56]}.{copy}"
            dataset.SOPInstanceUID = f"{instance[:56]}.{copy}"
            dataset.PatientID = f"{dataset.PatientID}-{copy}"
            dataset.save_as(path)
            written.append(path)
    return written


def write_headers_only(folder: Path, num_files: int, template_folder: Path) -> None:
    """Write DICOM files of a kilobyte, whose pixels are missing, in series of 200."""
    (path,) = write_series(
        template_folder,
        np.zeros((4, 4, 1), np.int16),
        np.eye(4),
        patient_id="P" * 12,
        study_uid=_PLACEHOLDER.format(1, 1),
        series_uid=_PLACEHOLDER.format(2, 2),
    )
    dataset = pydicom.dcmread(path)
    dataset.SOPInstanceUID = _PLACEHOLDER.format(3, 3)
    del dataset.PixelData
    dataset.save_as(path)
    content = path.read_bytes()
    shutil.rmtree(template_folder)
    for number in range(num_files):
        series, slice_number = divmod(number, FILES_A_FOLDER)
        place = folder / f"{series:06d}"
        if slice_number == 0:
            place.mkdir(parents=True)
        changed = content.replace(
            _PLACEHOLDER.format(2, 2).encode(), _PLACEHOLDER.format(2, series).encode()
        ).replace(
            _PLACEHOLDER.format(3, 3).encode(), _PLACEHOLDER.format(series, slice_number).encode()
        )
        (place / f"{slice_number:04d}.dcm").write_bytes(changed)
