"""What is blanked, and above all what is not.

The phantoms here hold noise, so that flat padding and flat letters stand out as they do in scans.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from medssl.transforms.artifacts import blank, outside_mask, text_mask

SIDE = 256
X, Y = np.indices((SIDE, SIDE))
FROM_CENTRE = np.hypot(X - (SIDE - 1) / 2, Y - (SIDE - 1) / 2)


def noise(shape, mean=0.0, deviation=1.0, seed=0):
    return np.random.default_rng(seed).normal(mean, deviation, shape).astype(np.float32)


def words(text, place, size=16, *, smooth=True):
    """Return how much of each voxel a text covers, (SIDE, SIDE) in [0, 1]; Y runs up."""
    image = Image.new("L", (SIDE, SIDE))
    draw = ImageDraw.Draw(image)
    draw.fontmode = "L" if smooth else "1"
    draw.text(place, text, fill=255, font=ImageFont.load_default(size))
    return np.asarray(image).T[:, ::-1] / 255


def drawn(image_XY, coverage_XY, value):
    return (image_XY + coverage_XY * (value - image_XY)).astype(np.float32)


def ultrasound(seed=0):
    """Return a fan of speckle in a black frame, 0 to 255, (SIDE, SIDE), and where the fan lies."""
    depth = np.hypot(X - SIDE / 2, SIDE - 10 - Y)
    angle = np.arctan2(X - SIDE / 2, SIDE - 10 - Y)
    fan = (depth > 30) & (depth < 200) & (np.abs(angle) < 0.6)
    speckle = np.random.default_rng(seed).rayleigh(60, (SIDE, SIDE)).clip(20, 255).round()
    return np.where(fan, speckle, 0).astype(np.float32), fan


def radiograph(seed=0):
    """Return a thorax-like radiograph: noisy air, a grey body, dense bone and a thin bright wire.

    Bone and wire hold the highest value, which a letter will share.
    """
    image = noise((SIDE, SIDE), 40, 4, seed)
    body = (np.abs(X - 128) < 80) & (np.abs(Y - 110) < 100)
    image[body] = noise(body.sum(), 1500, 60, seed)
    dense = np.zeros_like(body)
    dense[120:136, 30:200] = True  # spine
    dense[70:110, 150:153] = True  # rib, as thin as a stroke
    dense[160:163, 90:110] = True  # wire
    image[dense] = 4095
    return image.clip(0, 4095).round(), body, dense


def blanked(image_XY, *kinds, **options):
    """Blank a 2D image, as preprocessing holds it."""
    result = blank(image_XY[None, :, :, None], kinds, across=2, **options)
    return result[0, :, :, 0]


@pytest.mark.parametrize("smooth", [True, False], ids=["smooth", "hard"])
@pytest.mark.parametrize("size", [14, 20])
def test_text_in_the_black_frame_of_an_ultrasound_is_blanked(size, smooth) -> None:
    plain, fan = ultrasound()
    text = words("ABDOMEN 3.5 MHz", (8, 8), size, smooth=smooth)
    text = text * ~fan
    result = blanked(drawn(plain, text, 255), "text")
    assert result[~fan].max() == 0
    np.testing.assert_array_equal(result[fan], plain[fan])


def test_a_side_marker_beside_the_body_takes_the_value_of_the_air_around() -> None:
    plain, body, _ = radiograph()
    marker = words("R", (12, 200), 32)
    marked = drawn(plain, marker, 4095)
    result = blanked(marked, "text")
    assert result[~body].max() < 40 + 6 * 4
    np.testing.assert_array_equal(result[body], plain[body])
    assert result[marker > 0].mean() == pytest.approx(40, abs=2)


def test_dense_bone_and_metal_in_the_body_are_left_alone() -> None:
    image, _, dense = radiograph()
    np.testing.assert_array_equal(blanked(image, "text"), image)
    assert (image[dense] == image.max()).all()


def test_metal_in_air_that_the_body_encloses_is_left_alone() -> None:
    volume = np.full((1, SIDE, SIDE, 3), -1000, np.float32) + noise((SIDE, SIDE, 3), 0, 15)
    volume[:, FROM_CENTRE < 100] = 40
    volume[:, FROM_CENTRE < 60] = -850  # lung
    clip = (slice(None), slice(126, 130), slice(120, 126))
    volume[clip] = 3071
    result = blank(volume, ["text"], across=2, air_level=-500)
    np.testing.assert_array_equal(result, volume)


def test_a_bright_large_body_is_no_letter() -> None:
    image = noise((SIDE, SIDE), 20, 2).clip(0)
    image[FROM_CENTRE < 70] = 1000
    np.testing.assert_array_equal(blanked(image, "text"), image)


def test_text_over_the_body_is_not_found() -> None:
    """The limit is stated in the docstring: better a letter than a hole in anatomy."""
    image, body, _ = radiograph()
    marked = drawn(image, words("PORTABLE", (100, 120), 20) * body, 4095)
    np.testing.assert_array_equal(blanked(marked, "text"), marked)


def test_the_brightest_speck_of_noise_is_no_letter() -> None:
    image = noise((SIDE, SIDE), 10, 1).clip(0)
    image[30, 40] = 500
    assert not text_mask(image[None]).any()


@pytest.mark.parametrize("across", [0, 1, 2])
def test_text_is_found_in_slices_along_any_axis(across) -> None:
    slices = np.stack([ultrasound(seed)[0] for seed in range(3)])
    fan = ultrasound()[1]
    slices[1] = drawn(slices[1], words("SLICE 2", (4, 4)) * ~fan, 255)
    volume = np.moveaxis(slices, 0, across)[None]
    result = np.moveaxis(blank(volume, ["text"], across=across)[0], across, 0)
    np.testing.assert_array_equal(result, np.where(fan, slices, 0))


def test_text_of_a_cine_must_stand_still() -> None:
    frames = np.stack([ultrasound(seed)[0] for seed in range(4)])
    fan = ultrasound()[1]
    still = words("LV", (8, 8)) * ~fan
    marked = np.stack([drawn(frame, still, 255) for frame in frames])
    moving = [words(str(number), (200, 8)) * ~fan for number in range(4)]
    moved = np.stack([drawn(f, c, 255) for f, c in zip(marked, moving, strict=True)])
    result = blank(moved[..., None], ["text"], across=2, frames=True)[..., 0]
    expected = np.stack([drawn(f, c, 255) for f, c in zip(frames, moving, strict=True)])
    np.testing.assert_array_equal(result, expected)


def test_coloured_text_of_a_colour_image_is_blanked_in_its_channels() -> None:
    plain, fan = ultrasound()
    text = words("GAIN 62", (8, 8)) * ~fan
    yellow = [drawn(plain, text, value) for value in (255, 255, 0)]
    result = blank(np.stack(yellow)[..., None], ["text"], across=2)[..., 0]
    np.testing.assert_array_equal(result, np.stack([plain] * 3))


def circle_ct(padding, slices=4, radius=124):
    """Return a body in air, in HU, (1, X, Y, Z), and where the padding is, (X, Y)."""
    volume = noise((SIDE, SIDE, slices), -1000, 12)
    body = np.hypot(X - 128, (Y - 128) * 1.4) < 110
    volume[body] = noise((body.sum(), slices), 40, 12, seed=1)
    outside = radius < FROM_CENTRE
    volume[outside] = padding
    return volume[None], outside


@pytest.mark.parametrize("padding", [-3024, -2000, -1024])
def test_padding_around_a_circular_field_of_view_becomes_air(padding) -> None:
    volume, outside = circle_ct(padding)
    np.testing.assert_array_equal(outside_mask(np.moveaxis(volume[0], 2, 0)), outside)
    result = blank(volume, ["field_of_view"], across=2, air_level=-500)
    np.testing.assert_allclose(result[0, outside], -1000, atol=2)
    np.testing.assert_array_equal(result[0, ~outside], volume[0, ~outside])


def test_padding_beside_the_table_does_not_take_its_value() -> None:
    volume, outside = circle_ct(-2000)
    volume[0, (FROM_CENTRE > 118) & ~outside] = -750  # foam all along the circle
    volume[0, 126:130, 126:130] = 3071  # metal, which stretches the range
    result = blank(volume, ["field_of_view"], across=2, air_level=-500)
    assert -1040 < result[0, outside].min() == result[0, outside].max() < -1000


def test_two_paddings_of_the_same_scan_become_the_same_scan() -> None:
    results = [
        blank(circle_ct(padding)[0], ["field_of_view"], across=2) for padding in (-3024, -2000)
    ]
    np.testing.assert_array_equal(*results)


def test_the_frame_of_a_fan_is_as_dark_as_the_darkest_inside() -> None:
    plain, fan = ultrasound()
    framed = np.where(fan, plain, -7)
    result = blanked(framed, "field_of_view")
    assert set(np.unique(result[~fan])) == {np.percentile(plain[fan], 1)}
    np.testing.assert_array_equal(result[fan], plain[fan])


def test_padding_that_differs_between_slices_is_not_found() -> None:
    volume, outside = circle_ct(-2000)
    volume[0, outside, 2] = -2001
    assert not outside_mask(np.moveaxis(volume[0], 2, 0)).any()


@pytest.mark.parametrize(
    "image",
    [
        noise((SIDE, SIDE), -1000, 12),
        np.full((SIDE, SIDE), 3.0, np.float32),
        np.where((X < 90) & (Y < 90), -2000, noise((SIDE, SIDE))),
        np.where((FROM_CENTRE < 80) & (FROM_CENTRE > 40), -2000, noise((SIDE, SIDE))),
    ],
    ids=["noise alone", "a constant scan", "a single corner", "a ring within"],
)
def test_a_scan_without_padding_is_left_alone(image) -> None:
    np.testing.assert_array_equal(blanked(image.astype(np.float32), "field_of_view"), image)


def test_text_in_padding_is_told_after_the_padding_is_gone() -> None:
    volume, outside = circle_ct(-3024)
    text = words("R", (6, 6), 20) * outside
    for index in range(volume.shape[-1]):
        volume[0, ..., index] = drawn(volume[0, ..., index], text, 3071)
    result = blank(volume, ["text", "field_of_view"], across=2, air_level=-500)
    np.testing.assert_allclose(result[0, outside], -1000, atol=2)


@given(
    seed=st.integers(0, 1000),
    kinds=st.lists(st.sampled_from(["text", "field_of_view"]), unique=True),
    frames=st.booleans(),
)
def test_whatever_the_scan_only_background_and_bright_strokes_change(seed, kinds, frames) -> None:
    generator = np.random.default_rng(seed)
    volume = generator.integers(0, 6, (2, 12, 14, 3)).astype(np.float32)
    before = volume.copy()
    result = blank(volume, kinds, across=2, frames=frames)
    np.testing.assert_array_equal(volume, before)  # never in place
    np.testing.assert_array_equal(result, blank(volume, kinds, across=2, frames=frames))
    assert result.min() >= volume.min()
    assert result.max() <= volume.max()
    if not kinds:
        np.testing.assert_array_equal(result, volume)
