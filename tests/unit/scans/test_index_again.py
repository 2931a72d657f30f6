"""An index brought up to date: what is new, gone or changed, kills, and readers meanwhile."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from medssl.errors import DataError
from medssl.pipelines.index import index_scans
from medssl.scans import building
from medssl.scans.building import IndexConfig, LimitsConfig, build_index, plan_index
from medssl.scans.files import lost_file, parse_file
from medssl.scans.index import Index
from medssl.scans.scan import read_scan
from samples import linear_volume, reasons, write_dicom_series, write_nifti


def test_second_run_parses_nothing_and_writes_the_same(folder, tmp_path, monkeypatch):
    out = tmp_path / "index"
    index_scans(folder, out)
    before = (out / "index.parquet").read_bytes()

    def refuse(*_):
        raise AssertionError("a known file was parsed again")

    monkeypatch.setattr(building, "parse_file", refuse)
    monkeypatch.setattr(building, "RowMaker", refuse)
    again = index_scans(folder, out, num_workers=0)
    assert (out / "index.parquet").read_bytes() == before
    assert again.digest == Index.open(out).digest


def test_only_new_and_changed_files_are_parsed_again(folder, tmp_path):
    out = tmp_path / "index"
    index_scans(folder, out)
    write_nifti(folder / "subject1_2.nii.gz", seed=77)
    write_nifti(folder / "new.nii.gz", seed=78)
    plan = plan_index(IndexConfig(folder=folder), out)
    assert plan.num_to_parse == 2
    assert len(index_scans(folder, out).accepted) == 6


def test_removed_file_leaves_the_table(folder, tmp_path):
    index_scans(folder, tmp_path / "index")
    (folder / "subject0_0.nii.gz").unlink()
    assert len(index_scans(folder, tmp_path / "index").accepted) == 4


def test_interrupted_run_keeps_what_it_parsed(folder, tmp_path, monkeypatch):
    def stop(stage, done, total):
        if stage == "reading headers" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_scans(folder, tmp_path / "index", progress=stop)
    plan = plan_index(IndexConfig(folder=folder), tmp_path / "index")
    assert plan.num_to_parse == plan.num_files - 4


def test_workers_give_the_same_table(folder, tmp_path):
    alone = index_scans(folder, tmp_path / "index", num_workers=0)
    before = (alone.folder / "index.parquet").read_bytes()
    (alone.folder / "private" / "ledger.sqlite").unlink()
    index_scans(folder, tmp_path / "index", num_workers=2)
    assert (alone.folder / "index.parquet").read_bytes() == before


def test_keys_stay_when_the_folder_moves(folder, tmp_path):
    first = index_scans(folder, tmp_path / "index")
    digest = first.digest
    folder.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="not where they were indexed"):
        read_scan(Index.open(tmp_path / "index"), first.accepted["scan_key"][0])
    assert index_scans(tmp_path / "moved", tmp_path / "index").digest == digest


def test_damaged_memory_of_earlier_runs_costs_time_only(folder, tmp_path):
    digest = index_scans(folder, tmp_path / "index").digest
    (tmp_path / "index" / "private" / "ledger.sqlite").write_bytes(b"broken")
    assert index_scans(folder, tmp_path / "index").digest == digest


@pytest.mark.parametrize("same_size", [True, False])
def test_file_changed_after_indexing_is_noticed(tmp_path, same_size):
    path = write_nifti(tmp_path / "scans" / "a.nii")
    index = index_scans(tmp_path / "scans", tmp_path / "index")
    shape = (8, 6, 7) if same_size else (8, 7, 7)
    write_nifti(path, np.random.default_rng(0).random(shape, np.float32))
    with pytest.raises(DataError, match="its files changed after they were indexed"):
        read_scan(index, index.accepted["scan_key"][0])


def test_sidecar_that_lay_there_first_is_known_as_one_when_its_image_comes(tmp_path):
    root = tmp_path / "scans"
    write_nifti(root / "b.nii.gz", seed=1)
    (root / "a.json").write_text('{"Modality": "MR"}')
    assert reasons(index_scans(root, tmp_path / "index")) == ["not_a_scan"]
    write_nifti(root / "a.nii.gz", seed=2)
    assert reasons(index_scans(root, tmp_path / "index")) == ["sidecar"]
    (root / "a.nii.gz").unlink()
    assert reasons(index_scans(root, tmp_path / "index")) == ["not_a_scan"]


def test_second_process_on_one_index_is_refused(folder, tmp_path):
    def again(stage, done, total):
        if stage == "reading headers":
            code = (
                "import sys; from medssl.pipelines.index import index_scans; "
                "index_scans(sys.argv[1], sys.argv[2])"
            )
            command = [sys.executable, "-c", code, str(folder), str(tmp_path / "index")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            messages.append(done.stderr)
            raise KeyboardInterrupt

    messages = []
    with pytest.raises(KeyboardInterrupt):
        index_scans(folder, tmp_path / "index", progress=again)
    assert "another medssl process is building this index" in messages[0]


def test_table_is_made_again_after_a_kill_under_another_config(tmp_path, monkeypatch):
    extra = {"BurnedInAnnotation": "YES"}
    write_dicom_series(linear_volume(), np.eye(4), tmp_path / "scans" / "mr", extra=extra)
    write_nifti(tmp_path / "scans" / "a.nii")
    config = IndexConfig(folder=tmp_path / "scans")
    build_index(config, tmp_path / "index")

    def kill(*_):
        raise KeyboardInterrupt

    wide = config.model_copy(update={"quarantine": ()})
    with monkeypatch.context() as patch:
        patch.setattr(building.Ledger, "finish_scans", kill)
        with pytest.raises(KeyboardInterrupt):
            build_index(wide, tmp_path / "index")
    assert reasons(build_index(config, tmp_path / "index")) == ["quarantined"]


def test_key_of_an_unfinished_index_never_reads_another_file(folder, tmp_path, monkeypatch):
    index = index_scans(folder, tmp_path / "index")
    names = {path: key for key, path, _ in index.file_names()}
    key, wanted = names["subject1_3.nii.gz"], read_scan(index, names["subject1_2.nii.gz"])
    (folder / "subject1_3.nii.gz").unlink()
    write_nifti(folder / "new.nii.gz", seed=9)

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(building, "RowMaker", kill)
        with pytest.raises(KeyboardInterrupt):
            index_scans(folder, tmp_path / "index")
    unfinished = Index.open(tmp_path / "index")
    with pytest.raises(DataError, match="not where they were indexed"):
        read_scan(unfinished, key)
    other = read_scan(unfinished, wanted.scan_key)
    np.testing.assert_array_equal(other.voxels_CXYZ, wanted.voxels_CXYZ)


def test_index_can_be_read_after_its_writer_was_killed(folder, tmp_path):
    index = index_scans(folder, tmp_path / "index")
    code = (
        "import os, sys; from pathlib import Path; from medssl.scans.ledger import Ledger; "
        "ledger = Ledger(Path(sys.argv[1]), Path(sys.argv[2])); ledger.begin_scans(); "
        "ledger._db.execute('DELETE FROM files'); os._exit(9)"
    )
    command = [sys.executable, "-c", code, str(index.folder / "private"), str(folder)]
    assert subprocess.run(command, check=False).returncode == 9
    read_scan(Index.open(index.folder), index.accepted["scan_key"][0])
    assert plan_index(IndexConfig(folder=folder), index.folder).num_to_parse == 0
    assert index_scans(folder, index.folder).digest == index.digest


def test_file_overwritten_in_place_is_not_read_under_its_old_key(tmp_path):
    path = write_nifti(tmp_path / "scans" / "a.nii", seed=1)
    index = index_scans(tmp_path / "scans", tmp_path / "index")
    write_nifti(path, seed=2)
    with pytest.raises(DataError, match="its files changed after they were indexed"):
        read_scan(index, index.accepted["scan_key"][0])


@pytest.mark.parametrize("name", ["index.parquet", "summary.json"])
def test_damaged_table_is_made_again(folder, tmp_path, name):
    index = index_scans(folder, tmp_path / "index")
    whole = (index.folder / name).read_bytes()
    (index.folder / name).write_bytes(b"broken")
    index_scans(folder, tmp_path / "index")
    assert (index.folder / name).read_bytes() == whole


def test_file_that_took_too_long_is_read_again_with_other_limits(folder, tmp_path, monkeypatch):
    def slow(salt, file):
        return lost_file(file, "too_slow") if file.path.endswith(".gz") else parse_file(salt, file)

    with monkeypatch.context() as patch:
        patch.setattr(building, "parse_file", slow)
        first = index_scans(folder, tmp_path / "index", num_workers=0)
    assert reasons(first) == ["not_a_scan", *["too_slow"] * 4]
    assert reasons(index_scans(folder, tmp_path / "index")) == reasons(first)
    config = IndexConfig(folder=folder, limits=LimitsConfig(seconds=301))
    assert reasons(build_index(config, tmp_path / "index")) == ["not_a_scan"]
