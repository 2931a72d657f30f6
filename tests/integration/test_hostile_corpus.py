"""The hostile corpus: every case ends as the right volume or the right reason code, none silently.

The cases stand in ``tests/hostile_*.py``; each is indexed by itself, and read back.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hostile_corpus import CASES, DICOM_CASES, FILE_CASES, NIFTI_CASES
from hostile_outcomes import Found, differences, index_case, linear, rejected, same_as
from hostile_series import SHAPE, series, whole
from medssl.pipelines import index as pipeline
from samples import OBLIQUE, linear_volume


def test_corpus_is_as_large_as_it_should_be():
    assert len(CASES) == sum(map(len, (DICOM_CASES, NIFTI_CASES, FILE_CASES)))
    assert len(DICOM_CASES) >= 40
    assert len(NIFTI_CASES) >= 20


@pytest.mark.parametrize("name", CASES)
def test_hostile_case_ends_as_its_right_scans_and_reasons(name, tmp_path):
    case = CASES[name]
    folder = tmp_path / "archive"
    folder.mkdir()
    expected = case.build(folder)
    index = index_case(folder, tmp_path / "index", case.settings)
    assert differences(index, expected) == []


@pytest.mark.parametrize("name", [case.name for case in FILE_CASES if "out" in case.name])
def test_archive_writes_nothing_beside_the_index(name, tmp_path):
    place = tmp_path / "a" / "b" / "c" / "d"
    folder = place / "archive"
    folder.mkdir(parents=True)
    CASES[name].build(folder)
    before = set(tmp_path.rglob("*"))
    index_case(folder, place / "index", {})
    new = set(tmp_path.rglob("*")) - before - {place / "index"}
    assert not [path for path in new if place / "index" not in path.parents]
    assert not Path("/tmp/medssl-hostile").exists()


def test_file_deleted_while_indexing_costs_itself_only(tmp_path):
    folder = tmp_path / "archive"
    series(folder / "good")
    victim = folder / "zz.nii"
    victim.write_bytes(b"\0" * 400)

    def delete(stage, done, total):
        victim.unlink(missing_ok=True)

    local = {"name": "local", "num_workers": 0}
    config = pipeline.Config(folder=folder, executor=local)
    index = pipeline.run(config, tmp_path / "index", delete)
    assert differences(index, (whole(), rejected("changed_while_read|no_access|unreadable"))) == []


def turned_x(voxels, affine):
    return voxels[::-1], affine


def swapped_xy(voxels, affine):
    return voxels.swapaxes(0, 1), affine


def scrambled(voxels, affine):
    return voxels[:, :, [0, 2, 1, 3, 4, 5]], affine


def stretched(voxels, affine):
    return voxels, affine @ np.diag([1.0, 1.0, 1.2, 1.0])


def sheared(voxels, affine):
    shear = np.eye(4)
    shear[1, 2] = 0.3
    return voxels, affine @ shear


def moved(voxels, affine):
    shift = np.eye(4)
    shift[:3, 3] = 1.0
    return voxels, affine @ shift


@pytest.mark.parametrize("harm", [turned_x, swapped_xy, scrambled, stretched, sheared, moved])
def test_checks_notice_a_volume_that_lies_wrong(harm):
    voxels = linear_volume(SHAPE, OBLIQUE)
    harmed, affine = harm(voxels, OBLIQUE)
    found = Found(harmed[np.newaxis], affine)
    assert linear()(found)
    assert same_as(voxels[np.newaxis], OBLIQUE)(found)
    honest = Found(voxels[np.newaxis], OBLIQUE)
    assert linear()(honest) == same_as(voxels[np.newaxis], OBLIQUE)(honest) == ""
