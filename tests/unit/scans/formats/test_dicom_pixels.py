"""Pixels of every kind: colour, tables, odd bits, cines; and what the index is told about them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from medssl.errors import RejectedScan
from medssl.scans.formats.base import GroupingConfig
from medssl.scans.formats.dicom import DicomFormat
from medssl.scans.identity import Salt
from samples import linear_volume, write_dicom_series

SALT = Salt(bytes(32))
DICOM = DicomFormat()
SOP = "1.2.840.10008.5.1.4.1.1."


def write_image(folder, pixels, modality="DX", **values):
    """Write one file of the given stored pixels, (rows, columns), (…, 3) or (frames, …)."""
    (path,) = write_dicom_series(linear_volume((4, 3, 1)), np.eye(4), folder, modality="DX")
    dataset = pydicom.dcmread(path)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient"):
        del dataset[keyword]
    dataset.Modality = modality
    dataset.SamplesPerPixel = 3 if pixels.ndim > 2 and pixels.shape[-1] == 3 else 1
    if dataset.SamplesPerPixel == 3:
        dataset.PhotometricInterpretation, dataset.PlanarConfiguration = "RGB", 0
    sizes = pixels.shape[: pixels.ndim - (dataset.SamplesPerPixel == 3)]
    dataset.Rows, dataset.Columns = sizes[-2:]
    if len(sizes) == 3:
        dataset.NumberOfFrames = sizes[0]
    bits = 8 * pixels.dtype.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    if pixels.dtype.kind == "f":
        name = "FloatPixelData" if bits == 32 else "DoubleFloatPixelData"
        setattr(dataset, name, pixels.tobytes())
        for keyword in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
            del dataset[keyword]
    else:
        dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    for keyword, value in values.items():
        if value is None:
            del dataset[keyword]
        elif keyword.endswith("Descriptor"):  # pydicom cannot tell US from SS
            dataset.add_new(keyword, "US", value)
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(path)
    return path


def read(path):
    header = DICOM.read_header(path, path.name, SALT)
    assert header.reason == ""
    (group,) = DICOM.group([header], GroupingConfig())
    assert group.reason == ""
    volume = DICOM.read_voxels([path], group.reading)
    assert volume.voxels_CXYZ.shape == (group.num_channels, *group.shape)
    assert volume.voxels_CXYZ.dtype == np.float32
    return group, volume


def header_of(path):
    return DICOM.read_header(path, path.name, SALT)


RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 200, (5, 4), np.uint8)
RGB = RNG.integers(0, 255, (5, 4, 3), np.uint8)


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4"])
def test_whole_numbers_of_8_to_32_bits_keep_their_values(tmp_path, kind):
    info = np.iinfo(kind)
    ends = [max(info.min, -(2**24)), min(info.max, 2**24), 0, 1]
    group, volume = read(write_image(tmp_path, np.array([ends, ends[::-1]], kind)))
    assert volume.voxels_CXYZ[0, :, 0].tolist() == ends
    assert "beyond_float32" not in group.flags


@pytest.mark.parametrize("value", [2**24 + 1, -(2**24) - 1])
def test_values_that_float32_rounds_are_flagged(tmp_path, value):
    group, _ = read(write_image(tmp_path, np.array([[value, 0]], np.int32)))
    assert "beyond_float32" in group.flags


@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_floating_point_pixels_are_read(tmp_path, kind):
    values = np.array([[0.5, -1.25], [3.0, 1e6]], kind)
    _, volume = read(write_image(tmp_path, values))
    np.testing.assert_array_equal(volume.voxels_CXYZ[0], values.T)


def test_pixels_that_are_not_finite_are_rejected_when_read(tmp_path):
    path = write_image(tmp_path, np.array([[0.5, np.nan]], np.float32))
    with pytest.raises(RejectedScan) as caught:
        DICOM.read_voxels([path], {})
    assert caught.value.reason == "nan_voxels"


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_overlay_in_the_high_bits_is_masked(tmp_path, signed, compressed):
    values = np.array([[-2048, -1, 0, 2047]] if signed else [[0, 1, 2048, 4095]])
    garbage = np.array([[0xF000, 0x3000, 0x5000, 0x8000]])
    stored = ((values & 0xFFF) | garbage).astype(np.uint16)
    path = write_image(tmp_path, stored, BitsStored=12, HighBit=11, PixelRepresentation=int(signed))
    if compressed:
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless)
        dataset.save_as(path)
    assert read(path)[1].voxels_CXYZ[0, :, 0].tolist() == values[0].tolist()


@pytest.mark.parametrize("signed", [True, False])
def test_values_in_the_middle_of_the_word_are_found_by_the_high_bit(tmp_path, signed):
    values = np.array([[-512, -1, 0, 511]] if signed else [[0, 1, 512, 1023]])
    stored = (((values & 0x3FF) << 4) | 0xC00A).astype(np.uint16)
    path = write_image(tmp_path, stored, BitsStored=10, HighBit=13, PixelRepresentation=int(signed))
    assert read(path)[1].voxels_CXYZ[0, :, 0].tolist() == values[0].tolist()


def test_high_bit_that_cannot_be_is_rejected(tmp_path):
    path = write_image(tmp_path, GREY.astype(np.uint16), BitsStored=12, HighBit=5)
    assert header_of(path).reason == "unreadable"


@pytest.mark.parametrize("planar", [0, 1])
def test_rgb_has_three_channels(tmp_path, planar):
    stored = RGB if planar == 0 else np.ascontiguousarray(RGB.transpose(2, 0, 1))
    path = write_image(tmp_path, RGB, PlanarConfiguration=planar, PixelData=stored.tobytes())
    group, volume = read(path)
    np.testing.assert_array_equal(volume.voxels_CXYZ, RGB.transpose(2, 1, 0))
    assert (group.num_channels, group.shape) == (3, (4, 5))
    assert "colour" in group.flags


def test_grey_in_ybr_is_grey_in_rgb(tmp_path):
    stored = np.stack([GREY, np.full_like(GREY, 128), np.full_like(GREY, 128)], axis=-1)
    _, volume = read(write_image(tmp_path, stored, PhotometricInterpretation="YBR_FULL"))
    np.testing.assert_array_equal(volume.voxels_CXYZ, np.stack([GREY.T] * 3))


@pytest.mark.parametrize(
    "values",
    [
        {"PhotometricInterpretation": "YBR_PARTIAL_422"},
        {"PhotometricInterpretation": "CMYK"},
        {"PhotometricInterpretation": "MONOCHROME2"},
    ],
)
def test_unusual_colours_are_rejected(tmp_path, values):
    assert header_of(write_image(tmp_path, RGB, **values)).reason == "colour_unsupported"


def palette(bits=16, segmented=False):
    tables = {}
    for colour, step in (("Red", 1), ("Green", 2), ("Blue", 3)):
        entries = np.arange(10, dtype=f"u{bits // 8}") * step
        if segmented:  # one entry by itself, then a line of nine
            entries = np.array([0, 1, 0, 1, 9, 9 * step], entries.dtype)
        kind = "Segmented" if segmented else ""
        tables[f"{colour}PaletteColorLookupTableDescriptor"] = [10, 100, bits]
        tables[f"{kind}{colour}PaletteColorLookupTableData"] = entries.tobytes()
    return {"PhotometricInterpretation": "PALETTE COLOR", **tables}


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_palette_becomes_rgb(tmp_path, bits, segmented):
    stored = np.array([[0, 100, 103, 109, 255]], np.uint8)
    group, volume = read(write_image(tmp_path, stored, **palette(bits, segmented)))
    np.testing.assert_array_equal(volume.voxels_CXYZ[:, :, 0], np.outer([1, 2, 3], [0, 0, 3, 9, 9]))
    assert group.num_channels == 3


def test_palette_that_unfolds_without_end_is_refused(tmp_path):
    values = palette(segmented=True)
    endless = np.array([0, 1, 0, *([1, 65535, 9] * 3)], np.uint16).tobytes()
    values["SegmentedRedPaletteColorLookupTableData"] = endless
    path = write_image(tmp_path, GREY, **values)
    with pytest.raises(RejectedScan, match="too long") as caught:
        DICOM.read_voxels([path], {})
    assert caught.value.reason == "colour_unsupported"


def modality_table(vr, bits, entries):
    item = Dataset()
    item.LUTDescriptor = [len(entries), 2, bits]
    item.ModalityLUTType = "US"
    item.add_new("LUTData", vr, list(entries) if vr == "US" else np.array(entries, "<u2").tobytes())
    return [item]


@pytest.mark.parametrize(("vr", "bits"), [("US", 16), ("US", 12), ("OW", 16), ("OW", 10)])
def test_modality_table_is_applied(tmp_path, vr, bits):
    table = modality_table(vr, bits, [5, 7, 1000])
    path = write_image(tmp_path, np.array([[0, 2, 3, 4, 9]], np.uint8), ModalityLUTSequence=table)
    assert read(path)[1].voxels_CXYZ[0, :, 0].tolist() == [5, 5, 7, 1000, 1000]


def test_images_that_differ_in_their_tables_differ_in_their_digest(tmp_path):
    digests = {
        header_of(
            write_image(tmp_path, GREY, ModalityLUTSequence=modality_table("US", 16, [1, end]))
        ).digest
        for end in (2, 3)
    }
    assert len(digests) == 2


def test_inverted_image_of_rescaled_values_is_turned(tmp_path):
    path = write_image(tmp_path, np.array([[0, 10, 255]], np.uint8), RescaleSlope=2,
                       RescaleIntercept=-5, PhotometricInterpretation="MONOCHROME1")  # fmt: skip
    assert read(path)[1].voxels_CXYZ[0, :, 0].tolist() == [505, 485, -5]


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_pixels_do_not_depend_on_the_transfer_syntax(tmp_path, syntax):
    path = write_image(tmp_path, np.array([[1, 500, 65535]], np.uint16))
    dataset = pydicom.dcmread(path)
    big = syntax == ExplicitVRBigEndian
    if big:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    for _ in dataset.iterall():  # converts each element, so that it is written anew
        pass
    pydicom.dcmwrite(path, dataset, implicit_vr=not big, little_endian=not big)
    assert read(path)[1].voxels_CXYZ[0, :, 0].tolist() == [1, 500, 65535]


CORPUS = (
    "693_J2KI.dcm", "CT_small.dcm", "ExplVR_BigEnd.dcm", "J2K_pixelrep_mismatch.dcm",
    "examples_jpeg2k.dcm", "examples_rgb_color.dcm", "examples_ybr_color.dcm",
)  # fmt: skip


@pytest.mark.parametrize("name", CORPUS)
def test_pixels_equal_those_of_simple_itk(name):
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip("not among the files that pydicom brings")
    header = DICOM.read_header(Path(path), name, SALT)
    (group,) = DICOM.group([header], GroupingConfig())
    ours = DICOM.read_voxels([Path(path)], group.reading).voxels_CXYZ
    image = SimpleITK.ReadImage(path)
    theirs = SimpleITK.GetArrayFromImage(image)
    colour = image.GetNumberOfComponentsPerPixel() == 3
    theirs = np.moveaxis(theirs, -1, 0) if colour else theirs[None]
    axes = (0, *range(theirs.ndim - 1, 0, -1))
    np.testing.assert_array_equal(ours.squeeze(), theirs.transpose(axes).squeeze())


MOVIE = RNG.integers(0, 255, (6, 5, 4), np.uint8)


@pytest.mark.parametrize(("modality", "sop"), [("US", "3.1"), ("XA", "12.1"), ("RF", "12.2")])
def test_frames_of_a_cine_are_times(tmp_path, modality, sop):
    path = write_image(tmp_path, MOVIE, modality, SOPClassUID=SOP + sop)
    group, volume = read(path)
    assert (group.dims, group.shape) == ("2D+t", (4, 5, 6))
    np.testing.assert_array_equal(volume.voxels_CXYZ[0], MOVIE.transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("pointer", "reason"), [(0x00540100, ""), (0x00540080, "multi_frame_unsupported"), (None, "")]
)
def test_nuclear_medicine_is_a_cine_only_over_time(tmp_path, pointer, reason):
    values = {"SOPClassUID": SOP + "20"}
    if pointer:
        values["FrameIncrementPointer"] = pointer
    path = write_image(tmp_path, MOVIE, "NM", **values)
    wanted = reason if pointer else "multi_frame_unsupported"
    assert header_of(path).reason == wanted


def test_secondary_captures_of_frames_stay_secondary_captures(tmp_path):
    path = write_image(tmp_path, MOVIE, "OT", SOPClassUID=SOP + "7.2")
    assert header_of(path).reason == "secondary_capture"


def test_mosaic_of_slices_is_not_taken_for_one(tmp_path):
    extra = {"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}
    (path,) = write_dicom_series(linear_volume((8, 8, 1)), np.eye(4), tmp_path, extra=extra)
    assert header_of(path).reason == "multi_frame_unsupported"


def region(units=3, delta=0.05, form=1):
    item = Dataset()
    item.RegionSpatialFormat = form
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = units
    item.PhysicalDeltaX, item.PhysicalDeltaY = delta, -2 * delta
    return item


@pytest.mark.parametrize(
    ("regions", "spacing"),
    [
        ([region()], (0.5, 1.0)),
        ([region(), region()], (0.5, 1.0)),
        ([region(), region(form=3, units=4)], (0.5, 1.0)),
        ([region(), region(delta=0.07)], None),
        ([region(units=4)], None),
        ([region(delta=0.0)], None),
    ],
)
def test_spacing_of_ultrasound_comes_from_its_regions(tmp_path, regions, spacing):
    path = write_image(tmp_path, MOVIE, "US", SOPClassUID=SOP + "3.1", PixelSpacing=None,
                       SequenceOfUltrasoundRegions=regions)  # fmt: skip
    group, volume = read(path)
    found = np.linalg.norm(volume.affine[:3, :2], axis=0)
    np.testing.assert_allclose(found, spacing or (1.0, 1.0))
    assert ("spacing_unknown" in group.flags) == (spacing is None)
    assert "ultrasound_regions" in group.flags


@pytest.mark.parametrize(
    ("modality", "said", "flag"),
    [
        ("US", None, "burned_in_possible"),
        ("ES", "", "burned_in_possible"),
        ("US", "NO", ""),
        ("DX", None, ""),
        ("DX", "YES", "burned_in_annotation"),
        ("US", "YES", "burned_in_annotation"),
    ],
)
def test_burned_in_text_is_flagged(tmp_path, modality, said, flag):
    values = {} if said is None else {"BurnedInAnnotation": said}
    flags = header_of(write_image(tmp_path, GREY, modality, **values)).facts["flags"]
    assert [name for name in flags if name.startswith("burned_in")] == [flag] * bool(flag)


@pytest.mark.parametrize(
    ("modality", "part", "recognizable", "num_slices", "flagged"),
    [
        ("CT", "HEAD", None, 3, True),
        ("MR", "BRAIN", "YES", 3, True),
        ("MR", "HEADNECK", "NO", 3, False),
        ("CT", "CHEST", None, 3, False),
        ("MR", "SKULL", None, 1, False),
    ],
)
def test_volumes_of_heads_may_show_a_face(
    tmp_path, modality, part, recognizable, num_slices, flagged
):
    extra = {"BodyPartExamined": part}
    if recognizable:
        extra["RecognizableVisualFeatures"] = recognizable
    paths = write_dicom_series(linear_volume((4, 4, num_slices)), np.eye(4), tmp_path,
                               modality=modality, extra=extra)  # fmt: skip
    headers = [DICOM.read_header(path, path.name, SALT) for path in paths]
    (group,) = DICOM.group(headers, GroupingConfig())
    assert ("may_show_face" in group.flags) == flagged
