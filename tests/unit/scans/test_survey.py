"""What is told from the names in a folder that nobody has indexed yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from medssl.scans.survey import find_layout


def put(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()


@pytest.mark.parametrize(
    "name",
    ["labels", "labelsTr", "label", "Masks", "mask_files", "segmentations", "seg", "GroundTruth",
     "ground_truth", "gt", "annotations-2", "SegmentationMasks"],
)  # fmt: skip
def test_a_folder_of_masks_beside_the_images_is_found(name: str, tmp_path: Path) -> None:
    put(tmp_path / "images", "a.nii.gz", "b.nii.gz")
    put(tmp_path / name, "a.nii.gz")
    layout = find_layout(tmp_path)
    assert (layout.scans, layout.masks) == (tmp_path / "images", tmp_path / name)


@pytest.mark.parametrize("name", ["Segovia_Juan", "Labelle_Anne", "Maskow", "GTA", "SEGAL^ANN"])
def test_a_patient_is_not_taken_for_masks(name: str, tmp_path: Path) -> None:
    put(tmp_path / name, "a.nii.gz")
    put(tmp_path / "other", "b.nii.gz")
    assert find_layout(tmp_path).exclude == ()


def test_folders_of_dicom_are_not_left_out_for_their_name(tmp_path: Path) -> None:
    put(tmp_path / "Label", "IM1")
    assert find_layout(tmp_path).exclude == ()


def test_masks_that_fit_no_scan_are_not_indexed(tmp_path: Path) -> None:
    put(tmp_path / "masks", "mask_1.nii.gz")
    (tmp_path / "scan_1.nii.gz").touch()
    assert find_layout(tmp_path).exclude == ("masks/*",)
