"""Enhanced multi-frame files: stacks of frames, each with its place and rescaling."""

from __future__ import annotations

import json

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from medssl.scans.formats.base import GroupingConfig
from medssl.scans.formats.dicom import DicomFormat
from medssl.scans.geometry import RAS_FROM_LPS
from medssl.scans.identity import Salt
from samples import OBLIQUE, linear_values, linear_volume, rotation_affine, write_dicom_series

SALT = Salt(bytes(32))
DICOM = DicomFormat()
SHAPE = (8, 7, 6)
SOP = {"CT": "2.1", "MR": "4.1", "PT": "130"}


def item(**values):
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def rounded(values):
    return [f"{value:.10f}"[:16] for value in values]


def frame(affine, index, rescale=(1.0, 0.0), **groups):
    """The functional groups of one slice of a volume."""
    lps = RAS_FROM_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    slope, intercept = rescale
    return item(
        PlanePositionSequence=[item(ImagePositionPatient=rounded(lps[:3, 3] + index * lps[:3, 2]))],
        PlaneOrientationSequence=[
            item(ImageOrientationPatient=rounded((lps[:3, :2] / spacing[:2]).T.ravel()))
        ],
        PixelMeasuresSequence=[item(PixelSpacing=rounded(spacing[[1, 0]]), SliceThickness=1)],
        PixelValueTransformationSequence=[
            item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU")
        ],
        **groups,
    )


def write_frames(folder, frames, modality="MR", seed=0, **values):
    """Write (functional groups, stored (X, Y)) pairs as one file, in random order."""
    (path,) = write_dicom_series(linear_volume((*SHAPE[:2], 1)), np.eye(4), folder,
                                 modality=modality)  # fmt: skip
    dataset = pydicom.dcmread(path)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        del dataset[keyword]
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1." + SOP[modality]
    order = np.random.default_rng(seed).permutation(len(frames))
    dataset.SharedFunctionalGroupsSequence = [Dataset()]
    dataset.PerFrameFunctionalGroupsSequence = [frames[index][0] for index in order]
    dataset.NumberOfFrames = len(frames)
    stored = np.stack([frames[index][1].T for index in order]).astype(np.int16)
    dataset.PixelData = stored.tobytes()
    dataset.Rows, dataset.Columns = stored.shape[1:]
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path)
    return path


def stack(affine=OBLIQUE, scale=1, slices=range(6), **groups):
    volume = linear_volume(SHAPE, affine)
    return [(frame(affine, index, **groups), scale * volume[:, :, index]) for index in slices]


def groups_of(path, **config):
    header = DICOM.read_header(path, path.name, SALT)
    assert header.reason == ""
    return DICOM.group([header], GroupingConfig(**config))


def is_linear(volume, scale=1.0):
    wanted = scale * linear_values(volume.affine, volume.voxels_CXYZ.shape[1:])
    return np.abs(volume.voxels_CXYZ[0] - wanted).max() <= 0.51 * scale + 0.1


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_frames_in_any_order_become_the_volume_they_are(tmp_path, modality):
    path = write_frames(tmp_path, stack(), modality)
    (group,) = groups_of(path)
    read = DICOM.read_voxels([path], group.reading)
    assert (group.reason, group.shape, group.dims) == ("", SHAPE, "3D")
    assert group.intensity == ("HU" if modality == "CT" else "arbitrary")
    np.testing.assert_allclose(read.affine, group.affine)
    assert is_linear(read)


def test_volume_of_frames_equals_that_of_highdicom(tmp_path):
    values = {"PositionReferenceIndicator": "", "DimensionOrganizationType": "3D",
              "VolumetricProperties": "VOLUME"}  # fmt: skip
    path = write_frames(tmp_path, stack(), "CT", **values)
    (group,) = groups_of(path)
    read = DICOM.read_voxels([path], group.reading)
    theirs = hd.imread(path).get_volume(dtype=np.float64, apply_real_world_transform=False)
    back = np.linalg.inv(RAS_FROM_LPS @ theirs.affine)
    for index in np.ndindex(*SHAPE):
        place = back @ read.affine @ np.array([*index, 1.0])
        at = tuple(np.rint(place[:3]).astype(int))
        assert read.voxels_CXYZ[(0, *index)] == theirs.array[at]


def test_each_frame_has_its_own_rescaling(tmp_path):
    frames = [
        (frame(np.eye(4), index, rescale=(index + 1.0, 10.0 * index)), np.full((8, 7), 100))
        for index in range(4)
    ]
    path = write_frames(tmp_path, frames, "PT")
    (group,) = groups_of(path)
    read = DICOM.read_voxels([path], group.reading)
    assert read.voxels_CXYZ[0, 0, 0].tolist() == [100, 210, 320, 430]


def content(**values):
    return {"FrameContentSequence": [item(**values)]}


def diffusion(b_value, direction=None):
    said = item(DiffusionBValue=float(b_value))
    if direction is not None:
        said.DiffusionGradientDirectionSequence = [item(DiffusionGradientOrientation=direction)]
    return {"MRDiffusionSequence": [said]}


def frame_type(*words):
    return {"MRImageFrameTypeSequence": [item(FrameType=list(words))]}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (content(TemporalPositionIndex=1), content(TemporalPositionIndex=2)),
        (content(StackID="1"), content(StackID="2")),
        ({"MREchoSequence": [item(EffectiveEchoTime=3.5)]},
         {"MREchoSequence": [item(EffectiveEchoTime=9.0)]}),
        (diffusion(0), diffusion(1000)),
        (diffusion(1000, [1.0, 0.0, 0.0]), diffusion(1000, [0.0, 1.0, 0.0])),
        (frame_type("ORIGINAL", "PRIMARY", "M"), frame_type("ORIGINAL", "PRIMARY", "P")),
    ],
)  # fmt: skip
def test_frames_are_set_apart_by_what_distinguishes_them(tmp_path, one, other):
    path = write_frames(tmp_path, [*stack(**one), *stack(scale=2, **other)])
    groups = groups_of(path)
    reads = [DICOM.read_voxels([path], group.reading) for group in groups]
    assert len({group.identity for group in groups}) == 2
    assert sorted((is_linear(read), is_linear(read, 2.0)) for read in reads) == [
        (False, True),
        (True, False),
    ]


def test_stacks_of_two_orientations_become_two_scans(tmp_path):
    other = rotation_affine((90, 0, 0), (0.8, 0.8, 3.0))
    path = write_frames(tmp_path, [*stack(), *stack(other)])
    groups = groups_of(path)
    assert [group.shape for group in groups] == [SHAPE, SHAPE]
    assert all(is_linear(DICOM.read_voxels([path], group.reading)) for group in groups)


def write_tilting(folder):
    """Frames in reverse, whose directions differ by what a scanner's rounding makes of them."""
    frames = stack()
    base = np.array(frames[0][0].PlaneOrientationSequence[0].ImageOrientationPatient, float)
    normal = np.cross(base[:3], base[3:])
    for number, (groups, _) in enumerate(frames):
        row = base[:3] + 8e-4 * (number / 5 - 0.5) * normal
        plane = groups.PlaneOrientationSequence[0]
        plane.ImageOrientationPatient = rounded([*row, *base[3:]])
    path = write_frames(folder, frames[::-1])
    return path, RAS_FROM_LPS[:3, :3] @ rounded_plane(frames[0][0])[:3]


def rounded_plane(groups):
    return np.array(groups.PlaneOrientationSequence[0].ImageOrientationPatient, float)


def test_volume_of_frames_gets_the_plane_of_its_first_slice_when_grouped_and_read(tmp_path):
    path, row = write_tilting(tmp_path)
    (group,) = groups_of(path)
    read = DICOM.read_voxels([path], group.reading)
    np.testing.assert_array_equal(group.affine, read.affine)
    np.testing.assert_allclose(read.affine[:3, 0] / np.linalg.norm(read.affine[:3, 0]), row)


def test_pixel_sizes_that_differ_by_rounding_are_one_stack(tmp_path):
    frames = stack()
    for number, (groups, _) in enumerate(frames):
        groups.PixelMeasuresSequence[0].PixelSpacing = [0.99949 + 2e-5 * (number % 2), 1.0]
    assert len(groups_of(write_frames(tmp_path, frames))) == 1


def test_what_sets_a_lone_frame_apart_is_kept_as_a_key(tmp_path):
    path = write_frames(tmp_path, stack(slices=[0], **content(StackID="DOE^JANE")))
    assert "DOE" not in repr(DICOM.read_header(path, "x.dcm", SALT))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"ConcatenationUID": "1.2.3", "InConcatenationTotalNumber": 2}, "multi_frame_unsupported"),
        ({"ConcatenationUID": "1.2.3"}, "multi_frame_unsupported"),
        ({"InConcatenationTotalNumber": 3}, "multi_frame_unsupported"),
        ({"ConcatenationUID": "1.2.3", "InConcatenationTotalNumber": 1}, ""),
    ],
)
def test_part_of_a_concatenation_is_no_volume(tmp_path, values, reason):
    path = write_frames(tmp_path, stack(), **values)
    assert DICOM.read_header(path, "x.dcm", SALT).reason == reason


def test_derived_frames_are_rejected_beside_the_originals(tmp_path):
    derived = frame_type("DERIVED", "PRIMARY", "DIFFUSION", "ADC")
    path = write_frames(tmp_path, [*stack(), *stack(scale=2, **derived)])
    assert sorted(group.reason for group in groups_of(path)) == ["", "derived"]


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        (stack(slices=(0, 1, 2, 4, 5)), "missing_slice"),
        ([*stack(), *stack(slices=[2], scale=3)], "duplicate_position"),
        ([*stack(slices=(0, 1, 3, 4)), (frame(OBLIQUE, 2.3), np.ones(SHAPE[:2]))],
         "irregular_spacing"),
    ],
)  # fmt: skip
def test_frames_that_are_no_even_stack_get_the_reason_of_a_series(tmp_path, frames, reason):
    assert [group.reason for group in groups_of(write_frames(tmp_path, frames))] == [reason]


def test_gap_between_frames_is_filled_when_asked(tmp_path):
    path = write_frames(tmp_path, stack(slices=(0, 1, 2, 4, 5)))
    (group,) = groups_of(path, irregular_spacing="resample")
    read = DICOM.read_voxels([path], group.reading)
    assert group.flags == ("missing_slice_resampled",)
    assert read.voxels_CXYZ[0].shape == group.shape == SHAPE
    assert is_linear(read)


def test_files_of_one_frame_each_make_one_volume(tmp_path):
    headers = []
    for index, one in enumerate(stack()):
        path = write_frames(tmp_path / str(index), [one], SOPInstanceUID=f"1.2.{index}")
        headers.append(DICOM.read_header(path, f"{index}/{path.name}", SALT))
    (group,) = DICOM.group(headers, GroupingConfig())
    read = DICOM.read_voxels([tmp_path / header.path for header in group.headers], group.reading)
    assert is_linear(read)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"NumberOfFrames": 7}, "unreadable"),
        ({"NumberOfFrames": 2**20}, "too_large"),
        ({"PerFrameFunctionalGroupsSequence": [Dataset() for _ in range(6)]}, "no_orientation"),
        ({"PixelData": bytes(100)}, "truncated_pixels"),
        ({"ImageType": ["DERIVED", "PRIMARY", "PERFUSION", "NONE"]}, "derived"),
    ],
)
def test_unusable_file_of_frames_gets_its_reason(tmp_path, values, reason):
    path = write_frames(tmp_path, stack(), **values)
    assert DICOM.read_header(path, "x.dcm", SALT).reason == reason


def test_header_of_frames_can_be_written_as_json(tmp_path):
    header = DICOM.read_header(write_frames(tmp_path, stack()), "x.dcm", SALT)
    assert json.loads(json.dumps(header.facts)) == header.facts
