from __future__ import annotations

import contextlib
import json
import os
import pickle
import stat

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medssl.errors import ConfigError, DataError, MachineError, RejectedScan
from medssl.pipelines.index import describe, index_scans
from medssl.scans.building import IndexConfig, build_index, plan_index
from medssl.scans.files import FileToParse, parse_file
from medssl.scans.formats import FORMATS
from medssl.scans.formats.base import REASONS, GroupingConfig
from medssl.scans.identity import Salt
from medssl.scans.index import Index
from medssl.scans.patients import PatientsConfig
from medssl.scans.rows import INDEX_SCHEMA
from medssl.scans.scan import load_scan, read_scan
from samples import linear_volume, reasons, rotation_affine, write_dicom_series, write_nifti


def test_every_file_is_in_exactly_one_row(folder, tmp_path):
    index = index_scans(folder, tmp_path / "index")
    assert index.table["num_files"].sum() == sum(path.is_file() for path in folder.rglob("*"))
    assert index.table["scan_key"].is_unique
    assert len(index.accepted) == 5
    assert reasons(index) == ["not_a_scan"]


def test_table_has_the_columns_that_others_build_on(folder, tmp_path):
    index = index_scans(folder, tmp_path / "index")
    assert list(index.table.columns) == INDEX_SCHEMA.names == [
        "scan_key", "patient_key", "study_key", "series_key", "format", "modality", "status",
        "reason", "dims", "shape", "spacing_mm", "orientation", "affine", "intensity",
        "num_files", "flags", "digest", "num_channels", "scanner_key", "site_key",
    ]  # fmt: skip


def test_index_inside_the_folder_is_not_indexed(folder):
    out = folder / "index"
    first = index_scans(folder, out).table
    assert len(index_scans(folder, out).table) == len(first)


def test_private_part_is_for_its_owner_only(folder, tmp_path):
    out = index_scans(folder, tmp_path / "index").folder
    assert stat.S_IMODE((out / "private").stat().st_mode) == 0o700
    files = [path for path in (out / "private").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_pipes_and_dead_links_do_not_stop_the_run(folder, tmp_path):
    os.mkfifo(folder / "pipe.dcm")
    (folder / "gone.nii").symlink_to(tmp_path / "nowhere")
    (folder / "round").symlink_to(folder, target_is_directory=True)
    index = index_scans(folder, tmp_path / "index")
    assert reasons(index) == ["no_access", "not_a_scan", "not_a_scan"]


def test_folder_that_cannot_be_entered_gets_a_row(folder, tmp_path, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("mr"):
            raise PermissionError(13, "denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert reasons(index_scans(folder, tmp_path / "index")) == ["no_access", "not_a_scan"]


def test_names_that_are_not_utf8_are_indexed_and_read(tmp_path):
    root = tmp_path / "scans"
    path = write_nifti(root / "a.nii")
    path.rename(root / os.fsdecode(b"M\xfcller.nii"))
    index = index_scans(root, tmp_path / "index")
    assert read_scan(index, index.accepted["scan_key"][0]).voxels_CXYZ.shape == (1, 8, 7, 6)


def test_same_voxels_under_two_names_count_once(tmp_path):
    for name in ("a.nii", "b.nii.gz"):
        write_nifti(tmp_path / "scans" / name, seed=1)
    index = index_scans(tmp_path / "scans", tmp_path / "index")
    assert reasons(index) == ["duplicate_file"]
    assert len(index.accepted) == 1


def test_excluded_files_are_counted_but_not_opened(folder, tmp_path):
    index = index_scans(folder, tmp_path / "index", exclude=["mr/*", "*.txt"])
    assert reasons(index) == ["excluded"] * 7


def test_series_of_two_patients_is_rejected(tmp_path):
    paths = write_dicom_series(linear_volume(), np.eye(4), tmp_path / "scans", seed=None)
    other = write_dicom_series(
        linear_volume(), np.eye(4), tmp_path / "other", patient_id="someone else", seed=None
    )
    other[3].replace(paths[3])
    with pytest.raises(DataError, match="6 files: mixed_patients"):
        index_scans(tmp_path / "scans", tmp_path / "index")


def test_scan_is_read_with_its_geometry(tmp_path):
    affine = rotation_affine((10, 20, 30), (1, 1.5, 2))
    write_nifti(tmp_path / "scans" / "a.nii", linear_volume(affine=affine), affine)
    index = index_scans(tmp_path / "scans", tmp_path / "index")
    scan = read_scan(index, index.accepted["scan_key"][0])
    np.testing.assert_array_equal(scan.voxels_CXYZ[0], linear_volume(affine=affine))
    np.testing.assert_allclose(scan.affine, affine, atol=1e-5)
    assert scan.spacing_mm == pytest.approx((1, 1.5, 2))
    assert scan.dims == "3D"


def test_loaded_scan_is_a_tensor_with_its_affine(folder, tmp_path):
    index = index_scans(folder, tmp_path / "index")
    key = index.accepted["scan_key"][0]
    tensor, scan = load_scan(index.folder, key), read_scan(index, key)
    np.testing.assert_array_equal(tensor.numpy(), scan.voxels_CXYZ)
    np.testing.assert_array_equal(tensor.affine.numpy(), scan.affine)


def test_index_survives_pickling(folder, tmp_path):
    index = index_scans(folder, tmp_path / "index")
    assert pickle.loads(pickle.dumps(index)).digest == index.digest  # noqa: S301


def test_unknown_patients_are_told_apart_and_reported(folder, tmp_path):
    index = index_scans(folder, tmp_path / "index")
    assert len(index.patients()) == 5
    assert "warning: 4 scans do not name their patient" in describe(index)[1]


def test_pattern_names_patients(folder, tmp_path):
    rule = PatientsConfig(pattern=r"(subject\d+)")
    index = index_scans(folder, tmp_path / "index", patients=rule)
    assert sorted(map(len, index.patients().values())) == [1, 2, 2]


def test_table_names_patients(folder, tmp_path):
    table = tmp_path / "patients.csv"
    table.write_text(
        "scan,patient\n" + "\n".join(f"subject{n // 2}_{n},P{n // 2}" for n in range(4))
    )
    index = index_scans(folder, tmp_path / "index", patients=PatientsConfig(table=table))
    assert sorted(map(len, index.patients().values())) == [1, 2, 2]


def test_bids_subjects_are_patients(tmp_path):
    for number in range(4):
        session = f"sub-0{number // 2}/ses-{number}/anat/sub-0{number // 2}_T1w.nii.gz"
        write_nifti(tmp_path / "bids" / session, seed=number)
    index = index_scans(tmp_path / "bids", tmp_path / "index")
    assert sorted(map(len, index.patients().values())) == [2, 2]
    assert {flag for flags in index.accepted["flags"] for flag in flags} == {"patient_from_path"}


def test_scan_missing_from_the_patients_table_is_refused(folder, tmp_path):
    table = tmp_path / "patients.csv"
    table.write_text("scan,patient\nsubject0_0,P0\n")
    with pytest.raises(DataError, match="names no patient for 3 scans"):
        index_scans(folder, tmp_path / "index", patients=PatientsConfig(table=table))


def test_scan_of_two_patients_is_refused(folder, tmp_path):
    table = tmp_path / "patients.csv"
    table.write_text("scan,patient\nsubject0_0,P0\nsubject0_0,P1\n")
    with pytest.raises(DataError, match="gives one scan to two patients"):
        index_scans(folder, tmp_path / "index", patients=PatientsConfig(table=table))


def test_patients_table_must_be_there_and_have_its_columns(folder, tmp_path):
    table = tmp_path / "patients.csv"
    with pytest.raises(ConfigError, match="there is no patients table 'patients.csv'"):
        index_scans(folder, tmp_path / "index", patients=PatientsConfig(table=table))
    table.write_text("file,person\n")
    with pytest.raises(DataError, match="has no column 'scan'. It has: file, person"):
        index_scans(folder, tmp_path / "index", patients=PatientsConfig(table=table))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "give either table"),
        ({"table": "a.csv", "pattern": "(x)"}, "give either table"),
        ({"pattern": "x"}, "must have one group"),
        ({"pattern": "("}, "not a regular expression"),
    ],
)
def test_patients_are_named_in_one_way(values, text):
    with pytest.raises(ValueError, match=text):
        PatientsConfig(**values)


def test_empty_folder_is_reported(tmp_path):
    (tmp_path / "scans" / "sub").mkdir(parents=True)
    with pytest.raises(DataError, match="the folder to index is empty"):
        index_scans(tmp_path / "scans", tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_missing_folder_is_reported(tmp_path):
    with pytest.raises(DataError, match="there is no folder at the path given as `folder`"):
        index_scans(tmp_path / "scans", tmp_path / "index")


def test_folder_of_texts_is_reported_with_counts(tmp_path):
    for number in range(3):
        write = tmp_path / "scans" / f"DOE_JANE_{number}.txt"
        write.parent.mkdir(exist_ok=True)
        write.write_text("hello")
    with pytest.raises(DataError, match=r"none of the 3 files is a usable scan:\n  3 files: not_a"):
        index_scans(tmp_path / "scans", tmp_path / "index")


def test_out_that_is_a_file_is_refused(folder, tmp_path):
    (tmp_path / "index").write_text("x")
    with pytest.raises(MachineError, match="the index needs a folder"):
        index_scans(folder, tmp_path / "index")


def test_plan_touches_nothing(folder, tmp_path):
    plan = plan_index(IndexConfig(folder=folder, exclude=("*.txt",)), tmp_path / "index")
    assert (plan.num_files, plan.num_excluded, plan.num_to_parse) == (11, 1, 10)
    assert not (tmp_path / "index").exists()


def test_folder_without_an_index_is_reported(tmp_path):
    with pytest.raises(DataError, match="there is no index in the folder given"):
        Index.open(tmp_path)


def test_damaged_index_is_reported(folder, tmp_path):
    index = index_scans(folder, tmp_path / "index")
    (index.folder / "index.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(DataError, match=r"index\.parquet is damaged"):
        Index.open(index.folder)


def test_shared_index_without_its_private_part_says_so(folder, tmp_path):
    index = index_scans(folder, tmp_path / "index")
    for path in (index.folder / "private").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="this index has no private part"):
        read_scan(Index.open(index.folder), index.accepted["scan_key"][0])


def test_unknown_key_is_reported(folder, tmp_path):
    with pytest.raises(DataError, match="there is no accepted scan 0000 in this index"):
        read_scan(index_scans(folder, tmp_path / "index"), "0000")


def test_summary_counts_and_names_nobody(folder, tmp_path):
    index = index_scans(folder, tmp_path / "index")
    summary = json.loads((index.folder / "summary.json").read_text())
    assert summary == index.summary
    assert summary["num_files"] == 11
    assert summary["rejected"]["not_a_scan"]["files"] == 1


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    (dicom,) = write_dicom_series(linear_volume((8, 7, 1)), np.eye(4), root, modality="CT")
    return {"a.dcm": dicom.read_bytes(), "a.nii": write_nifti(root / "a.nii").read_bytes()}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["a.dcm", "a.nii"]),
    content=st.binary(max_size=40),
    place=st.integers(0, 1200),
    cut=st.integers(0, 1700),
)
def test_no_damage_to_a_file_ends_the_run(tmp_path, whole_files, name, content, place, cut):
    original = whole_files[name]
    damaged = original[:place] + content + original[place + len(content) :]
    (tmp_path / name).write_bytes(damaged[: len(damaged) - cut if cut < 200 else None])
    header = parse_file(Salt(bytes(32)), FileToParse(1, name, str(tmp_path / name)))
    assert header.reason in {"", *REASONS}
    if not header.reason:
        (group,) = FORMATS.load(header.format)().group([header], GroupingConfig())
        if not group.reason:
            _read_or_reject(header.format, tmp_path / name)


def _read_or_reject(name, path):
    with contextlib.suppress(RejectedScan):
        volume = FORMATS.load(name)().read_voxels([path], {})
        assert np.isfinite(volume.affine).all()


def test_quarantine_is_what_the_config_says(tmp_path):
    write_nifti(tmp_path / "scans" / "a.nii")
    extra = {"BurnedInAnnotation": "YES"}
    write_dicom_series(linear_volume(), np.eye(4), tmp_path / "scans" / "mr", extra=extra)
    config = IndexConfig(folder=tmp_path / "scans")
    assert reasons(build_index(config, tmp_path / "index")) == ["quarantined"]
    open_to_all = config.model_copy(update={"quarantine": ()})
    assert reasons(build_index(open_to_all, tmp_path / "index")) == []


def test_misspelt_flag_in_a_config_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="no flag 'burned_in_anotation'. Did you mean 'burned_in_an"
    ):
        IndexConfig(folder=tmp_path, quarantine=("burned_in_anotation",))


def test_series_that_lost_a_slice_at_its_end_is_flagged(tmp_path):
    paths = write_dicom_series(linear_volume(), np.eye(4), tmp_path / "scans", seed=None)
    paths[-1].write_bytes(paths[-1].read_bytes()[:-60])
    index = index_scans(tmp_path / "scans", tmp_path / "index")
    assert "incomplete_series" in index.accepted["flags"][0]
    assert index.accepted["shape"][0].tolist() == [8, 7, 5]


def test_pattern_that_names_two_patients_in_one_series_rejects_it(tmp_path):
    paths = write_dicom_series(linear_volume(), np.eye(4), tmp_path / "scans" / "sub-A", seed=None)
    (tmp_path / "scans" / "sub-B").mkdir()
    paths[-1].rename(tmp_path / "scans" / "sub-B" / "x.dcm")
    write_nifti(tmp_path / "scans" / "sub-C" / "a.nii")
    rule = PatientsConfig(pattern=r"(sub-[^/]+)")
    index = index_scans(tmp_path / "scans", tmp_path / "index", patients=rule)
    assert reasons(index) == ["mixed_patients"]


def test_pattern_overrules_what_dicom_files_say(tmp_path):
    paths = write_dicom_series(linear_volume(), np.eye(4), tmp_path / "scans" / "sub-A", seed=None)
    edit = pydicom.dcmread(paths[0])
    edit.PatientID = "another"
    edit.save_as(paths[0])
    rule = PatientsConfig(pattern=r"(sub-[^/]+)")
    index = index_scans(tmp_path / "scans", tmp_path / "index", patients=rule)
    assert len(index.accepted) == 1


def test_scans_of_one_scanner_and_site_share_keys_whatever_their_format(tmp_path):
    folder = tmp_path / "scans"
    volume = linear_volume((6, 5, 4), rotation_affine())
    says = {"Manufacturer": "Acme Medical", "ManufacturerModelName": "One"}
    write_dicom_series(
        volume, rotation_affine(), folder / "a", extra={**says, "InstitutionName": "St. Elsewhere"}
    )
    write_dicom_series(volume + 1, rotation_affine(), folder / "b", number=2)
    write_nifti(folder / "c.nii.gz", seed=1)
    beside = {
        "Manufacturer": "ACME  medical", "ManufacturersModelName": "one",
        "InstitutionName": "St. Elsewhere",
    }  # fmt: skip
    (folder / "c.json").write_text(json.dumps(beside))
    write_nifti(folder / "d.nii.gz", seed=2)
    index = index_scans(folder, tmp_path / "index")
    scanners, sites = (index.accepted[name] for name in ("scanner_key", "site_key"))
    assert sorted((scanners != "").groupby(index.accepted["format"]).sum()) >= [1, 1]
    told = [(a, b) for a, b in zip(scanners, sites, strict=True) if b]
    assert len(told) == 2
    assert len(set(told)) == 1
    assert "Elsewhere" not in index.table.to_csv()
