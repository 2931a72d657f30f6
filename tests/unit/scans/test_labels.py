from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medssl.errors import ConfigError, DataError, LabelError
from medssl.pipelines.index import index_scans
from medssl.scans.geometry import flip_axis
from medssl.scans.label_report import KEYS_KEPT, LabelReport
from medssl.scans.labels import read_label_columns, read_label_table
from medssl.scans.masks import match_masks, read_mask
from medssl.scans.scan import Scan, read_scan
from samples import (
    OBLIQUE,
    UID_ROOT,
    linear_volume,
    rotation_affine,
    write_dicom_series,
    write_nifti,
)


@pytest.fixture
def index(tmp_path):
    root = tmp_path / "scans"
    for name in ("a", "b", "c"):
        write_nifti(root / "nifti" / f"{name}.nii.gz", seed=ord(name))
    for number in (1, 2):
        affine = rotation_affine(origin_mm=(number, 0, 0))
        write_dicom_series(
            linear_volume(affine=affine), affine, root / f"mr{number}", number=number
        )
    return index_scans(root, tmp_path / "index")


def read(index, tmp_path, text, by="scan"):
    (tmp_path / "labels.csv").write_text(text)
    return read_label_table(
        index, tmp_path / "labels.csv", by=by, id_column="id", label_column="label"
    )


def key_of(index, name):
    (key,) = [key for key in index.accepted["scan_key"] if name in str(index.files(key)[0])]
    return key


def test_scans_are_found_by_stem_name_path_folder_or_key(index, tmp_path):
    key = key_of(index, "c.nii")
    text = f"id,label\na,x\nb.nii.gz,y\n{key},z\nmr1,v\n"
    labels = read(index, tmp_path, text)
    expected = {"a.nii": "x", "b.nii": "y", "c.nii": "z", "mr1": "v"}
    assert labels == {key_of(index, name): label for name, label in expected.items()}
    assert read(index, tmp_path, "id,label\nnifti/a.nii.gz,x\n") == {key_of(index, "a.nii"): "x"}


def test_numbers_become_numbers(index, tmp_path):
    assert sorted(read(index, tmp_path, "id,label\na,1\nb,2.5\n").values()) == [1.0, 2.5]


def test_unmatched_rows_and_unlabelled_scans_are_counted(index, tmp_path):
    labels = read(index, tmp_path, "id,label\na,x\nnobody,y\nb,\n")
    assert (labels.num_unmatched_rows, labels.num_unlabelled_scans) == (1, 4)


def test_label_of_a_patient_is_that_of_all_scans(index, tmp_path):
    from samples import PATIENT_ID

    labels = read(index, tmp_path, f"id,label\n{PATIENT_ID},x\n", by="patient")
    assert labels == {key_of(index, "mr1"): "x", key_of(index, "mr2"): "x"}


def test_series_are_found_by_uid(index, tmp_path):
    labels = read(index, tmp_path, f"id,label\n{UID_ROOT}.2.2,x\n", by="series")
    assert labels == {key_of(index, "mr2"): "x"}


def test_table_that_fits_no_scan_is_refused(index, tmp_path):
    with pytest.raises(LabelError, match="none of the 2 rows .* one of the 5 accepted scans"):
        read(index, tmp_path, "id,label\nnobody,x\nnone,y\n")


def test_two_labels_for_a_scan_are_refused(index, tmp_path):
    with pytest.raises(LabelError, match="gets two different labels from column 'label'"):
        read(index, tmp_path, "id,label\na,x\na.nii.gz,y\n")


def test_name_of_two_scans_is_refused(tmp_path):
    for number, folder in enumerate("xy"):
        write_nifti(tmp_path / "scans" / folder / "a.nii", seed=number)
    index = index_scans(tmp_path / "scans", tmp_path / "index")
    with pytest.raises(LabelError, match="one name fits 2 scans"):
        read(index, tmp_path, "id,label\na,x\n")


def test_missing_table_and_column_are_named(index, tmp_path):
    with pytest.raises(ConfigError, match=r"there is no label table 'labels\.csv'"):
        read_label_table(index, tmp_path / "labels.csv", by="scan", id_column="a", label_column="b")
    with pytest.raises(DataError, match="has no column 'label'. It has: id, class"):
        read(index, tmp_path, "id,class\na,x\n")


def test_every_mismatch_is_counted_and_named_by_key(index, tmp_path):
    report = read(index, tmp_path, "id,label\na,x\na.nii,x\nnobody,y\nb,\n,z\nmr1,v\n").report
    assert report.to_dict()["given"] == 6
    assert report.to_dict()["labelled"] == 2
    assert report.counts == {
        "double_rows": 1,
        "rows_without_scan": 2,
        "rows_without_value": 1,
        "scans_without_label": 3,
    }
    assert report.keys["double_rows"] == (key_of(index, "a.nii"),)
    unlabelled = [key_of(index, name) for name in ("b.nii", "c.nii", "mr2")]
    assert report.keys["scans_without_label"] == tuple(sorted(unlabelled))
    assert all(name not in str(report.to_dict()) for name in (".nii", "nobody", "mr1"))


def test_patients_whose_scans_have_different_labels_are_named(index, tmp_path):
    report = read(index, tmp_path, "id,label\nmr1,x\nmr2,y\na,x\n").report
    row = index.row(key_of(index, "mr1"))
    assert report.keys["patients_disagree"] == (row["patient_key"],)
    assert (
        "patients_disagree" not in read(index, tmp_path, "id,label\nmr1,x\nmr2,x\n").report.counts
    )


def test_a_report_keeps_some_keys_and_counts_all():
    report = LabelReport()
    report.note_keys("double_rows", (f"{number:03d}" for number in range(100)))
    assert report.counts == {"double_rows": 100}
    assert len(report.keys["double_rows"]) == KEYS_KEPT
    with pytest.raises(ValueError, match="no mismatch is called 'typo'"):
        report.note("typo")


def test_columns_are_read_together_with_gaps(index, tmp_path):
    (tmp_path / "labels.csv").write_text("id,p,q\na,1,\nb, x ,0\nc,,\n")
    rows = read_label_columns(
        index, tmp_path / "labels.csv", by="scan", id_column="id", label_columns=("p", "q")
    )
    assert rows == {key_of(index, "a.nii"): ("1", None), key_of(index, "b.nii"): ("x", "0")}
    assert rows.report.counts["rows_without_value"] == 1


def test_a_difference_is_named_by_its_column(index, tmp_path):
    (tmp_path / "labels.csv").write_text("id,p,q\na,1,0\na,1.0,1\n")
    with pytest.raises(LabelError, match="two different labels from column 'q'"):
        read_label_columns(
            index, tmp_path / "labels.csv", by="scan", id_column="id", label_columns=("p", "q")
        )


def test_labels_are_read_from_parquet_too(index, tmp_path):
    pd.DataFrame({"id": ["a", "b"], "label": [1.5, np.nan]}).to_parquet(tmp_path / "l.parquet")
    labels = read_label_table(
        index, tmp_path / "l.parquet", by="scan", id_column="id", label_column="label"
    )
    assert labels == {key_of(index, "a.nii"): 1.5}


def test_masks_report_what_did_not_fit(index, tmp_path):
    for name in ("a", "c", "z"):
        write_nifti(tmp_path / "masks" / f"{name}.nii.gz")
    report = match_masks(index, tmp_path / "masks").report
    assert (report.num_given, report.num_labelled) == (3, 2)
    assert report.counts == {"files_without_scan": 1, "scans_without_label": 3}


def test_masks_are_found_by_the_name_of_the_scan(index, tmp_path):
    for name in ("a", "c", "z"):
        write_nifti(tmp_path / "masks" / f"{name}.nii.gz")
    found = match_masks(index, tmp_path / "masks")
    assert sorted(found) == sorted([key_of(index, "a.nii"), key_of(index, "c.nii")])


def test_masks_are_found_by_their_list(index, tmp_path):
    write_nifti(tmp_path / "masks" / "one.nii")
    write_nifti(tmp_path / "masks" / "two.nii")
    (tmp_path / "masks" / "masks.csv").write_text(
        f"scan,mask\nmr1,one.nii\n{UID_ROOT}.2.2,two.nii\n"
    )
    found = match_masks(index, tmp_path / "masks")
    assert {key: path.name for key, path in found.items()} == {
        key_of(index, "mr1"): "one.nii",
        key_of(index, "mr2"): "two.nii",
    }


def test_masks_that_fit_no_scan_are_refused(index, tmp_path):
    with pytest.raises(LabelError, match="there is no folder of masks"):
        match_masks(index, tmp_path / "masks")
    write_nifti(tmp_path / "masks" / "other.nii")
    with pytest.raises(LabelError, match="none of the 1 masks fits one of the 5 accepted scans"):
        match_masks(index, tmp_path / "masks")


def test_listed_mask_that_is_not_there_is_reported(index, tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "masks.csv").write_text("scan,mask\nmr1,one.nii\n")
    with pytest.raises(LabelError, match="names 1 of 1 mask files that are not there"):
        match_masks(index, tmp_path / "masks")


def test_two_masks_of_a_scan_are_refused(index, tmp_path):
    for folder in "xy":
        write_nifti(tmp_path / "masks" / folder / "a.nii")
    with pytest.raises(LabelError, match="has two masks"):
        match_masks(index, tmp_path / "masks")


def scan_of(shape=(6, 5, 4), affine=OBLIQUE):
    return Scan("k", np.zeros((1, *shape), np.float32), affine, "3D", "arbitrary")


def mask_values(shape=(6, 5, 4)):
    return np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)


def test_mask_on_the_grid_is_read_as_it_is(tmp_path):
    path = write_nifti(tmp_path / "m.nii", mask_values(), OBLIQUE)
    found = read_mask(path, scan_of())
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, mask_values())


@given(axes=st.permutations(range(3)), flips=st.tuples(*[st.booleans()] * 3))
def test_mask_with_turned_axes_is_turned_back(tmp_path_factory, axes, flips):
    affine = OBLIQUE[:, [*axes, 3]]
    values = mask_values().transpose(axes)
    for axis, flip in enumerate(flips):
        if flip:
            affine = flip_axis(affine, axis, values.shape[axis])
            values = np.flip(values, axis)
    path = write_nifti(tmp_path_factory.mktemp("m") / "m.nii", values, affine)
    np.testing.assert_array_equal(read_mask(path, scan_of()), mask_values())


def test_mask_of_a_single_slice_ignores_its_thickness(tmp_path):
    thick = OBLIQUE.copy()
    thick[:3, 2] *= 3
    path = write_nifti(tmp_path / "m.nii", mask_values((6, 5, 1)), thick)
    scan = Scan("k", np.zeros((1, 6, 5), np.float32), OBLIQUE, "2D", "arbitrary")
    np.testing.assert_array_equal(read_mask(path, scan), mask_values((6, 5, 1))[..., 0])


def test_mask_of_another_shape_names_both(tmp_path):
    path = write_nifti(tmp_path / "m.nii", mask_values((6, 5, 3)), OBLIQUE)
    with pytest.raises(LabelError, match=r"scan k has shape 6 x 5 x 3, the scan has 6 x 5 x 4"):
        read_mask(path, scan_of())


def test_mask_elsewhere_names_both_origins(tmp_path):
    moved = OBLIQUE.copy()
    moved[0, 3] += 5
    path = write_nifti(tmp_path / "m.nii", mask_values(), moved)
    with pytest.raises(LabelError, match=r"its origin is \(-36.5, .* the scan's \(-41.5,"):
        read_mask(path, scan_of())


@pytest.mark.parametrize("value", [0.5, -1, 300])
def test_mask_of_other_than_classes_is_refused(tmp_path, value):
    values = mask_values().astype(np.float32)
    values[0, 0, 0] = value
    path = write_nifti(tmp_path / "m.nii", values, OBLIQUE)
    with pytest.raises(LabelError, match="wanted whole numbers from 0 to 255"):
        read_mask(path, scan_of())


def test_mask_that_cannot_be_read_is_reported(tmp_path):
    (tmp_path / "m.nii").write_bytes(b"DOE^JANE")
    with pytest.raises(LabelError, match=r"mask of scan k cannot be read \(unreadable\)"):
        read_mask(tmp_path / "m.nii", scan_of())
    with pytest.raises(LabelError, match="mask of scan k cannot be opened"):
        read_mask(tmp_path / "other.nii", scan_of())


def test_mask_written_for_a_dicom_series_fits_it(index, tmp_path):
    key = key_of(index, "mr1")
    scan = read_scan(index, key)
    path = write_nifti(
        tmp_path / "m.nii", mask_values((8, 7, 6)), rotation_affine(origin_mm=(1, 0, 0))
    )
    assert read_mask(path, scan).shape == scan.voxels_CXYZ.shape[1:]
