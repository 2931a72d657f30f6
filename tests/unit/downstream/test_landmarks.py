"""Landmarks: points that survive preprocessing in mm, and heatmaps that find them again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labelled_scans import build_task, place_of, write_folder
from medssl.config import validate_config
from medssl.downstream.landmarks import Config, Landmarks, draw_heatmaps, find_peak
from medssl.errors import ConfigError, DataError, LabelError
from medssl.pipelines.prepare import prepare
from medssl.scans.building import IndexConfig, build_index
from medssl.scans.index import Index
from medssl.scans.masks import MaskFolder
from medssl.scans.points import paint_points, voxel_of
from medssl.scans.store import Store
from medssl.transforms.cases import CaseReader
from medssl.transforms.preprocessing import PreprocessingConfig
from medssl.transforms.sampling import CropSampler, SampleRequest
from samples import real_data

PREPARED = PreprocessingConfig(spacing_mm=(1.0, 1.5, 1.0), crop_foreground=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scans")
    write_folder(place, 3)
    return place


def with_points(folder: Path, tmp_path: Path, text: str, **settings: Any) -> Landmarks:
    path = tmp_path / "points.csv"
    path.write_text("scan,name,x,y,z\n" + text)
    return Landmarks(Config(table=path, **settings), 3, Index.open(folder / "index"))


def row(scan: str, name: str, voxel: tuple[float, ...], *, lps: bool = False) -> str:
    x, y, z = place_of(voxel)
    return f"{scan},{name},{-x if lps else x},{-y if lps else y},{z}\n"


def stored(task: Landmarks, folder: Path, config: PreprocessingConfig = PREPARED) -> Store:
    index = Index.open(folder / "index")
    return prepare(index, config, folder / "store", masks=Landmarks.masks(task.config))


def drawn(task: Landmarks, case: Any) -> torch.Tensor:
    """Return perfect heatmaps of a case, drawn around the true points and not around voxels."""
    shape = case.images.shape[2:]
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    maps = []
    for point in np.reshape(task.targets[case.scan_key], (-1, 3)):
        apart = (grid - voxel_of(tuple(point), case.affine)[: len(shape)]) * case.spacing_mm
        maps.append(np.exp(-0.5 * (apart**2).sum(-1) / task.config.sigma_mm**2))
    return torch.from_numpy(np.stack(maps))[None]


def test_points_of_either_system_are_the_same_places(folder, tmp_path):
    ras = with_points(folder, tmp_path, row("anna", "apex", (4, 5, 6)))
    lps = with_points(folder, tmp_path, row("anna", "apex", (4, 5, 6), lps=True), coordinates="LPS")
    assert ras.targets == lps.targets
    (target,) = ras.targets.values()
    assert target == pytest.approx(place_of((4, 5, 6)))


def test_points_of_the_wrong_system_are_noticed(folder, tmp_path):
    with pytest.raises(
        LabelError, match=r"1 points lie outside their scans .* \(coordinates: LPS\)"
    ):
        with_points(folder, tmp_path, row("anna", "apex", (4, 5, 6), lps=True))


def test_a_point_that_a_scan_lacks_is_unknown(folder, tmp_path):
    text = row("anna", "apex", (4, 5, 6)) + row("berta", "base", (4, 5, 6))
    task = with_points(folder, tmp_path, text)
    assert task.classes == ("apex", "base")
    for target in task.targets.values():
        assert sum(math.isnan(x) for x in target) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("anna,apex,0,zero,0\n", "coordinates that are not finite numbers"),
        ("nobody,apex,0,0,0\n", "none of the 1 rows of the points table fits one of the 6"),
        (row("anna", "apex", (4, 5, 6)) * 2 + row("anna", "apex", (4, 5, 7)), "at two places"),
        ("anna,other,0,0,0\n", r"1 points that are not among the classes \['apex'\]"),
    ],
)
def test_points_that_do_not_fit_are_named(folder, tmp_path, text, message):
    classes = ("apex",) if "other" in message or "among" in message else None
    with pytest.raises(LabelError, match=message):
        with_points(folder, tmp_path, text, classes=classes)


def test_mismatches_are_counted(folder, tmp_path):
    text = row("anna", "apex", (4, 5, 6)) * 2 + "nobody,apex,0,0,0\nberta,apex,,1,1\n"
    report = with_points(folder, tmp_path, text).labels
    assert report.counts == {
        "double_rows": 1,
        "rows_without_scan": 1,
        "rows_without_value": 1,
        "scans_without_label": 5,
    }


def test_slices_of_volumes_are_refused(folder):
    with pytest.raises(LabelError, match=r"landmarks are looked for in 2D, and 6 of the scans are"):
        build_task("landmarks", folder, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either table or masks"),
        ({"masks": "x"}, "with masks, give the names of their values"),
        ({"table": "x", "sigma_mm": 0}, "sigma_mm"),
    ],
)
def test_the_config_says_where_points_come_from(given, message):
    with pytest.raises(ConfigError, match=message):
        validate_config({"name": "landmarks", **given}, Config)


def test_centroids_of_masks_are_points(folder):
    task = build_task("landmarks", folder, 3, table=None, masks="masks", classes=("head", "tail"))
    index = Index.open(folder / "index")
    (key,) = [key for key, path, _ in index.file_names() if "anna" in path]
    wanted = [*place_of((5, 5, 5)), *place_of((11.5, 9.5, 7.5))]  # (16, 14, 12) - 6 … - 3
    assert task.targets[key] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        PreprocessingConfig(crop_foreground=False),
        PREPARED,
        PreprocessingConfig(spacing_mm=(4.0, 4.0, 4.0), crop_foreground=False),
        PreprocessingConfig(spacing_mm=(1.0, 1.0, 1.0), foreground_threshold=0.4, margin_mm=6),
    ],
    ids=["own spacing", "finer", "coarse", "cropped"],
)
def test_no_preprocessing_moves_or_loses_a_point(folder, config):
    task = build_task("landmarks", folder, 3)
    store = stored(task, folder, config)
    for key in store.scan_keys:
        entry, mask = store.entry(key), store.read_mask(key, "landmarks")
        for number, point in enumerate(np.reshape(task.targets[key], (-1, 3)), start=1):
            (voxel,) = np.argwhere(mask == number)
            place = np.array(entry.affine) @ [*voxel, 1]
            off = (voxel - voxel_of(tuple(point), entry.affine)) * 1.0
            assert np.abs(off).max() <= 0.5 + 1e-6
            assert np.linalg.norm(place[:3] - point) <= np.linalg.norm(entry.spacing_mm) / 2 + 1e-6


def test_a_point_that_the_crop_cuts_off_is_refused():
    with pytest.raises(DataError, match=r"scan k: landmark number 2 lies outside the prepared"):
        paint_points([(1, 1, 1), (9, 1, 1)], np.eye(4), (4, 4, 4), "k")


def test_points_at_one_place_get_a_voxel_each():
    mask = paint_points([(1.1, 1, 1), (1.2, 1, 1), (1, 1, 1)], np.eye(4), (4, 4, 4), "k")
    assert sorted(mask[mask > 0]) == [1, 2, 3]
    assert mask[1, 1, 1] == 1
    assert mask[2, 1, 1] == 2
    with pytest.raises(DataError, match="more landmarks lie at one place than there are voxels"):
        paint_points([(0, 0, 0)] * 9, np.eye(4), (2, 2, 2), "k")


def test_a_heatmap_is_a_gaussian_of_the_width_in_mm():
    masks = torch.zeros(2, 9, 8, 7, dtype=torch.long)
    masks[0, 2, 3, 4], masks[1, 6, 6, 1] = 1, 2
    steps = torch.tensor([[0.5, 0.25, 1.0], [1.0, 1.0, 1.0]])
    found = draw_heatmaps(masks, 2, steps)
    assert found.shape == (2, 2, 9, 8, 7)
    assert found[0, 0, 2, 3, 4] == found[1, 1, 6, 6, 1] == 1
    assert float(found[0, 0, 4, 7, 4]) == pytest.approx(math.exp(-0.5 * (1 + 1)))
    assert float(found[0, 1].abs().max()) == float(found[1, 0].abs().max()) == 0


def test_the_peak_is_found_between_voxels():
    grid = np.stack(np.meshgrid(np.arange(30), np.arange(25), indexing="ij"), -1)
    true = np.array([12.3, 9.8])
    heatmap = np.exp(-0.5 * (((grid - true) / [3, 2]) ** 2).sum(-1)).astype(np.float32)
    found = find_peak(heatmap, np.array([3.0, 2.0]))
    assert np.abs(found - true).max() < 0.12
    assert np.abs(found - true).max() < np.abs(np.rint(true) - true).max()


@pytest.mark.parametrize("place", [(0, 0), (29, 24), (0, 12)])
def test_a_border_does_not_push_the_peak_away(place):
    heatmap = np.zeros((30, 25), np.float32)
    heatmap[place] = 1
    assert find_peak(heatmap, np.array([3.0, 3.0])).tolist() == list(place)


def test_an_empty_heatmap_has_a_peak_all_the_same():
    assert np.isfinite(find_peak(np.full((4, 4), -1.0, np.float32), np.ones(2))).all()


@pytest.mark.parametrize("dims", [2, 3])
def test_perfect_heatmaps_have_nearly_no_error_in_mm(tmp_path, dims):
    write_folder(tmp_path, dims)
    task = build_task("landmarks", tmp_path, dims, sigma_mm=2.5)
    config = PreprocessingConfig(spacing_mm=(1.0, 0.8, 1.2), crop_foreground=False)
    store = stored(task, tmp_path, config)
    request = task.request(SampleRequest(dims, (40, 8, 8)[:dims]))  # X is padded
    for case in CaseReader(store, store.scan_keys, request):
        assert case.padding[0][0] > 0
        assert max(task.score_case(drawn(task, case), case)) < 0.25


def test_an_error_is_a_distance_in_mm(folder):
    task = build_task("landmarks", folder, 3)
    store = stored(task, folder)
    (case,) = CaseReader(store, store.scan_keys[:1], task.request(SampleRequest(3, (8, 8, 8))))
    moved = drawn(task, case).roll((2, 2), dims=(2, 3))
    wanted = math.hypot(2 * 1.0, 2 * 1.5)
    # The roll brings nothing to the peak's neighbourhood from the other side.
    assert task.score_case(moved, case)[0] == pytest.approx(wanted, abs=0.5)


def test_unknown_points_have_no_error_and_are_not_learnt(folder, tmp_path):
    text = "".join(row(name, "apex", (4, 5, 6)) for name in ("anna", "berta"))
    task = with_points(folder, tmp_path, text + row("anna", "base", (8, 8, 6)), sigma_mm=3)
    index = Index.open(folder / "index")
    (key,) = [key for key, path, _ in index.file_names() if "berta" in path]
    store = prepare(index, PREPARED, tmp_path / "store", masks=Landmarks.masks(task.config))
    request = task.request(SampleRequest(3, (12, 10, 12)))
    (case,) = CaseReader(store, [key], request)
    scores = task.score_case(torch.rand(1, 2, *case.images.shape[2:]), case)
    assert math.isfinite(scores[0])
    assert math.isnan(scores[1])
    batch = task.batch_of(CropSampler(store, [key], request, 0, "t").batch(0, 1), torch.Generator())
    output = torch.zeros(1, 2, 12, 10, 12, requires_grad=True)
    task.loss(output + 0.5, batch).backward()
    assert output.grad is not None
    assert (output.grad[0, 0] != 0).all()
    assert (output.grad[0, 1] == 0).all()


def test_drawing_nothing_costs_more_than_drawing_the_points(folder):
    task = build_task("landmarks", folder, 3)
    store = stored(task, folder)
    request = task.request(SampleRequest(3, (16, 10, 16)))
    sample = CropSampler(store, store.scan_keys, request, 0, "t").batch(0, 4)
    batch = task.batch_of(sample, torch.Generator())
    assert float(task.loss(batch.target, batch)) == 0
    nothing = float(task.loss(torch.zeros_like(batch.target), batch))
    assert nothing > 2 * float((batch.target**2).mean())


def test_points_have_to_be_placed_in_mm(folder):
    with pytest.raises(ValueError, match="scored in mm"):
        build_task("landmarks", folder, 3).case_scores(torch.zeros(1, 2, 4, 4, 4), None)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (2.0, 1.5, 1.0)])
def test_centroids_of_real_masks_come_out_right_after_preprocessing(tmp_path, spacing_mm):
    """Twice the same place: in mm from the file, and on the prepared grid from the mask there."""
    source = real_data("hippocampus")
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for number in (1, 3, 33):
            name = f"hippocampus_{number:03d}.nii.gz"
            (tmp_path / kind / name).symlink_to(source / kind / name)
    build_index(IndexConfig(folder=tmp_path / "images", executor="local"), tmp_path / "index")
    index = Index.open(tmp_path / "index")
    names = ("anterior", "posterior")
    task = Landmarks(Config(masks=tmp_path / "labels", classes=names), 3, index)
    masks = {**Landmarks.masks(task.config), "organ": MaskFolder(tmp_path / "labels", names)}
    config = PreprocessingConfig(spacing_mm=spacing_mm)
    store = prepare(index, config, tmp_path / "store", masks=masks)
    assert len(store.scan_keys) == 3
    for case in CaseReader(store, store.scan_keys, SampleRequest(3, (8, 8, 8), mask="organ")):
        assert case.masks is not None
        for number, point in enumerate(np.reshape(task.targets[case.scan_key], (-1, 3)), start=1):
            centre = np.argwhere(case.masks[0].numpy() == number).mean(axis=0)
            place = case.affine @ [*centre, 1]
            # Nearest-neighbour resampling moves the border of a small mask by parts of a voxel.
            assert np.linalg.norm(place[:3] - point) < 0.25 * np.linalg.norm(spacing_mm)
        assert max(task.score_case(drawn(task, case), case)) < 0.25
