"""Rotation: the turns are the proper rotations, and applying one is exact."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medssl.config import validate_config
from medssl.errors import ConfigError
from medssl.pretext.rotation import Config, Rotation, rotate, rotation_matrices
from medssl.transforms.sampling import SampleRequest

TURNS = [(2, "in_plane", 4), (3, "in_plane", 4), (3, "axes", 10), (3, "cube", 24)]
every_set = pytest.mark.parametrize(("dims", "turns", "count"), TURNS)


def numbered(dims: int, side: int, count: int = 1, channels: int = 1) -> Tensor:
    """Return images in which no two voxels are equal."""
    shape = (count, channels, *[side] * dims)
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def as_set(batch: Tensor) -> set[tuple[int, ...]]:
    """Return the members of a batch as a set, in which order does not matter."""
    return {tuple(member.flatten().tolist()) for member in batch}


@st.composite
def numbers_of_views(draw: st.DrawFn) -> tuple[int, str, int, int]:
    dims, turns, count = draw(st.sampled_from(TURNS))
    return dims, turns, count, draw(st.integers(1, count))


@every_set
def test_the_turns_are_different_signed_permutations_of_determinant_one(dims, turns, count):
    matrices = rotation_matrices(dims, turns)
    assert matrices.shape == (count, dims, dims)
    assert len(as_set(matrices)) == count
    assert set(matrices.unique().tolist()) == {-1, 0, 1}
    for axis in (1, 2):
        assert (matrices.abs().sum(axis) == 1).all()
    assert torch.allclose(torch.det(matrices.double()), torch.ones(count, dtype=torch.float64))


@every_set
def test_the_first_turn_leaves_everything_as_it_is(dims, turns, count):
    assert torch.equal(rotation_matrices(dims, turns)[0], torch.eye(dims, dtype=torch.long))


@pytest.mark.parametrize(("dims", "turns"), [(2, "in_plane"), (3, "in_plane"), (3, "cube")])
def test_two_turns_after_each_other_are_a_turn_of_the_set(dims, turns):
    matrices = rotation_matrices(dims, turns)
    found = as_set(matrices)
    assert all(as_set((a @ b)[None]) <= found for a, b in product(matrices, repeat=2))


@every_set
def test_the_inverse_of_a_turn_is_in_the_set(dims, turns, count):
    matrices = rotation_matrices(dims, turns)
    assert as_set(matrices.transpose(1, 2)) == as_set(matrices)


def test_turns_about_the_axes_are_those_of_the_cube_that_keep_an_axis():
    cube = rotation_matrices(3, "cube")
    about = torch.stack([matrix for matrix in cube if (matrix.diagonal() == 1).any()])
    assert as_set(rotation_matrices(3, "axes")) == as_set(about)


def test_in_plane_turns_of_a_volume_keep_z():
    matrices = rotation_matrices(3, "in_plane")
    image = numbered(3, 3, 4)
    turned = rotate(image, matrices)
    assert (matrices[:, 2, 2] == 1).all()
    for before, after in zip(image, turned, strict=True):
        for z in range(3):
            assert set(after[..., z].flatten().tolist()) == set(before[..., z].flatten().tolist())


@given(side=st.integers(1, 6), label=st.integers(0, 3), channels=st.integers(1, 2))
def test_a_turn_of_a_slice_is_what_torch_rot90_does(side, label, channels):
    image = numbered(2, side, channels=channels)
    turned = rotate(image, rotation_matrices(2, "in_plane")[[label]])
    assert torch.equal(turned, torch.rot90(image, label, dims=(2, 3)))


@given(side=st.integers(1, 5))
def test_in_plane_turns_of_a_volume_are_what_torch_rot90_does(side):
    image = numbered(3, side)
    turned = rotate(image.expand(4, -1, -1, -1, -1), rotation_matrices(3, "in_plane"))
    wanted = torch.cat([torch.rot90(image, times, dims=(2, 3)) for times in range(4)])
    assert as_set(turned) == as_set(wanted)


@given(case=st.sampled_from(TURNS), side=st.integers(1, 5), data=st.data())
def test_a_rotation_is_undone_by_the_inverse_of_its_label(case, side, data):
    dims, turns, count = case
    matrix = rotation_matrices(dims, turns)[[data.draw(st.integers(0, count - 1))]]
    image = numbered(dims, side)
    assert torch.equal(rotate(rotate(image, matrix), matrix.transpose(1, 2)), image)


@given(side=st.integers(1, 5), first=st.integers(0, 23), second=st.integers(0, 23))
def test_turning_twice_is_turning_by_the_product(side, first, second):
    cube, image = rotation_matrices(3, "cube"), numbered(3, side)
    twice = rotate(rotate(image, cube[[first]]), cube[[second]])
    assert torch.equal(twice, rotate(image, (cube[second] @ cube[first])[None]))


def test_each_turn_gives_another_image():
    turned = rotate(numbered(3, 3).expand(24, -1, -1, -1, -1), rotation_matrices(3, "cube"))
    assert len(as_set(turned)) == 24


def test_each_image_is_turned_by_its_own_matrix():
    images, matrices = numbered(2, 3, count=4), rotation_matrices(2, "in_plane")
    together = rotate(images, matrices)
    alone = [rotate(images[[i]], matrices[[i]]) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))


@given(case=numbers_of_views(), num_images=st.integers(1, 9), seed=st.integers(0, 99))
def test_an_image_gets_different_turns_and_every_turn_comes_up_equally_often(
    case, num_images, seed
):
    dims, turns, count, views = case
    task = Rotation(Config(turns=turns, views=views), dims)
    generator = torch.Generator().manual_seed(seed)
    batch = task.make_batch(numbered(dims, 2, num_images), generator)
    assert len(batch.target) == len(batch.inputs) == num_images * views
    for labels in batch.target.reshape(num_images, views).tolist():
        assert len(set(labels)) == views
    frequency = torch.bincount(batch.target, minlength=count)
    assert frequency.max() - frequency.min() <= 1


@every_set
def test_the_label_says_which_turn_was_applied(dims, turns, count):
    task = Rotation(Config(turns=turns, views=2), dims)
    images = numbered(dims, 3, 3)
    batch = task.make_batch(images, torch.Generator().manual_seed(0))
    wanted = rotate(images.repeat_interleave(2, dim=0), task.matrices[batch.target])
    assert torch.equal(batch.inputs, wanted)


@pytest.mark.parametrize(("dims", "turns", "views"), [(2, "in_plane", 4), (3, "cube", 2)])
def test_by_default_slices_get_all_turns_and_volumes_two_of_the_cube(dims, turns, views):
    task = Rotation(Config(), dims)
    assert (task.turns, task.views) == (turns, views)


@pytest.mark.parametrize(
    ("dims", "crop_size"), [(2, (32, 24)), (3, (16, 16, 12)), (3, (12, 16, 16))]
)
def test_a_crop_with_unequal_sides_is_refused(dims, crop_size):
    base = SampleRequest(dims, crop_size, "axial" if dims == 2 else None)
    with pytest.raises(ConfigError) as refused:
        Rotation(Config(), dims).request(base)
    sides = "equal sides along X and Y" if dims == 2 else "equal sides"
    assert str(refused.value) == (
        f"sampling.crop_size: rotation needs {sides}, found {list(crop_size)}."
    )


def test_turns_in_the_plane_ask_for_squares_of_any_depth_alone():
    request = Rotation(Config(turns="in_plane"), 3).request(SampleRequest(3, (16, 16, 5)))
    assert request.isotropic == "in_plane"
    assert request.crop_size == (16, 16, 5)


def test_a_volume_of_another_depth_is_turned_in_its_plane():
    image = torch.arange(5.0 * 5 * 3).reshape(1, 1, 5, 5, 3)
    turned = rotate(image, rotation_matrices(3, "in_plane")[[1]])
    turns = [torch.rot90(image, k, (2, 3)) for k in (1, 3)]
    assert any(torch.equal(turned, expected) for expected in turns)


def test_rotation_asks_for_isotropic_voxels_inside_the_scan():
    request = Rotation(Config(), 3).request(SampleRequest(3, (16, 16, 16)))
    assert request.isotropic == "all"
    assert not request.allow_padding


@pytest.mark.parametrize("turns", ["axes", "cube"])
def test_turns_out_of_the_plane_are_refused_for_slices(turns):
    with pytest.raises(ConfigError) as refused:
        Rotation(Config(turns=turns), 2)
    assert str(refused.value) == f"pretext.turns: {turns} needs 3D crops; in 2D choose in_plane."


@pytest.mark.parametrize("views", [-1, 0, 11])
def test_more_views_than_turns_or_none_are_refused(views):
    with pytest.raises(ConfigError) as refused:
        Rotation(Config(turns="axes", views=views), 3)
    assert str(refused.value) == (
        f"pretext.views: {views} rotations of an image asked for; axes has 10. "
        "Choose 1 to 10, or all."
    )


def test_an_unknown_set_of_turns_is_refused_by_the_config():
    with pytest.raises(ConfigError, match=r"turns: input should be 'in_plane', 'axes' or 'cube'"):
        validate_config({"name": "rotation", "turns": "spin"}, Config)


def test_turns_are_named_by_degrees_in_2d_and_by_their_axes_in_3d():
    assert list(Rotation(Config(), 2).class_names()) == ["0°", "90°", "180°", "270°"]
    names = list(Rotation(Config(), 3).class_names())
    assert names[0] == "+X+Y+Z"
    assert len(set(names)) == 24


def test_degrees_are_counted_from_the_first_axis_to_the_second():
    image = numbered(2, 3)
    turned = rotate(image, rotation_matrices(2, "in_plane")[[1]])
    assert torch.equal(turned, torch.rot90(image, 1, (2, 3)))
