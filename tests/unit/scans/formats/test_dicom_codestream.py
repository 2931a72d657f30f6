from __future__ import annotations

import struct

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless

from medssl.scans.formats._codestream import samples_of
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
    assert samples_of(frame) == 70 * 50


def test_size_is_read_from_a_jpeg_of_three_components():
    dataset = pydicom.dcmread(get_testdata_file("SC_rgb_jpeg_dcmtk.dcm", download=False))
    (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    assert samples_of(frame) == 100 * 100 * 3


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
    assert samples_of(head) == 0
