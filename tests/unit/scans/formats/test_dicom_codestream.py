from __future__ import annotations

import struct

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from medssl.errors import RejectedScan
from medssl.scans.formats._codestream import size_of
from medssl.scans.formats.dicom import DicomFormat
from medssl.scans.identity import Salt
from samples import linear_volume, write_dicom_series

SALT = Salt(bytes(32))


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
def test_size_is_read_from_what_real_encoders_write(tmp_path, syntax):
    (path,) = write_dicom_series(linear_volume((70, 50, 1)), np.eye(4), tmp_path, signed=False,
                                 rescale=(1.0, -200.0))  # fmt: skip
    dataset = pydicom.dcmread(path)
    dataset.compress(syntax)
    (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    assert size_of(frame) == (70, 50, 1)


def test_size_is_read_from_a_jpeg_of_three_components():
    dataset = pydicom.dcmread(get_testdata_file("SC_rgb_jpeg_dcmtk.dcm", download=False))
    (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    assert size_of(frame) == (100, 100, 3)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
def test_frame_that_would_unfold_to_more_than_its_header_says_is_refused(tmp_path, syntax):
    (path,) = write_dicom_series(linear_volume((70, 50, 1)), np.eye(4), tmp_path, signed=False,
                                 rescale=(1.0, -200.0))  # fmt: skip
    dataset = pydicom.dcmread(path)
    dataset.compress(syntax)
    dataset.save_as(path)
    form = ">LL" if syntax == JPEG2000Lossless else ">HH"
    size = struct.pack(form, *((70, 50) if syntax == JPEG2000Lossless else (50, 70)))
    content = path.read_bytes()
    start = content.rindex(b"\xff\x4f\xff\x51" if syntax == JPEG2000Lossless else b"\xff\xf7")
    at = content.index(size, start)
    path.write_bytes(content[:at] + struct.pack(form, 60000, 60000) + content[at + len(size) :])
    assert DicomFormat().read_header(path, "x.dcm", SALT).reason == "too_large"


@pytest.mark.parametrize(
    "head", [b"", b"\xff\xd8", b"\xff\x4f\xff\x51\x00", b"\xff\xd8" + b"\xff" * 20]
)
def test_damaged_stream_has_no_size(head):
    assert size_of(head) is None


def compressed(folder, syntax):
    (path,) = write_dicom_series(linear_volume((70, 50, 1)), np.eye(4), folder, signed=False,
                                 rescale=(1.0, -200.0))  # fmt: skip
    dataset = pydicom.dcmread(path)
    dataset.compress(syntax)
    dataset.save_as(path)
    return path, dataset


def boxed(stream):
    """The stream as a JP2 file: signature, type, an image header, and the codestream."""

    def box(kind, content):
        return struct.pack(">L4s", 8 + len(content), kind) + content

    header = box(b"ihdr", struct.pack(">LLHBBBB", 50, 70, 1, 15, 7, 0, 0))
    start = box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 " + bytes(4) + b"jp2 ")
    return start + box(b"jp2h", header) + box(b"jp2c", stream)


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
@pytest.mark.parametrize(("rows", "columns"), [(70, 50), (35, 100), (50, 71), (51, 70)])
def test_frame_of_another_size_than_its_header_says_is_refused(
    tmp_path, syntax, box, rows, columns
):
    path, dataset = compressed(tmp_path, syntax)
    if box and syntax == JPEG2000Lossless:
        (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
        dataset.PixelData = pydicom.encaps.encapsulate([boxed(frame)])
    dataset.Rows, dataset.Columns = rows, columns
    dataset.save_as(path)
    assert DicomFormat().read_header(path, "x.dcm", SALT).reason == "unreadable"


def test_jpeg_2000_in_boxes_is_read(tmp_path):
    path, dataset = compressed(tmp_path, JPEG2000Lossless)
    before = DicomFormat().read_voxels([path], {}).voxels_CXYZ
    (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    dataset.PixelData = pydicom.encaps.encapsulate([boxed(frame)])
    dataset.save_as(path)
    assert DicomFormat().read_header(path, "x.dcm", SALT).reason == ""
    np.testing.assert_array_equal(DicomFormat().read_voxels([path], {}).voxels_CXYZ, before)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
def test_frame_of_another_size_is_not_decoded(tmp_path, syntax):
    path, dataset = compressed(tmp_path, syntax)
    dataset.Rows, dataset.Columns = 70, 50
    dataset.save_as(path)
    with pytest.raises(RejectedScan) as error:
        DicomFormat().read_voxels([path], {})
    assert error.value.reason == "unreadable"


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless])
def test_fewer_compressed_frames_than_promised_are_truncated_pixels(tmp_path, syntax, table):
    path, dataset = compressed(tmp_path, syntax)
    (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    dataset.Modality, dataset.NumberOfFrames = "US", 4
    dataset.PixelData = pydicom.encaps.encapsulate([frame] * 3, has_bot=table)
    dataset.save_as(path)
    assert DicomFormat().read_header(path, "x.dcm", SALT).reason == "truncated_pixels"
    dataset.NumberOfFrames = 3
    dataset.save_as(path)
    assert DicomFormat().read_header(path, "x.dcm", SALT).reason == ""


def test_offset_table_of_fewer_frames_is_refused(tmp_path):
    path, dataset = compressed(tmp_path, RLELossless)
    (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    dataset.Modality, dataset.NumberOfFrames = "US", 2
    whole = pydicom.encaps.encapsulate([frame] * 2, has_bot=True)
    dataset.PixelData = whole[:4] + struct.pack("<LL", 4, 0) + whole[16:]
    dataset.save_as(path)
    assert DicomFormat().read_header(path, "x.dcm", SALT).reason == "unreadable"


def test_one_frame_may_have_several_fragments(tmp_path):
    path, dataset = compressed(tmp_path, JPEG2000Lossless)
    (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    dataset.PixelData = pydicom.encaps.encapsulate([frame], fragments_per_frame=3)
    dataset.save_as(path)
    assert DicomFormat().read_header(path, "x.dcm", SALT).reason == ""
    assert DicomFormat().read_voxels([path], {}).voxels_CXYZ.shape == (1, 70, 50)
