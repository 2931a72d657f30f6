"""What the axes and voxel types of a NIfTI file become."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from medssl.errors import RejectedScan
from medssl.scans.formats.base import GroupingConfig
from medssl.scans.formats.nifti import NiftiFormat
from medssl.scans.identity import Salt
from samples import OBLIQUE, linear_values, linear_volume, write_nifti

SALT = Salt(bytes(32))
NIFTI = NiftiFormat()
RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
RGBA = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1"), ("A", "u1")])


def read(path):
    """Return the group and the voxels of a file, and check that they tell the same."""
    (group,) = NIFTI.group([NIFTI.read_header(path, path.name, SALT)], GroupingConfig())
    volume = NIFTI.read_voxels([path], group.reading)
    assert volume.voxels_CXYZ.shape == (group.num_channels, *group.shape)
    assert volume.voxels_CXYZ.dtype == np.float32
    np.testing.assert_array_equal(volume.affine, group.affine)
    return group, volume.voxels_CXYZ


def reason_of(path):
    try:
        return NIFTI.read_header(path, path.name, SALT).reason
    except RejectedScan as error:
        return error.reason


def stacked(*shape):
    """Return a linear volume with more axes, along which every volume is one larger."""
    volume = linear_volume(shape[:3], OBLIQUE)
    steps = np.arange(int(np.prod(shape[3:])), dtype=np.int16).reshape(shape[3:], order="F")
    return volume.reshape(*shape[:3], *[1] * (len(shape) - 3)) + steps


def write(path, voxels, *, time=False, maker=nib.Nifti1Image):
    image = maker(voxels, OBLIQUE)
    if time:
        image.header.set_xyzt_units("mm", "sec")
        image.header["pixdim"][4] = 2.5
    image.to_filename(path)
    return path


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("maker", [nib.Nifti1Image, nib.Nifti2Image])
def test_time_points_are_channels_of_a_volume(tmp_path, maker, zipped):
    voxels = stacked(6, 5, 4, 3)
    path = write(tmp_path / ("a.nii" + ".gz" * zipped), voxels, time=True, maker=maker)
    group, x_CXYZ = read(path)
    assert (group.dims, group.shape, group.num_channels) == ("3D", (6, 5, 4), 3)
    assert group.flags == ("fourth_axis_time",)
    np.testing.assert_array_equal(x_CXYZ, np.moveaxis(voxels, -1, 0))


def test_fourth_axis_without_time_is_channels(tmp_path):
    group, _ = read(write(tmp_path / "a.nii", stacked(6, 5, 4, 3)))
    assert group.flags == ("fourth_axis_channels",)


@pytest.mark.parametrize("step", [0.0, -1.0, np.nan])
def test_time_without_a_step_is_channels(tmp_path, step):
    image = nib.Nifti1Image(stacked(6, 5, 4, 3), OBLIQUE)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = step
    image.to_filename(tmp_path / "a.nii")
    assert read(tmp_path / "a.nii")[0].flags == ("fourth_axis_channels",)


def test_fifth_axis_is_channels(tmp_path):
    voxels = stacked(6, 5, 4, 1, 3)
    group, x_CXYZ = read(write(tmp_path / "a.nii", voxels, time=True))
    assert (group.dims, group.shape, group.num_channels) == ("3D", (6, 5, 4), 3)
    assert group.flags == ("fourth_axis_channels",)
    np.testing.assert_array_equal(x_CXYZ, np.moveaxis(voxels[..., 0, :], -1, 0))


def test_channels_of_simpleitk_come_out_in_their_order(tmp_path):
    values_ZYXC = np.arange(4 * 5 * 6 * 3, dtype=np.int16).reshape(4, 5, 6, 3)
    sitk.WriteImage(sitk.GetImageFromArray(values_ZYXC, isVector=True), tmp_path / "a.nii.gz")
    _, x_CXYZ = read(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(x_CXYZ, np.transpose(values_ZYXC, (3, 2, 1, 0)))


def test_frames_of_one_slice_are_a_cine(tmp_path):
    voxels = stacked(6, 5, 1, 7)
    group, x_CXYT = read(write(tmp_path / "a.nii", voxels, time=True))
    assert (group.dims, group.shape, group.num_channels) == ("2D+t", (6, 5, 7), 1)
    assert group.flags == ("fourth_axis_time",)
    np.testing.assert_array_equal(x_CXYT[0], voxels[:, :, 0])


def test_frames_that_do_not_say_what_they_are_are_taken_for_time(tmp_path):
    group, _ = read(write(tmp_path / "a.nii", stacked(6, 5, 1, 7)))
    assert (group.dims, group.flags) == ("2D+t", ("fourth_axis_assumed_time",))


def test_cine_may_have_channels(tmp_path):
    voxels = stacked(6, 5, 1, 7, 2)
    group, x_CXYT = read(write(tmp_path / "a.nii", voxels, time=True))
    assert (group.dims, group.shape, group.num_channels) == ("2D+t", (6, 5, 7), 2)
    np.testing.assert_array_equal(x_CXYT, np.moveaxis(voxels[:, :, 0], -1, 0))


def test_channels_of_one_slice_are_a_2d_scan(tmp_path):
    voxels = stacked(6, 5, 1, 1, 3)
    group, x_CXY = read(write(tmp_path / "a.nii", voxels))
    assert (group.dims, group.shape, group.num_channels) == ("2D", (6, 5), 3)
    np.testing.assert_array_equal(x_CXY, np.moveaxis(voxels[:, :, 0, 0], -1, 0))


@pytest.mark.parametrize(
    "shape", [(4, 4, 4, 2, 2), (4, 4, 4, 1, 1, 2), (4, 4, 1, 1, 1, 1, 2), (1, 1, 1, 1, 5, 9)]
)
def test_more_axes_than_a_volume_and_its_channels_are_rejected(tmp_path, shape):
    voxels = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    assert reason_of(write(tmp_path / "a.nii", voxels)) == "unsupported_dimensions"


@pytest.mark.parametrize(
    ("kind", "flags"), [(RGB, ["colour"]), (RGBA, ["alpha_dropped", "colour"])]
)
@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5), (6, 5, 1, 7)])
def test_colours_are_three_channels(tmp_path, shape, kind, flags):
    voxels = np.zeros(shape, kind)
    random = np.random.default_rng(0)
    for name in kind.names:
        voxels[name] = random.integers(0, 256, shape)
    group, x_CXYZ = read(write_nifti(tmp_path / "a.nii.gz", voxels, OBLIQUE))
    assert group.num_channels == 3
    assert [flag for flag in group.flags if "fourth" not in flag] == flags
    np.testing.assert_array_equal(x_CXYZ, np.stack([voxels[c].squeeze() for c in "RGB"]))


def test_several_volumes_in_colour_are_rejected(tmp_path):
    voxels = np.zeros((4, 4, 4, 2), RGB)
    voxels["R"] = np.arange(128).reshape(4, 4, 4, 2)
    assert reason_of(write_nifti(tmp_path / "a.nii", voxels)) == "unsupported_dimensions"


@pytest.mark.parametrize("kind", [np.complex64, np.complex128])
def test_complex_voxels_are_rejected(tmp_path, kind):
    path = write_nifti(tmp_path / "a.nii", linear_volume().astype(kind))
    assert reason_of(path) == "complex_unsupported"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("maker", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_all_voxel_types_are_read_in_either_byte_order(tmp_path, kind, maker, zipped, order):
    affine = np.eye(4)
    voxels = linear_volume((5, 4, 3), affine).astype(kind)
    if kind not in ("u1", "i1"):
        voxels = voxels * 3
    if kind[0] == "i" or kind[0] == "f":
        voxels = voxels - voxels.dtype.type(40)
    header = {nib.Nifti1Image: nib.Nifti1Header, nib.Nifti2Image: nib.Nifti2Header}[maker](
        endianness=order
    )
    header.set_data_dtype(kind)
    path = tmp_path / ("a.nii" + ".gz" * zipped)
    maker(voxels, affine, header).to_filename(path)
    assert nib.load(path).header.endianness == order
    np.testing.assert_array_equal(read(path)[1][0], voxels.astype(np.float32))


def test_128_bit_floats_are_rejected_with_the_remedy(tmp_path):
    path = write_nifti(tmp_path / "a.nii", linear_volume().astype(np.float64))
    content = bytearray(path.read_bytes())
    content[70:74] = np.array([1536, 128], "<i2").tobytes()
    path.write_bytes(content)
    with pytest.raises(RejectedScan, match="128-bit floats have no portable form; save as float32"):
        NIFTI.read_header(path, path.name, SALT)


@pytest.mark.parametrize(("code", "bits"), [(1, 1), (777, 16), (4, 8), (16, 64)])
def test_type_that_contradicts_its_size_is_unreadable(tmp_path, code, bits):
    path = write_nifti(tmp_path / "a.nii", linear_volume())
    content = bytearray(path.read_bytes())
    content[70:74] = np.array([code, bits], "<i2").tobytes()
    path.write_bytes(content)
    assert reason_of(path) == "unreadable"


def with_scaling(path, slope, intercept):
    write_nifti(path, linear_volume())
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([slope, intercept], "<f4").tobytes()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("intercept", [0.0, 100.0, np.nan])
def test_slope_of_zero_means_values_as_they_are(tmp_path, intercept):
    path = with_scaling(tmp_path / "a.nii", 0.0, intercept)
    np.testing.assert_array_equal(read(path)[1][0], linear_volume())


@pytest.mark.parametrize(
    ("slope", "intercept"), [(np.nan, 0.0), (np.inf, 0.0), (-np.inf, 1.0), (1.0, np.nan)]
)
def test_scaling_that_is_not_finite_is_rejected(tmp_path, slope, intercept):
    assert reason_of(with_scaling(tmp_path / "a.nii", slope, intercept)) == "nonfinite_geometry"


def test_negative_slope_is_applied(tmp_path):
    path = with_scaling(tmp_path / "a.nii", -2.0, 5.0)
    np.testing.assert_array_equal(read(path)[1][0], linear_volume() * -2.0 + 5)


def test_values_beyond_float32_are_not_finite(tmp_path):
    path = write_nifti(tmp_path / "a.nii", np.full((4, 4, 4), 1e300) * np.arange(4))
    assert reason_of(path) == "nan_voxels"


@pytest.mark.parametrize(("kind", "flags"), [("i4", ["beyond_float32"]), ("f8", [])])
def test_whole_numbers_beyond_float32_are_flagged(tmp_path, kind, flags):
    voxels = linear_volume().astype(kind) + 2**25
    header = NIFTI.read_header(write_nifti(tmp_path / "a.nii", voxels), "a.nii", SALT)
    assert header.facts["flags"] == flags


@pytest.mark.parametrize("code", [1006, 1008, 3, 24])
def test_what_is_computed_from_images_is_derived(tmp_path, code):
    path = write_nifti(tmp_path / "a.nii", linear_volume())
    content = bytearray(path.read_bytes())
    content[68:70] = np.int16(code).tobytes()
    path.write_bytes(content)
    assert reason_of(path) == "derived"


def test_large_volume_is_read_piece_by_piece_like_nibabel(tmp_path):
    voxels = np.random.default_rng(0).integers(-999, 999, (130, 120, 90), np.int16)
    image = nib.Nifti1Image(voxels, OBLIQUE)
    image.header.set_slope_inter(0.25, -3)
    image.to_filename(tmp_path / "a.nii.gz")
    _, x_CXYZ = read(tmp_path / "a.nii.gz")
    expected = nib.load(tmp_path / "a.nii.gz").get_fdata(dtype=np.float32)
    np.testing.assert_array_equal(x_CXYZ[0], expected)


def test_place_and_values_agree_with_simpleitk(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", linear_values(OBLIQUE, (6, 5, 4)), OBLIQUE)
    other = sitk.ReadImage(path)
    group, x_CXYZ = read(path)
    np.testing.assert_allclose(
        x_CXYZ[0], sitk.GetArrayFromImage(other).transpose(2, 1, 0), rtol=1e-6
    )
    corner = other.TransformIndexToPhysicalPoint((5, 4, 3))
    np.testing.assert_allclose((group.affine @ [5, 4, 3, 1])[:3] * [-1, -1, 1], corner, atol=1e-3)
