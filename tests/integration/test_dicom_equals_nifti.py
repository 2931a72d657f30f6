"""The same scans from DICOM and from NIfTI come out of the preparation the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl.pipelines.index import index_scans
from medssl.pipelines.prepare import prepare
from medssl.scans.index import Index
from medssl.scans.store import Store
from medssl.transforms.preprocessing import PreprocessingConfig
from samples import hippocampus, write_dicom_series, write_nifti

WHOLE = (1, 33)  # whole numbers, written as they are
FRACTIONAL = (3, 44)  # float32; DICOM holds whole numbers and a slope
FOLDERS = [f"{number:03d}" for number in (*WHOLE, *FRACTIONAL)]


@pytest.fixture(scope="module")
def indices(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Index]:
    """Index hippocampus volumes as NIfTI, and the same written as MR series."""
    place = tmp_path_factory.mktemp("twice")
    for number, folder in zip((*WHOLE, *FRACTIONAL), FOLDERS, strict=True):
        voxels, affine = hippocampus(number)
        slope = 1.0 if number in WHOLE else float(f"{voxels.max() / 30_000:.3g}")
        values = np.rint(voxels.astype(np.float64) / slope) * slope
        assert slope != 1 or np.array_equal(values, voxels)
        write_nifti(place / "nifti" / folder / "scan.nii.gz", values.astype(np.float32), affine)
        write_dicom_series(
            values,
            affine,
            place / "dicom" / folder,
            patient_id=f"PLANTED-{number}",
            number=number,
            rescale=(slope, 0.0),
            signed=number != 33,
            seed=number,  # files and instances are numbered in another order than the slices
        )
    return (
        index_scans(place / "nifti", place / "index_nifti"),
        index_scans(place / "dicom", place / "index_dicom"),
    )


def by_folder(index: Index, store: Store) -> dict[str, str]:
    """Return the prepared scans' keys by the folder that each volume lies in."""
    return {index.files(key)[0].parent.name: key for key in store.scan_keys}


@pytest.mark.parametrize(
    "config",
    [
        PreprocessingConfig(crop_foreground=False),
        PreprocessingConfig(spacing_mm=(1.0, 1.0, 1.0)),
        PreprocessingConfig(spacing_mm=(1.5, 0.8, 2.0)),
    ],
    ids=["own spacing", "1 mm, cropped", "resampled, cropped"],
)
def test_prepared_voxels_affine_and_spacing_are_equal(
    indices: tuple[Index, Index], tmp_path: Path, config: PreprocessingConfig
):
    from_nifti, from_dicom = (
        (index, prepare(index, config, tmp_path / str(side))) for side, index in enumerate(indices)
    )
    ours, theirs = by_folder(*from_nifti), by_folder(*from_dicom)
    assert set(ours) == set(theirs) == set(FOLDERS)
    for folder in ours:
        a, b = from_nifti[1].entry(ours[folder]), from_dicom[1].entry(theirs[folder])
        assert a.shape == b.shape
        assert a.spacing_mm == pytest.approx(b.spacing_mm, abs=1e-5)
        np.testing.assert_allclose(a.affine, b.affine, atol=1e-3)
        assert a.foreground_threshold == pytest.approx(b.foreground_threshold, abs=1e-6)
        image, other = from_nifti[1].read(ours[folder]), from_dicom[1].read(theirs[folder])
        # One step of float16 below 1 is 2**-11; a geometry that differs moves edges by far more.
        np.testing.assert_allclose(image.astype(float), other.astype(float), atol=2**-11)


def test_whole_numbers_on_their_own_grid_are_equal_bit_for_bit(
    indices: tuple[Index, Index], tmp_path: Path
):
    config = PreprocessingConfig(crop_foreground=False)
    prepared = [
        (index, prepare(index, config, tmp_path / str(side))) for side, index in enumerate(indices)
    ]
    for number in WHOLE:
        image, other = (
            store.read(by_folder(index, store)[f"{number:03d}"]) for index, store in prepared
        )
        assert image.shape[1:] == hippocampus(number)[0].shape
        assert np.array_equal(image, other)
