from __future__ import annotations

import pytest

from samples import linear_volume, rotation_affine, write_dicom_series, write_nifti


@pytest.fixture
def folder(tmp_path):
    """Four NIfTI volumes, one DICOM series, and a file that is no scan."""
    root = tmp_path / "scans"
    for number in range(4):
        write_nifti(root / f"subject{number // 2}_{number}.nii.gz", seed=number)
    write_dicom_series(linear_volume(), rotation_affine(), root / "mr")
    (root / "notes.txt").write_text("not a scan")
    return root
