import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medssl.randomness import numpy_generator
from medssl.scans.building import IndexConfig, build_index
from medssl.scans.index import Index
from medssl.scans.labels import read_label_table
from medssl.scans.masks import match_masks, read_mask
from medssl.scans.phantom import CLASSES, LESION, LIVER, draw_patient, write_phantom
from medssl.scans.scan import read_scan

SHAPE = (40, 36, 14)
NUM_PATIENTS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, num_patients=NUM_PATIENTS, seed=3, shape=SHAPE)
    return folder


@pytest.fixture(scope="module")
def index(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(IndexConfig(folder=folder / "images"), tmp_path_factory.mktemp("index"))


def test_every_patient_is_one_accepted_ct_series(index: Index) -> None:
    accepted = index.accepted
    assert len(accepted) == accepted["patient_key"].nunique() == NUM_PATIENTS
    assert set(accepted["modality"]) == {"CT"}
    assert set(accepted["intensity"]) == {"HU"}
    assert (accepted["num_files"] == SHAPE[2]).all()


def test_series_read_back_as_they_were_drawn(index: Index, folder: Path) -> None:
    masks = match_masks(index, folder / "masks")
    assert len(masks) == NUM_PATIENTS
    for key, path in masks.items():
        number = int(path.name.removesuffix(".nii.gz").split("-")[1]) - 1
        generator = numpy_generator(3, "phantom", number)
        label = CLASSES[number % 2]
        patient = draw_patient(generator, label, oblique=number % 4 >= 2, shape=SHAPE)
        scan = read_scan(index, key)
        mask = read_mask(path, scan)
        corner = scan.affine @ [0, 0, 0, 1]
        place = np.rint(np.linalg.inv(patient.affine) @ corner)[:3].astype(int)
        assert set(place) <= {0, *(size - 1 for size in SHAPE)}
        flips = tuple(axis for axis in range(3) if place[axis])
        drawn = np.flip(patient.hounsfield_XYZ, flips)
        np.testing.assert_allclose(scan.voxels_CXYZ[0], drawn, atol=1.01)
        np.testing.assert_array_equal(mask, np.flip(patient.mask_XYZ, flips))


def test_stored_types_and_grids_vary(index: Index, folder: Path) -> None:
    import pydicom

    kinds = set()
    for path in sorted((folder / "images").glob("*/0001.dcm")):
        header = pydicom.dcmread(path, stop_before_pixels=True)
        straight = all(abs(x) in (0, 1) for x in map(float, header.ImageOrientationPatient))
        slope = float(header.RescaleSlope)
        kinds.add((int(header.PixelRepresentation), slope, straight))
    assert {signed for signed, _, _ in kinds} == {0, 1}
    assert {slope for _, slope, _ in kinds} == {0.5, 1.0, 2.0}
    assert {straight for _, _, straight in kinds} == {True, False}


def test_each_liver_holds_a_lesion_that_tells_its_class() -> None:
    for number in range(6):
        label = CLASSES[number % 2]
        patient = draw_patient(numpy_generator(0, "p", number), label, oblique=number > 2)
        liver = patient.hounsfield_XYZ[patient.mask_XYZ == LIVER]
        lesion = patient.hounsfield_XYZ[patient.mask_XYZ == LESION]
        assert len(liver) > 1000
        assert len(lesion) > 20
        assert (lesion.mean() > liver.mean() + 30) == (label == "solid")
        assert (lesion.mean() < liver.mean() - 30) == (label == "cyst")


def test_classes_are_balanced_and_found_by_patient(index: Index, folder: Path) -> None:
    labels = read_label_table(
        index, folder / "labels.csv", by="patient", id_column="patient", label_column="label"
    )
    assert sorted(labels.values()) == ["cyst"] * 4 + ["solid"] * 4
    by_series = read_label_table(
        index, folder / "labels.csv", by="series", id_column="series", label_column="label"
    )
    assert dict(by_series) == dict(labels)


def test_the_same_seed_gives_the_same_patients(folder: Path, tmp_path: Path) -> None:
    write_phantom(tmp_path, num_patients=2, seed=3, shape=SHAPE)
    for name in ("phantom-001", "phantom-002"):
        one, two = (nib.load(f / "masks" / f"{name}.nii.gz") for f in (folder, tmp_path))
        np.testing.assert_array_equal(one.get_fdata(), two.get_fdata())
        files = sorted((tmp_path / "images" / name).iterdir())
        assert all(
            file.read_bytes() == (folder / "images" / name / file.name).read_bytes()
            for file in files
        )


def test_patients_differ(folder: Path) -> None:
    volumes = [
        int((nib.load(path).get_fdata() == LIVER).sum())
        for path in sorted((folder / "masks").glob("*.nii.gz"))
    ]
    assert len(set(volumes)) == NUM_PATIENTS


def test_progress_counts_patients(tmp_path: Path) -> None:
    told = []
    write_phantom(
        tmp_path, num_patients=2, shape=(16, 16, 4), progress=lambda *args: told.append(args)
    )
    assert told == [(1, 2), (2, 2)]


def test_tables_name_every_mask(folder: Path) -> None:
    with (folder / "masks" / "masks.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == NUM_PATIENTS
    assert all((folder / "masks" / row["mask"]).is_file() for row in rows)
