"""The shared real scans, where they are: every file accounted for, geometry as it should be."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from medssl.pipelines.index import index_scans
from medssl.scans.labels import read_label_table
from medssl.scans.masks import match_masks, read_mask
from medssl.scans.patients import PatientsConfig
from medssl.scans.scan import read_scan
from samples import OBLIQUE, hippocampus, real_data, write_dicom_series, write_nifti


def counts(index):
    table = index.table
    rejected = table[table["status"] == "rejected"].groupby("reason")["num_files"].sum()
    return len(index.accepted), {str(reason): int(n) for reason, n in rejected.items()}


def test_sagittal_series_is_one_scan_of_all_its_files(tmp_path):
    index = index_scans(real_data("dicom", "sag_mprage"), tmp_path / "index")
    assert counts(index) == (1, {})
    row = index.accepted.iloc[0]
    assert (row["num_files"], row["orientation"], row["modality"]) == (192, "PIR", "MR")
    scan = read_scan(index, row["scan_key"])
    assert scan.voxels_CXYZ.shape == (1, 256, 256, 192)
    assert scan.spacing_mm == pytest.approx((0.859375, 0.859375, 0.9), abs=1e-6)
    # The head is in the scanner: its brightest half lies within 15 cm of the origin.
    bright = np.argwhere(scan.voxels_CXYZ[0] > 100).mean(0)
    assert np.abs(scan.affine[:3, :3] @ bright + scan.affine[:3, 3]).max() < 150


def test_chest_slices_are_2d_scans_of_54_patients(tmp_path):
    folder = real_data("dicom", "siim_chest_ct")
    index = index_scans(folder, tmp_path / "index")
    # Six of the hundred slices are copies of another, under a second file name.
    assert counts(index) == (94, {"duplicate_file": 6, "not_a_scan": 1})
    assert len(index.patients()) == 54
    assert set(index.accepted["dims"]) == {"2D"}
    assert set(index.accepted["intensity"]) == {"HU"}
    scan = read_scan(index, index.accepted["scan_key"][0])
    assert scan.voxels_CXYZ.min() <= -1000  # air
    labels = read_label_table(
        index, folder / "overview.csv", by="scan", id_column="dicom_name", label_column="Contrast"
    )
    assert (len(labels), labels.num_unmatched_rows) == (94, 6)
    assert set(labels.values()) == {"True", "False"}


def test_hippocampus_folder_is_195_scans_of_130_patients(tmp_path):
    folder = real_data("hippocampus")
    index = index_scans(
        folder, tmp_path / "index", patients=PatientsConfig(table=folder / "patients.csv")
    )
    assert counts(index) == (195, {"label_map": 195, "not_a_scan": 1})
    assert len(index.patients()) == 130
    masks = match_masks(index, folder / "labels")
    assert len(masks) == 195
    for key in list(masks)[::20]:
        scan = read_scan(index, key)
        assert set(np.unique(read_mask(masks[key], scan))) == {0, 1, 2}


@pytest.mark.parametrize("affine", [None, OBLIQUE], ids=["straight", "oblique"])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("number", [1, 3])
def test_volume_as_mr_series_equals_its_nifti(tmp_path, number, signed, affine):
    voxels, own = hippocampus(number)
    affine = own if affine is None else affine
    # Steps of a power of two: what fits 15 bits then reads back without a rounding error.
    slope = 2.0 ** np.ceil(np.log2(max(float(voxels.max()), 1.0) / 2**15))
    intercept = -64.0 * slope
    voxels = np.rint(voxels.astype(np.float64) / slope) * slope
    write_nifti(tmp_path / "scans" / "volume.nii.gz", voxels.astype(np.float32), affine)
    write_dicom_series(
        voxels, affine, tmp_path / "scans" / "series", signed=signed, rescale=(slope, intercept)
    )
    index = index_scans(tmp_path / "scans", tmp_path / "index")
    rows = index.accepted.set_index("format")
    nifti = read_scan(index, rows.loc["nifti", "scan_key"])
    dicom = read_scan(index, rows.loc["dicom", "scan_key"])
    np.testing.assert_array_equal(dicom.voxels_CXYZ, nifti.voxels_CXYZ)
    np.testing.assert_allclose(dicom.affine, nifti.affine, atol=1e-5)
    np.testing.assert_allclose(dicom.spacing_mm, nifti.spacing_mm, atol=1e-5)
    assert dicom.orientation == nifti.orientation == "".join(nib.aff2axcodes(affine))
