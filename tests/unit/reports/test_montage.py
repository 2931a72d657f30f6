from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medssl.reports.montage import HEIGHT, WIDTH, draw_scan
from samples import rotation_affine

SHAPE = (40, 48, 20)
SPACING_MM = (1.0, 1.0, 3.0)


def picture(*arguments, **options):
    return np.asarray(Image.open(io.BytesIO(draw_scan(*arguments, **options)))).astype(int)


def marked(place, shape=SHAPE):
    """Return a dim block (1, X, Y, Z) with one bright corner or centre."""
    volume = np.full((1, *shape), 20.0, np.float32)
    volume[(0, *(slice(max(0, p - 4), p + 5) for p in place))] = 100.0
    return volume


def centre_of_light(panel):
    rows, columns = np.nonzero(panel.mean(axis=-1) > 128)
    return rows.mean() / panel.shape[0], columns.mean() / panel.shape[1]


def test_the_patients_right_is_on_the_left_and_the_front_is_up():
    right_front = marked((36, 44, 10))
    row, column = centre_of_light(
        picture(right_front, rotation_affine(spacing_mm=SPACING_MM), dims="3D")[:, :HEIGHT]
    )
    assert row < 0.4
    assert column < 0.4


def test_the_head_is_up_and_the_front_is_left_in_the_sagittal_plane():
    volume = marked((20, 44, 18))
    image = picture(volume, rotation_affine(spacing_mm=SPACING_MM), dims="3D")
    row, column = centre_of_light(image[HEIGHT // 2 + 4 :, HEIGHT + 4 :])
    assert row < 0.4
    assert column < 0.5


@given(
    order=st.sampled_from(list(itertools.permutations(range(3)))),
    flips=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_the_picture_does_not_depend_on_the_order_of_voxels_in_the_file(order, flips):
    # Odd sizes: the middle slice is then the same from either end.
    volume = np.random.default_rng(0).normal(100, 20, (1, 15, 13, 11)).astype(np.float32)
    affine = rotation_affine(spacing_mm=SPACING_MM)
    stored = volume.transpose(0, *(axis + 1 for axis in order))
    turned = affine.copy()
    turned[:3, :3] = affine[:3, list(order)]
    for axis, flip in enumerate(flips):
        if flip:
            turned[:3, 3] += turned[:3, axis] * (stored.shape[axis + 1] - 1)
            turned[:3, axis] *= -1
            stored = np.flip(stored, axis + 1)
    assert draw_scan(stored, turned, dims="3D") == draw_scan(volume, affine, dims="3D")


def test_a_ball_is_round_whatever_the_spacing():
    spacing_mm = np.array([0.5, 0.5, 4.0])
    shape = (80, 80, 10)
    middle = (np.array(shape) - 1) / 2
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    distance = np.linalg.norm((index - middle) * spacing_mm, axis=-1)
    volume = np.where(distance < 14, 100.0, 0.0).astype(np.float32)[np.newaxis]
    affine = rotation_affine(spacing_mm=tuple(spacing_mm))
    coronal = picture(volume, affine, dims="3D")[: HEIGHT // 2, HEIGHT + 4 :]
    rows, columns = np.nonzero(coronal.mean(axis=-1) > 128)
    assert np.ptp(rows) / np.ptp(columns) == pytest.approx(1, abs=0.2)


def test_an_image_without_geometry_is_shown_as_it_is_stored():
    image = np.full((1, 60, 40, 1), 20.0, np.float32)[..., 0]
    image[0, :10, :10] = 100.0  # first columns, first rows
    row, column = centre_of_light(picture(image, np.eye(4), dims="2D", as_stored=True))
    assert row < 0.3
    assert column < 0.4


def test_colour_stays():
    image = np.zeros((3, 30, 30), np.float32)
    image[0], image[1, :5] = 200.0, 255.0
    drawn = picture(image, np.eye(4), dims="2D", colour=True, as_stored=True)
    red, green, blue = drawn[HEIGHT // 2, WIDTH // 2]
    assert red > 150
    assert max(green, blue) < 60


def test_of_several_channels_that_are_not_colours_the_first_is_shown():
    image = np.zeros((3, 30, 30), np.float32)
    image[0, :15] = 100.0
    alone = draw_scan(image[:1], np.eye(4), dims="2D", as_stored=True)
    assert draw_scan(image, np.eye(4), dims="2D", as_stored=True) == alone


def test_a_cine_shows_its_middle_first_and_last_frame():
    frames = np.zeros((1, 30, 30, 9), np.float32)
    frames[..., 0], frames[..., 4], frames[..., 8] = 50.0, 100.0, 10.0
    drawn = picture(frames, np.eye(4), dims="2D+t", as_stored=True).mean(axis=-1)
    middle, first, last = drawn[160, 160], drawn[80, 404], drawn[240, 404]
    assert middle > first > last


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5000, 3), (1, 3, 5000), (1, 2, 2)])
def test_images_of_any_proportion_fit(shape):
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    drawn = picture(image, np.eye(4), dims="2D", as_stored=True)
    assert drawn.shape == (HEIGHT, WIDTH, 3)


def test_padding_below_air_does_not_take_the_grey_values():
    image = np.full((1, 60, 60), -3024.0, np.float32)
    image[0, 10:50, 10:50] = -100.0
    image[0, 20:40, 20:40] = 100.0
    drawn = picture(image, np.eye(4), dims="2D", hounsfield=True, as_stored=True).mean(axis=-1)
    soft, fat = drawn[HEIGHT // 2, WIDTH // 2], drawn[HEIGHT // 4, WIDTH // 2]
    assert soft > 200
    assert fat < 50


def test_voxels_that_are_not_finite_are_drawn_dark():
    image = np.full((1, 30, 30), np.nan, np.float32)
    assert picture(image, np.eye(4), dims="2D", as_stored=True).max() < 20
