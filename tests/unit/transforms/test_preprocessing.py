from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from medssl.errors import DataError
from medssl.scans.scan import Scan
from medssl.transforms.preprocessing import IntensityConfig, PreprocessingConfig, preprocess

HIPPOCAMPUS = Path(__file__).parents[4] / "shared" / "data" / "hippocampus"


def rotation(degrees: float, axis: int) -> np.ndarray:
    angle = np.deg2rad(degrees)
    first, second = (i for i in range(3) if i != axis)
    matrix = np.eye(3)
    matrix[[first, second], [first, second]] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def affine_of(axes: str, spacing_mm: tuple[float, ...], turn: np.ndarray | None = None):
    """Return an affine whose voxel axes point to, for example, ``"PSL"``."""
    matrix = np.zeros((3, 3))
    for column, letter in enumerate(axes):
        row = next(i for i, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
        matrix[row, column] = spacing_mm[column] * (1 if letter in "RAS" else -1)
    affine = np.eye(4)
    affine[:3, :3] = matrix if turn is None else turn @ matrix
    affine[:3, 3] = (12.5, -7.0, 31.0)
    return affine


def world(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the RAS mm of every voxel, (3, X, Y, Z)."""
    indices = np.indices(shape, dtype=np.float64).reshape(3, -1)
    return (affine[:3, :3] @ indices + affine[:3, 3:]).reshape(3, *shape)


def scan_of(voxels: np.ndarray, affine: np.ndarray, intensity="arbitrary", dims="3D") -> Scan:
    image = voxels if voxels.ndim == (4 if dims == "3D" else 3) else voxels[np.newaxis]
    return Scan("k1", image.astype(np.float32), affine, dims, intensity)


def linear_scan(affine: np.ndarray, shape: tuple[int, ...], direction: np.ndarray) -> Scan:
    """Return a CT scan whose value in HU is the position along a direction, in mm."""
    values = np.tensordot(direction, world(affine, shape), axes=1)
    return scan_of(values, affine, intensity="HU")


WINDOW = IntensityConfig(kind="window_hu", window_hu=(-200.0, 200.0))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSL", "SRA", "AIR"])
@pytest.mark.parametrize("turn", [None, rotation(12, 0) @ rotation(-9, 2)])
@pytest.mark.parametrize("spacing_mm", [None, (1.0, 1.0, 1.0), (0.7, 1.5, 2.0)])
def test_every_voxel_lies_where_its_affine_says(axes, turn, spacing_mm) -> None:
    affine = affine_of(axes, (1.3, 0.8, 2.1), turn)
    direction = np.array([0.9, -0.6, 0.4])
    config = PreprocessingConfig(
        spacing_mm=spacing_mm, antialias=False, intensity=WINDOW, crop_foreground=False
    )
    prepared = preprocess(linear_scan(affine, (19, 23, 13), direction), {}, config)
    shape = prepared.image_CS.shape[1:]
    wanted = np.tensordot(direction, world(prepared.affine, shape), axes=1)
    found = prepared.image_CS[0].astype(np.float64) * 400 - 200
    inside = (slice(2, -2),) * 3
    # 0.2 mm: float16 holds steps of 0.0005, here of 0.2 HU
    np.testing.assert_allclose(found[inside], wanted[inside], atol=0.25)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSL"])
def test_axes_point_right_anterior_superior_with_the_spacing_asked_for(axes) -> None:
    import nibabel as nib

    affine = affine_of(axes, (1.3, 0.8, 2.1))
    config = PreprocessingConfig(spacing_mm=(0.9, 1.1, 1.7))
    scan = scan_of(np.random.default_rng(0).random((20, 22, 14)), affine)
    prepared = preprocess(scan, {}, config)
    assert nib.orientations.aff2axcodes(prepared.affine) == ("R", "A", "S")
    assert prepared.spacing_mm == pytest.approx((0.9, 1.1, 1.7))
    np.testing.assert_allclose(np.linalg.norm(prepared.affine[:3, :3], axis=0), (0.9, 1.1, 1.7))


def test_without_a_spacing_voxels_are_only_turned() -> None:
    volume = np.random.default_rng(0).random((6, 7, 8))
    affine = affine_of("LPS", (1.0, 2.0, 3.0))
    config = PreprocessingConfig(crop_foreground=False)
    prepared = preprocess(scan_of(volume, affine), {}, config)
    turned = volume[::-1, ::-1]
    low, high = np.percentile(volume, (0.5, 99.5))
    wanted = np.clip((turned - low) / (high - low), 0, 1)
    np.testing.assert_allclose(prepared.image_CS[0], wanted, atol=2e-3)
    assert prepared.spacing_mm == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("axes", ["RAS", "PSL"])
@pytest.mark.parametrize("spacing_mm", [None, (1.0, 1.0, 1.0), (0.5, 0.5, 0.5)])
def test_a_mask_stays_on_its_image(axes, spacing_mm) -> None:
    affine = affine_of(axes, (1.0, 1.2, 2.0), rotation(8, 1))
    shape = (30, 26, 16)
    x, y, z = world(affine, shape) - world(affine, shape).mean(axis=(1, 2, 3), keepdims=True)
    organ = (x / 9) ** 2 + (y / 7) ** 2 + (z / 8) ** 2 < 1
    volume = np.where(organ, 300.0, 100.0)
    config = PreprocessingConfig(spacing_mm=spacing_mm, crop_foreground=False)
    prepared = preprocess(scan_of(volume, affine), {"organ": organ.astype(np.uint8)}, config)
    mask = prepared.masks["organ"].astype(bool)
    bright = prepared.image_CS[0] > 0.5
    overlap = 2 * (mask & bright).sum() / (mask.sum() + bright.sum())
    assert prepared.masks["organ"].dtype == np.uint8
    assert overlap > (0.999 if spacing_mm is None else 0.93)


def test_labels_are_not_mixed_by_resampling() -> None:
    mask = np.zeros((10, 10, 10), np.uint8)
    mask[2:5], mask[5:8] = 2, 7
    config = PreprocessingConfig(spacing_mm=(0.6, 0.6, 0.6))
    prepared = preprocess(scan_of(np.ones((10, 10, 10)) * mask, np.eye(4)), {"m": mask}, config)
    assert set(np.unique(prepared.masks["m"])) <= {0, 2, 7}


def test_images_lie_between_zero_and_one() -> None:
    generator = np.random.default_rng(0)
    volume = generator.normal(500, 200, (16, 16, 16))
    prepared = preprocess(scan_of(volume, np.eye(4)), {}, PreprocessingConfig())
    assert prepared.image_CS.dtype == np.float16
    assert float(prepared.image_CS.min()) == 0
    assert float(prepared.image_CS.max()) == 1


def test_a_hu_window_is_the_same_for_every_ct() -> None:
    values = np.array([-2000.0, -1000.0, 0.0, 500.0, 1000.0, 3000.0])
    volume = np.broadcast_to(values[:, None, None], (6, 4, 4))
    config = PreprocessingConfig(crop_foreground=False)
    prepared = preprocess(scan_of(volume, np.eye(4), intensity="HU"), {}, config)
    np.testing.assert_allclose(prepared.image_CS[0, :, 0, 0], [0, 0, 0.5, 0.75, 1, 1], atol=1e-3)
    assert prepared.foreground_threshold == pytest.approx(0.25)


def test_percentiles_are_taken_for_each_channel() -> None:
    volume = np.stack([np.linspace(0, 1, 512), np.linspace(0, 50, 512)]).reshape(2, 8, 8, 8)
    config = PreprocessingConfig(crop_foreground=False)
    prepared = preprocess(scan_of(volume, np.eye(4)), {}, config)
    np.testing.assert_allclose(prepared.image_CS[0], prepared.image_CS[1], atol=1e-3)


def test_a_hu_window_is_refused_for_scans_without_hu() -> None:
    config = PreprocessingConfig(intensity=WINDOW)
    with pytest.raises(DataError, match=r"scan k1 has no values in HU.*kind to auto"):
        preprocess(scan_of(np.random.default_rng(0).random((4, 4, 4)), np.eye(4)), {}, config)


def test_a_window_within_soft_tissue_still_finds_the_body() -> None:
    volume = np.full((20, 20, 20), -1000.0)
    volume[5:15, 5:15, 5:15] = 40.0
    for window in ((-160.0, 240.0), (-1200.0, -800.0)):
        intensity = IntensityConfig(window_hu=window)
        config = PreprocessingConfig(intensity=intensity, margin_mm=0)
        prepared = preprocess(scan_of(volume, np.eye(4), intensity="HU"), {}, config)
        assert prepared.image_CS.shape == (1, 10, 10, 10)


def test_air_is_cut_off_but_for_the_margin_and_the_affine_follows() -> None:
    volume = np.zeros((30, 30, 30))
    volume[10:20, 5:25, 12:14] = 100
    mask = (volume > 0).astype(np.uint8)
    affine = affine_of("RAS", (2.0, 1.0, 1.0))
    prepared = preprocess(scan_of(volume, affine), {"m": mask}, PreprocessingConfig(margin_mm=4.0))
    assert prepared.image_CS.shape == (1, 14, 28, 10)
    np.testing.assert_array_equal(prepared.image_CS[0] > 0.5, prepared.masks["m"] > 0)
    assert prepared.mask_voxels_lost == {"m": 0}
    first = prepared.affine @ [2, 4, 4, 1]
    np.testing.assert_allclose(first, affine @ [10, 5, 12, 1])


def test_a_crop_that_would_cut_off_labels_is_refused() -> None:
    volume = np.zeros((20, 20, 20))
    volume[5:15, 5:15, 5:15] = 100
    mask = np.ones((20, 20, 20), np.uint8)
    with pytest.raises(DataError, match=r"scan k1: the foreground crop would cut off 7000 of 8000"):
        preprocess(scan_of(volume, np.eye(4)), {"m": mask}, PreprocessingConfig(margin_mm=0))
    config = PreprocessingConfig(crop_foreground=False)
    assert preprocess(scan_of(volume, np.eye(4)), {"m": mask}, config).masks["m"].all()


def test_a_constant_scan_becomes_zero_and_stays_whole() -> None:
    prepared = preprocess(scan_of(np.full((6, 7, 8), 42.0), np.eye(4)), {}, PreprocessingConfig())
    assert prepared.image_CS.shape == (1, 6, 7, 8)
    assert not prepared.image_CS.any()


def test_coarser_voxels_are_averaged_and_not_picked() -> None:
    checks = np.indices((24, 24, 24)).sum(axis=0) % 2 * 400.0 - 200.0
    scan = scan_of(checks, np.eye(4), intensity="HU")
    common = {"spacing_mm": (3.0, 3.0, 3.0), "intensity": WINDOW, "crop_foreground": False}
    smooth = preprocess(scan, {}, PreprocessingConfig(**common)).image_CS[0, 1:-1, 1:-1, 1:-1]
    picked = preprocess(scan, {}, PreprocessingConfig(**common, antialias=False)).image_CS[0]
    assert float(np.abs(smooth - 0.5).max()) < 0.05
    assert float(np.abs(picked - 0.5).max()) > 0.4


@pytest.mark.parametrize(("axes", "across"), [("LPS", "Z"), ("PIL", "X"), ("RSA", "Y")])
def test_an_image_is_turned_within_its_plane(axes: str, across: str) -> None:
    affine = affine_of(axes, (1.0, 0.5, 4.0))
    shape = (12, 20)
    direction = np.array([0.7, 0.5, -0.8])
    values = np.tensordot(direction, world(affine, (*shape, 1)), axes=1)[..., 0]
    scan = Scan("k1", values[np.newaxis].astype(np.float32), affine, "2D", "HU")
    config = PreprocessingConfig(
        spacing_mm=(0.8, 0.8, 0.8), antialias=False, intensity=WINDOW, crop_foreground=False
    )
    mask = (values > values.mean()).astype(np.uint8)
    prepared = preprocess(scan, {"m": mask}, config)
    assert prepared.image_CS.ndim == 3
    assert prepared.spacing_mm == pytest.approx((0.8, 0.8))
    assert prepared.masks["m"].shape == prepared.image_CS.shape[1:]
    positions = world(prepared.affine, (*prepared.image_CS.shape[1:], 1))
    wanted = np.tensordot(direction, positions, axes=1)[..., 0]
    found = prepared.image_CS[0].astype(np.float64) * 400 - 200
    np.testing.assert_allclose(found[2:-2, 2:-2], wanted[2:-2, 2:-2], atol=0.25)
    kept = [i for i in range(3) if "XYZ"[i] != across]
    directions = prepared.affine[:3, :2] / 0.8
    np.testing.assert_allclose(directions, np.eye(3)[:, kept], atol=1e-9)


def test_voxels_that_are_not_numbers_are_refused() -> None:
    volume = np.ones((4, 4, 4))
    volume[1, 1, 1] = np.nan
    with pytest.raises(DataError, match="scan k1 holds voxels that are not finite"):
        preprocess(scan_of(volume, np.eye(4)), {}, PreprocessingConfig())


def test_frames_of_a_cine_are_scaled_together_and_keep_their_number() -> None:
    frames = np.zeros((1, 12, 10, 3), np.float32)
    frames[0, :, :, 1], frames[0, :, :, 2] = 50, 100
    frames[0, 0] = 0
    scan = Scan("k1", frames, np.diag([2.0, 2, 1, 1]), "2D+t", "arbitrary")
    config = PreprocessingConfig(
        spacing_mm=(1, 1, 1), crop_foreground=False, intensity={"lower": 0, "upper": 100}
    )
    prepared = preprocess(scan, {}, config)
    assert prepared.image_CS.shape[0::3] == (1, 3)
    assert prepared.spacing_mm == (1.0, 1.0)
    means = prepared.image_CS[0, 12].mean(axis=0)
    np.testing.assert_allclose(means, [0, 0.5, 1], atol=0.01)


def test_mask_of_a_cine_is_refused() -> None:
    scan = Scan("k1", np.ones((1, 4, 4, 4), np.float32), np.eye(4), "2D+t", "arbitrary")
    with pytest.raises(DataError, match="scan k1 is a cine .* masks of cines are not supported"):
        preprocess(scan, {"organ": np.ones((4, 4, 4), np.uint8)}, PreprocessingConfig())


def test_colours_are_scaled_together() -> None:
    image = np.zeros((3, 8, 8), np.float32)
    image[0, 2:6, 2:6], image[1, 2:6, 2:6] = 200, 100
    scan = Scan("k1", image, np.eye(4), "2D", "arbitrary", ("colour",))
    config = PreprocessingConfig(crop_foreground=False, intensity={"lower": 0, "upper": 100})
    prepared = preprocess(scan, {}, config).image_CS
    np.testing.assert_allclose(prepared[:, 4, 4], [1, 0.5, 0], atol=1e-3)


def test_the_scan_is_not_edited() -> None:
    volume = np.random.default_rng(0).random((8, 9, 10)).astype(np.float32)
    scan, mask = scan_of(volume, np.eye(4)), np.ones((8, 9, 10), np.uint8)
    before = scan.voxels_CXYZ.copy()
    preprocess(scan, {"m": mask}, PreprocessingConfig(spacing_mm=(0.7, 0.7, 0.7)))
    np.testing.assert_array_equal(scan.voxels_CXYZ, before)
    assert mask.all()


@pytest.mark.parametrize(
    "content",
    [
        {"spacing_mm": (1.0, 0.0, 1.0)},
        {"intensity": {"lower": 90, "upper": 10}},
        {"intensity": {"window_hu": (100, -100)}},
        {"orientation": "LPS"},
        {"margin_mm": -1},
        {"blank": ["tables"]},
    ],
)
def test_settings_that_make_no_sense_are_refused(content) -> None:
    with pytest.raises(ValidationError):
        PreprocessingConfig.model_validate(content)


def test_the_digest_follows_the_settings() -> None:
    one = PreprocessingConfig().versioned_digest()
    assert one == PreprocessingConfig(margin_mm=5).versioned_digest()
    assert one != PreprocessingConfig(margin_mm=6).versioned_digest()


def test_a_config_that_blanks_nothing_keeps_the_address_it_had_before_one_could() -> None:
    # Computed when the field did not exist; stores of that time must be found again.
    wanted = "989e9c89b4107ad1695a7a76565e1a8311c6be41eb45e6151002f7df9820ede0"
    assert PreprocessingConfig(blank=()).digest() == wanted
    assert "blank" not in PreprocessingConfig().model_dump()
    assert PreprocessingConfig(blank=("text",)).digest() != wanted


def test_what_is_blanked_is_a_set() -> None:
    both = PreprocessingConfig(blank=("text", "field_of_view"))
    assert both == PreprocessingConfig(blank=("field_of_view", "text", "text"))
    assert both == PreprocessingConfig.model_validate(both.model_dump(mode="json"))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSL"])
def test_padding_is_blanked_across_the_slices_before_voxels_are_resampled(axes) -> None:
    from_centre = np.hypot(*(np.indices((40, 40)) - 19.5))
    volume = np.where(from_centre[..., None] < 19, -1000.0, -3024.0) + np.zeros(6)
    volume[from_centre < 12] = 0
    intensity = IntensityConfig(kind="window_hu", window_hu=(-4000.0, 0.0))
    config = PreprocessingConfig(
        spacing_mm=(0.7, 0.8, 0.9), intensity=intensity, crop_foreground=False
    )
    scan, mask = scan_of(volume, affine_of(axes, (1, 1, 2)), "HU"), np.ones((40, 40, 6), np.uint8)
    kept = preprocess(scan, {"m": mask}, config)
    blanked = preprocess(scan, {"m": mask}, config.model_copy(update={"blank": ("field_of_view",)}))
    assert float(kept.image_CS.min()) < 0.3
    assert float(blanked.image_CS.min()) == pytest.approx(0.75, abs=1e-3)  # air, everywhere
    np.testing.assert_array_equal(blanked.affine, kept.affine)
    np.testing.assert_array_equal(blanked.masks["m"], kept.masks["m"])


def test_letters_of_an_image_and_of_a_cine_are_blanked() -> None:
    frames = np.random.default_rng(0).normal(10, 1, (64, 48, 3))
    frames[20:50, 10:40] += 100
    frames[4:6, 4:12], frames[4:12, 4:6] = 255, 255  # L
    config = PreprocessingConfig(
        blank=("text",), crop_foreground=False, intensity={"lower": 0, "upper": 100}
    )
    cine = Scan("k1", frames[np.newaxis].astype(np.float32), np.eye(4), "2D+t", "arbitrary")
    still = scan_of(frames[..., 0], np.eye(4), dims="2D")
    for prepared in (preprocess(cine, {}, config), preprocess(still, {}, config)):
        assert float(prepared.image_CS[0, :16, :16].max()) < 0.2
        assert float(prepared.image_CS[0, 20:50, 10:40].min()) > 0.8


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the hippocampus scans are not here")
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (0.5, 0.5, 0.5)])
def test_real_scans_keep_their_masks(spacing_mm) -> None:
    import nibabel as nib

    path = min((HIPPOCAMPUS / "images").glob("*.nii.gz"))
    image = nib.load(path)
    mask = np.asarray(nib.load(HIPPOCAMPUS / "labels" / path.name).dataobj).astype(np.uint8)
    scan = scan_of(np.asarray(image.dataobj, dtype=np.float32), image.affine)
    prepared = preprocess(scan, {"m": mask}, PreprocessingConfig(spacing_mm=spacing_mm))
    volume_mm3 = np.bincount(prepared.masks["m"].ravel(), minlength=3) * np.prod(spacing_mm)
    wanted = np.bincount(mask.ravel(), minlength=3)
    np.testing.assert_allclose(volume_mm3[1:], wanted[1:], rtol=0.05)
