import re
from dataclasses import replace
from pathlib import Path

import pytest

from medssl.errors import ConfigError, DataError
from medssl.scans.entry import Entry
from medssl.transforms.requests import SampleRequest
from stores import make_store, numbered_volume


@pytest.fixture(scope="module")
def flat_voxels(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    folder: Path = tmp_path_factory.mktemp("store")
    volume = numbered_volume((20, 24, 10))
    return make_store(folder, {"a1": volume}, spacing_mm=(1.0, 1.0, 3.0)).entry("a1")


@pytest.mark.parametrize(
    ("plane", "axes"),
    [("sagittal", ("Y", "Z")), ("coronal", ("X", "Z")), ("axial", ("X", "Y")), (None, ("X", "Y"))],
)
def test_a_plane_names_its_axes(plane, axes) -> None:
    assert SampleRequest(2, (8, 8), plane).axes == axes


def test_a_volume_has_all_axes() -> None:
    assert SampleRequest(3, (8, 8, 8)).axes == ("X", "Y", "Z")


def test_channels_are_sequences_times_neighbours() -> None:
    assert SampleRequest(2, (8, 8), "axial", num_neighbours=1, num_sequences=2).in_channels == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 4, "crop_size": (1,) * 4}, "spatial_dims must be 2 or 3, found 4"),
        ({"spatial_dims": 3, "crop_size": (8, 8)}, "crop_size must hold 3 positive numbers"),
        ({"spatial_dims": 2, "crop_size": (8, 0)}, "crop_size must hold 2 positive numbers"),
        ({"spatial_dims": 2, "crop_size": (8, 8), "plane": "oblique"}, "plane must be one of"),
        ({"spatial_dims": 3, "crop_size": (8,) * 3, "plane": "axial"}, "are for 2D slices"),
        ({"spatial_dims": 2, "crop_size": (8, 8), "num_neighbours": -1}, "0 or more"),
        ({"spatial_dims": 2, "crop_size": (8, 8), "min_foreground": 1.5}, "lie in"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(arguments, message) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        SampleRequest(**arguments)


def test_merging_asks_for_what_both_need() -> None:
    one = SampleRequest(2, (8, 8), "axial", num_neighbours=1, min_foreground=0.2, isotropic="all")
    two = SampleRequest(2, (8, 8), "axial", min_foreground=0.5, allow_padding=False, mask="organ")
    merged = one.merge(two)
    assert merged == SampleRequest(
        2, (8, 8), "axial", num_neighbours=1, min_foreground=0.5, isotropic="all",
        allow_padding=False, mask="organ",
    )  # fmt: skip
    assert merged == two.merge(one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_size": (9, 9)}, "agree on crop_size: found (8, 8) and (9, 9)"),
        ({"plane": "coronal"}, "agree on plane: found axial and coronal"),
        ({"mask": "other"}, "may use one mask: found 'organ' and 'other'"),
    ],
)
def test_requests_that_disagree_are_not_merged(change, message) -> None:
    request = SampleRequest(2, (8, 8), "axial", mask="organ")
    with pytest.raises(ConfigError, match=re.escape(message)):
        request.merge(replace(request, **change))


def test_a_scan_smaller_than_the_crop_is_refused_without_padding(flat_voxels: Entry) -> None:
    request = SampleRequest(2, (30, 8), "axial", allow_padding=False)
    with pytest.raises(DataError, match="scan a1 has 20 x 24 voxels, the task needs 30 x 8"):
        request.check(flat_voxels)
    request.check(flat_voxels, whole=True)
    replace(request, allow_padding=True).check(flat_voxels)


def test_unequal_spacings_are_refused_where_the_task_turns(flat_voxels: Entry) -> None:
    with pytest.raises(DataError, match=r"voxels of 1\.00 x 3\.00 mm, the task needs equal"):
        SampleRequest(2, (8, 8), "sagittal", isotropic="all").check(flat_voxels)
    with pytest.raises(DataError, match=r"voxels of 1\.00 x 1\.00 x 3\.00 mm"):
        SampleRequest(3, (8, 8, 8), isotropic="all").check(flat_voxels)
    SampleRequest(2, (8, 8), "axial", isotropic="all").check(flat_voxels)
    SampleRequest(3, (8, 8, 8), isotropic="in_plane").check(flat_voxels)


def test_slices_of_a_volume_need_a_plane(flat_voxels: Entry) -> None:
    with pytest.raises(DataError, match="give plane: sagittal, coronal or axial"):
        SampleRequest(2, (8, 8)).check(flat_voxels)


def test_slices_without_neighbours_are_refused_where_the_task_needs_them(
    flat_voxels: Entry,
) -> None:
    depth = flat_voxels.shape[2]
    request = SampleRequest(2, (8, 8), "axial", num_neighbours=depth, repeat_slices=False)
    with pytest.raises(DataError, match=f"has {depth} slices, the task needs {2 * depth + 1}"):
        request.check(flat_voxels)
    replace(request, repeat_slices=True).check(flat_voxels)
    alone = replace(flat_voxels, dims="2D", shape=flat_voxels.shape[:2], spacing_mm=(1.0, 1.0))
    with pytest.raises(DataError, match="is 2D and has no neighbouring slices"):
        replace(request, repeat_slices=True).check(alone)


def test_another_number_of_sequences_is_refused(flat_voxels: Entry) -> None:
    with pytest.raises(DataError, match="has 1 sequences, the task needs 2"):
        SampleRequest(2, (8, 8), "axial", num_sequences=2).check(flat_voxels)


def test_a_mask_that_was_not_stored_is_refused(flat_voxels: Entry) -> None:
    with pytest.raises(DataError, match=re.escape("no mask 'organ' in the store (it has: none)")):
        SampleRequest(2, (8, 8), "axial", mask="organ").check(flat_voxels)


def test_volumes_are_not_cut_from_images(tmp_path: Path) -> None:
    store = make_store(tmp_path, {"a1": numbered_volume((1, 1, 6, 6))[0]}, spacing_mm=(1, 1, 1))
    entry = replace(store.entry("a1"), shape=(6, 6), spacing_mm=(1.0, 1.0))
    with pytest.raises(DataError, match="scan a1 is 2D, the task needs 3D"):
        SampleRequest(3, (4, 4, 4)).check(entry)
    SampleRequest(2, (4, 4), "sagittal").check(entry)
