"""Thousands of damaged files through the whole index: nothing crashes, hangs or gets lost.

Every file is a real one, damaged by a generator with a fixed seed, and read as users' files are: in
a folder, by guarded workers.
"""

from __future__ import annotations

import gzip
import json
import struct
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from medssl.errors import DataError
from medssl.executors.local import Config as LocalConfig
from medssl.scans.building import IndexConfig, LimitsConfig, build_index
from medssl.scans.formats.base import REASONS
from samples import (
    OBLIQUE,
    PATIENT_ID,
    PLANTED,
    linear_volume,
    rotation_affine,
    write_dicom_series,
    write_nifti,
)

NUM_FOLDERS, FILES_A_FOLDER = 10, 510
_LIMIT_SECONDS = 20.0  # for one file; far more than any small file may need
_FOLDER_SECONDS = 120.0

WORDS = tuple(word for word in PLANTED if not word.isdigit())  # digits occur in any number
RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
PYDICOM_FILES = (
    "CT_small.dcm", "MR_small.dcm", "MR_small_bigendian.dcm", "JPEG2000.dcm", "JPEG-LL.dcm",
    "SC_rgb_rle_2frame.dcm", "SC_rgb_small_odd_jpeg.dcm", "image_dfl.dcm", "ExplVR_BigEnd.dcm",
    "rtdose.dcm", "MR_truncated.dcm", "no_meta.dcm", "test-SR.dcm", "eCT_Supplemental.dcm",
    "SC_ybr_full_422_uncompressed.dcm", "nested_priv_SQ.dcm", "UN_sequence.dcm", "DICOMDIR",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 127, 128, 255, 348, 540, 32767, -32768, 65535, 2**31 - 1, -(2**31))
FLOATS = (0.0, -0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 1e30, -1e30, 1e-30, 352.0, 353.0)
TEXTS = (b"nan", b"inf", b"1e999", b"-1", b"0", b"\\", b"\\\\\\", b"9" * 16, b"\xff" * 8, b"1.2.3")


def nifti_originals(folder):
    """Return (ending, content) of undamaged NIfTI files of every kind."""
    volume = linear_volume((8, 7, 6), OBLIQUE)
    colours = np.zeros((6, 5, 4), RGB)
    colours["G"] = np.arange(120).reshape(6, 5, 4)
    series = volume[..., None] + np.arange(3, dtype=np.int16)
    found = []
    for maker in (nib.Nifti1Image, nib.Nifti2Image):
        for voxels in (volume, volume.astype(np.float64), series, colours, volume[:, :, :1]):
            content = maker(voxels, OBLIQUE).to_bytes()
            found += [(".nii", content), (".nii.gz", gzip.compress(content, mtime=0))]
    swapped = nib.Nifti1Image(volume, OBLIQUE, nib.Nifti1Header(endianness=">"))
    qform = nib.Nifti1Image(volume, None)
    qform.set_qform(OBLIQUE, 1)
    scaled = nib.Nifti1Image(volume, OBLIQUE)
    scaled.header.set_slope_inter(0.5, -3)
    scaled.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JANE" * 9))
    found += [(".nii", image.to_bytes()) for image in (swapped, qform, scaled)]
    nib.AnalyzeImage(volume, np.eye(4)).to_filename(folder / "a.img")
    found += [(".hdr", (folder / "a.hdr").read_bytes()), (".img", (folder / "a.img").read_bytes())]
    return found


def dicom_originals(folder):
    """Return (ending, content) of undamaged DICOM files: a CT and an MR stack, and pydicom's."""
    paths = []
    for number, (modality, affine) in enumerate((("CT", OBLIQUE), ("MR", rotation_affine()))):
        volume = linear_volume((8, 7, 6), affine)
        paths += write_dicom_series(
            volume, affine, folder / modality, modality=modality, number=number + 1
        )
    theirs = Path(pydicom.__file__).parent / "data" / "test_files"
    contents = [path.read_bytes() for path in paths]
    contents += [(theirs / name).read_bytes() for name in PYDICOM_FILES if (theirs / name).exists()]
    return [(".dcm", content) for content in contents if len(content) < 200_000]


def flip_bytes(content, random):
    """Change a few bytes, mostly in the header."""
    reach = len(content) if random.random() < 0.3 else min(len(content), 1200)
    for at in random.integers(0, reach, random.integers(1, 12)):
        content[at] = random.integers(256)


def flip_bits(content, random):
    """Change a single bit anywhere."""
    content[random.integers(len(content))] ^= 1 << int(random.integers(8))


def cut(content, random):
    """Let the file end early."""
    del content[int(random.integers(len(content))) :]


def lie_about_lengths(content, random):
    """Write a number where a length may be."""
    for _ in range(random.integers(1, 4)):
        form = "<>"[random.integers(2)] + "HiI"[random.integers(3)]
        value = int(NUMBERS[random.integers(len(NUMBERS))]) & (0xFFFF if form[1] == "H" else -1)
        value = value & 0xFFFFFFFF if form[1] == "I" else value
        value = min(value, 2**31 - 1) if form[1] == "i" else value
        at = int(random.integers(max(1, min(len(content), 2000) - 4)))
        content[at : at + struct.calcsize(form)] = struct.pack(form, value)


def swap_chunks(content, random):
    """Let two parts change places."""
    size = int(random.integers(1, max(2, len(content) // 4)))
    first, second = (int(at) for at in random.integers(0, max(1, len(content) - size), 2))
    one, other = content[first : first + size], content[second : second + size]
    content[first : first + size] = other
    content[second : second + size] = one


def repeat_chunk(content, random):
    """Put a part in a second time."""
    first, last = sorted(int(at) for at in random.integers(0, len(content), 2))
    at = int(random.integers(len(content)))
    content[at:at] = content[first : min(last, first + 5000)]


def edit_nifti_field(content, random):
    """Write an unusual number into a field of the header."""
    packed = content.startswith(b"\x1f\x8b")
    plain = bytearray(gzip.decompress(bytes(content))) if packed else content
    head = plain[:4]
    second = 540 in (int.from_bytes(head, "little"), int.from_bytes(head, "big"))
    maker = nib.Nifti2Header if second else nib.Nifti1Header
    fields = np.frombuffer(plain, maker.template_dtype, 1).copy()
    for _ in range(random.integers(1, 4)):
        field = fields[random.choice(fields.dtype.names)]
        values = field.reshape(-1)
        if values.dtype.kind == "f":
            values[random.integers(values.size)] = FLOATS[random.integers(len(FLOATS))]
        elif values.dtype.kind in "iu":
            limits = np.iinfo(values.dtype)
            number = NUMBERS[random.integers(len(NUMBERS))]
            values[random.integers(values.size)] = min(max(number, limits.min), limits.max)
    plain[: fields.nbytes] = fields.tobytes()
    if packed:
        content[:] = gzip.compress(bytes(plain), mtime=0)


def edit_dicom_element(content, random):
    """Write another value, VR or length into an element of an explicit little-endian file."""
    marks = [
        at for at in range(132, min(len(content), 6000), 2) if content[at + 4 : at + 6].isalpha()
    ]
    if not marks:
        flip_bytes(content, random)
        return
    for _ in range(random.integers(1, 4)):
        at = marks[random.integers(len(marks))]
        kind = random.integers(4)
        if kind == 0:
            content[at + 4 : at + 6] = (b"SQ", b"UN", b"OB", b"DS", b"US", b"FD")[
                random.integers(6)
            ]
        elif kind == 1:
            content[at + 6 : at + 8] = random.bytes(2)
        elif kind == 2:
            text = TEXTS[random.integers(len(TEXTS))]
            content[at + 8 : at + 8 + len(text)] = text
        else:
            other = marks[random.integers(len(marks))]
            content[at : at + 4] = content[other : other + 4]


ANY = (flip_bytes, flip_bits, cut, lie_about_lengths, swap_chunks, repeat_chunk)


def damaged(content, ending, random):
    """Return a file after one to three kinds of damage."""
    content = bytearray(content)
    own = edit_dicom_element if ending == ".dcm" else edit_nifti_field
    if ending != ".img" and random.random() < 0.4:
        own(content, random)
    else:
        for _ in range(random.integers(1, 3)):
            if len(content) > 8:
                ANY[random.integers(len(ANY))](content, random)
    return bytes(content)


def write_folder(folder, number, originals):
    """Write a folder of damaged files, a few whole ones, and sidecars; return how many."""
    random = np.random.default_rng([7341, number])
    folder.mkdir()
    write_nifti(folder / "whole.nii.gz", linear_volume(affine=OBLIQUE), OBLIQUE)
    write_dicom_series(linear_volume(affine=OBLIQUE), OBLIQUE, folder / "whole", number=99)
    for index in range(FILES_A_FOLDER):
        ending, content = originals[random.integers(len(originals))]
        name = f"{index:04d}{ending if random.random() < 0.9 else ''}"
        (folder / name).write_bytes(damaged(content, ending, random))
        if random.random() < 0.05:
            text = json.dumps({"Modality": "MR", "PatientID": PATIENT_ID}).encode()
            (folder / f"{index:04d}.json").write_bytes(damaged(text, ".img", random))
    return sum(path.is_file() for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    nifti = nifti_originals(tmp_path_factory.mktemp("nifti"))
    dicom = dicom_originals(tmp_path_factory.mktemp("dicom"))
    return nifti * max(1, len(dicom) // len(nifti)) + dicom


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(NUM_FOLDERS))
def test_damaged_files_neither_crash_nor_hang_nor_get_lost(tmp_path, originals, number):
    folder = tmp_path / "files"
    num_files = write_folder(folder, number, originals)
    config = IndexConfig(
        folder=folder,
        limits=LimitsConfig(seconds=_LIMIT_SECONDS, megabytes=1024),
        executor=LocalConfig(num_workers=1),
    )
    started = time.monotonic()
    index = build_index(config, tmp_path / "index")
    assert time.monotonic() - started < _FOLDER_SECONDS

    places = {path for key in index.table["scan_key"] for path in index.files(key)}
    assert len(places) == num_files
    rejected = index.table[index.table["status"] == "rejected"]
    assert set(rejected["reason"]) <= set(REASONS)
    assert not {"reader_crashed", "too_slow"} & set(rejected["reason"])
    assert not any(word in index.table.to_csv() for word in WORDS)
    for row in index.accepted.to_dict("records"):
        try:
            voxels = index.read_volume(row["scan_key"]).voxels_CXYZ
        except DataError as error:
            message = str(error)
            assert any(f"({reason})" in message for reason in REASONS)
            assert not any(word in message for word in WORDS)
        else:
            assert voxels.shape == (row["num_channels"], *row["shape"])
            assert np.isfinite(voxels).all()
