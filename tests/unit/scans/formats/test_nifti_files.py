"""NIfTI as files: gzip, pairs, sidecars, lies about lengths, and changes while reading."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
import zlib

import nibabel as nib
import numpy as np
import pytest

from medssl.errors import RejectedScan
from medssl.pipelines.index import index_scans
from medssl.scans.files import HEAD_BYTES
from medssl.scans.formats import _nifti_stream
from medssl.scans.formats.base import GroupingConfig
from medssl.scans.formats.nifti import NiftiFormat, read_grid
from medssl.scans.identity import Salt
from samples import OBLIQUE, PATIENT_ID, linear_volume, write_nifti

SALT = Salt(bytes(32))
NIFTI = NiftiFormat()


def header_of(path):
    return NIFTI.read_header(path, path.name, SALT)


def reason_of(path):
    try:
        return header_of(path).reason
    except RejectedScan as error:
        return error.reason


def claims(path):
    return NIFTI.claims(path, path.read_bytes()[:HEAD_BYTES])


def content(voxels=None, maker=nib.Nifti1Image):
    return maker(linear_volume(affine=OBLIQUE) if voxels is None else voxels, OBLIQUE).to_bytes()


@pytest.mark.parametrize("maker", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["scan", "a.nii", "a.nii.gz", "A.NII", "a.gz", "1.2.3"])
def test_name_says_nothing_about_content(tmp_path, name, zipped, maker):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content(maker=maker)) if zipped else content(maker=maker))
    assert claims(path)
    assert reason_of(path) == ""
    np.testing.assert_array_equal(read_grid(path).voxels_CXYZ[0], linear_volume(affine=OBLIQUE))


@pytest.mark.parametrize(
    "head",
    [b"", b"\x1f\x8b", b"\x1f\x8b" + bytes(510), gzip.compress(b"x", mtime=0)],
    ids=["empty", "two bytes", "no gzip", "gzip of something else"],
)
def test_other_files_are_not_claimed(tmp_path, head):
    assert not NIFTI.claims(tmp_path / "scan", head)
    assert not NIFTI.claims(tmp_path / "scan.hdr", head)


def test_gzip_of_several_members_is_read(tmp_path):
    path, whole = tmp_path / "a.nii.gz", content()
    path.write_bytes(gzip.compress(whole[:400]) + gzip.compress(whole[400:]))
    np.testing.assert_array_equal(read_grid(path).voxels_CXYZ[0], linear_volume(affine=OBLIQUE))


def test_damaged_gzip_is_found_by_its_checksum(tmp_path):
    packed = bytearray(gzip.compress(content(), compresslevel=0))
    packed[500] ^= 1  # a voxel, stored without compression
    (tmp_path / "a.nii.gz").write_bytes(packed)
    assert reason_of(tmp_path / "a.nii.gz") == "unreadable"


@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_gzip_that_ends_early_is_truncated(tmp_path, kept):
    packed = gzip.compress(content(np.random.default_rng(0).normal(0, 1, (9, 9, 9))))
    (tmp_path / "a.nii.gz").write_bytes(packed[: int(kept * len(packed))])
    assert reason_of(tmp_path / "a.nii.gz") == "truncated_pixels"


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("extra", [b"\0", b"x" * 10_000])
def test_file_that_is_longer_than_its_header_says_is_unreadable(tmp_path, extra, zipped):
    path = tmp_path / "a.nii"
    path.write_bytes(gzip.compress(content() + extra) if zipped else content() + extra)
    assert reason_of(path) == "unreadable"


def test_gzip_bomb_is_not_inflated(tmp_path):
    path, packer = tmp_path / "a.nii.gz", zlib.compressobj(9, wbits=31)
    with path.open("wb") as file:
        file.write(packer.compress(content()))
        for _ in range(256):  # 256 MiB of zeros after the voxels
            file.write(packer.compress(bytes(2**20)))
        file.write(packer.flush())
    tracemalloc.start()
    assert reason_of(path) == "unreadable"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


@pytest.mark.parametrize("zipped", [False, True])
def test_voxels_that_the_file_cannot_hold_are_never_allocated(tmp_path, zipped):
    lying = bytearray(content())
    lying[40:48] = np.array([3, 800, 800, 800], "<i2").tobytes()
    path = tmp_path / "a.nii"
    path.write_bytes(gzip.compress(bytes(lying)) if zipped else bytes(lying))
    tracemalloc.start()
    with pytest.raises(RejectedScan, match="shorter than its header says"):
        read_grid(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_header_of_a_large_volume_is_read_in_little_memory(tmp_path):
    voxels = np.random.default_rng(0).integers(-999, 999, (256, 256, 256), np.int16)
    path = write_nifti(tmp_path / "a.nii", voxels)
    tracemalloc.start()
    assert reason_of(path) == ""
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < voxels.nbytes


def test_voxels_are_read_without_a_second_copy(tmp_path):
    voxels = np.random.default_rng(0).integers(-999, 999, (256, 256, 256), np.int16)
    path = write_nifti(tmp_path / "a.nii", voxels)
    tracemalloc.start()
    volume = read_grid(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * volume.voxels_CXYZ.nbytes


@pytest.mark.parametrize("offset", [100.0, 351.0, 400.5, np.nan, -4.0])
def test_voxels_within_the_header_are_unreadable(tmp_path, offset):
    lying = bytearray(content())
    lying[108:112] = np.float32(offset).tobytes()
    (tmp_path / "a.nii").write_bytes(lying)
    assert reason_of(tmp_path / "a.nii") == "unreadable"


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("size", [100, 70_000])
def test_header_extensions_are_passed_over(tmp_path, size, zipped):
    image = nib.Nifti1Image(linear_volume(affine=OBLIQUE), OBLIQUE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * size))
    path = tmp_path / ("a.nii" + ".gz" * zipped)
    image.to_filename(path)
    np.testing.assert_array_equal(read_grid(path).voxels_CXYZ[0], linear_volume(affine=OBLIQUE))


def test_file_that_was_copied_as_text_is_unreadable(tmp_path):
    lying = bytearray(content(maker=nib.Nifti2Image))
    lying[8:12] = b"\n\x1a\n\x00"
    (tmp_path / "a.nii").write_bytes(lying)
    assert reason_of(tmp_path / "a.nii") == "unreadable"


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    "maker", [nib.AnalyzeImage, nib.Spm99AnalyzeImage, nib.Nifti1Pair, nib.Nifti2Pair]
)
def test_both_files_of_a_pair_are_analyze(tmp_path, maker, ending):
    maker(linear_volume(), np.diag([1, 1, 2, 1])).to_filename(tmp_path / f"a.img{ending}")
    for name in (f"a.hdr{ending}", f"a.img{ending}"):
        assert claims(tmp_path / name)
        assert reason_of(tmp_path / name) == "analyze"


def test_pair_header_under_the_name_of_a_single_file_is_analyze(tmp_path):
    nib.Nifti1Pair(linear_volume(), np.eye(4)).to_filename(tmp_path / "a.img")
    (tmp_path / "a.hdr").rename(tmp_path / "b.nii")
    assert reason_of(tmp_path / "b.nii") == "analyze"


def test_other_files_called_hdr_and_img_are_left_alone(tmp_path):
    (tmp_path / "a.hdr").write_bytes(b"ENVI\nsamples = 10\n")
    (tmp_path / "a.img").write_bytes(bytes(1000))
    (tmp_path / "alone.img").write_bytes(bytes(1000))
    assert not any(claims(path) for path in tmp_path.iterdir())


def sidecar(folder, text, name="a.nii.gz"):
    path = write_nifti(folder / name, linear_volume())
    (folder / "a.json").write_bytes(text if isinstance(text, bytes) else json.dumps(text).encode())
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.NII.GZ"])
def test_sidecar_gives_modality_and_patient_key(tmp_path, name):
    packed = gzip.compress(content())
    path = sidecar(tmp_path, {"Modality": "MR", "PatientID": PATIENT_ID})
    path = path.rename(tmp_path / name)
    path.write_bytes(packed)
    header = header_of(path)
    (group,) = NIFTI.group([header], GroupingConfig())
    assert group.modality == "MR"
    assert header.patient_key == SALT.key("patient", PATIENT_ID)
    assert PATIENT_ID not in repr(header)
    assert claims(tmp_path / "a.json")


def test_sidecar_itself_is_a_row_of_its_own(tmp_path):
    sidecar(tmp_path, {})
    assert claims(tmp_path / "a.json")
    assert reason_of(tmp_path / "a.json") == "sidecar"


@pytest.mark.parametrize("name", ["dataset_description.json", "b.nii.json"])
def test_json_without_an_image_is_not_claimed(tmp_path, name):
    (tmp_path / name).write_text("{}")
    assert not claims(tmp_path / name)


@pytest.mark.parametrize("modality", ["DOE^JANE", "", 3, None, ["MR"], {"a": 1}, True])
def test_only_known_modalities_are_taken(tmp_path, modality):
    assert header_of(sidecar(tmp_path, {"Modality": modality})).facts["modality"] == ""


@pytest.mark.parametrize("patient", ["", "  ", None, True, 1.5, ["x"], "x" * 2000])
def test_what_is_no_name_gives_no_patient(tmp_path, patient):
    assert header_of(sidecar(tmp_path, {"PatientID": patient})).patient_key == ""


def test_patient_may_be_a_number(tmp_path):
    header = header_of(sidecar(tmp_path, {"PatientID": 7341}))
    assert header.patient_key == SALT.key("patient", "7341")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
        b'{"PatientID": "' + b"x" * 2**20 + b'"}',
    ],
    ids=["empty", "cut", "list", "encoding", "deep", "digits", "large"],
)
def test_broken_sidecar_is_flagged_and_the_image_kept(tmp_path, text):
    header = header_of(sidecar(tmp_path, text))
    assert (header.reason, header.facts["flags"]) == ("", ["sidecar_unreadable"])


def test_sidecar_that_is_a_pipe_does_not_block(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", linear_volume())
    os.mkfifo(tmp_path / "a.json")
    assert header_of(path).facts["flags"] == []


def test_name_as_long_as_names_can_be_is_read(tmp_path):
    path = write_nifti(tmp_path / ("x" * 251 + ".nii"), linear_volume())
    assert header_of(path).facts["flags"] == []
    (tmp_path / ("x" * 250 + ".json")).write_text("{}")
    assert not claims(tmp_path / ("x" * 250 + ".json"))


def test_changed_sidecar_changes_the_facts(tmp_path):
    path = sidecar(tmp_path, {"Modality": "MR"})
    before = header_of(path).facts["sidecar"]
    (tmp_path / "a.json").write_text('{"Modality": "CT"}')
    assert header_of(path).facts["sidecar"] not in ("", before)


@pytest.mark.parametrize("after", ['{"Modality": "CT"}', None], ids=["changed", "removed"])
def test_index_sees_that_a_sidecar_changed(tmp_path, after):
    (tmp_path / "scans").mkdir()
    sidecar(tmp_path / "scans", {"Modality": "MR"})
    index = index_scans(tmp_path / "scans", tmp_path / "index", num_workers=0)
    assert list(index.accepted["modality"]) == ["MR"]
    beside = tmp_path / "scans" / "a.json"
    if after is None:
        beside.unlink()
    else:
        beside.write_text(after)
    index = index_scans(tmp_path / "scans", tmp_path / "index", num_workers=0)
    assert list(index.accepted["modality"]) == ["CT" if after else ""]


def changing(monkeypatch, path, change):
    """Let ``change`` happen to the file after its header was read."""
    read_layout = _nifti_stream.read_layout

    def changed(head):
        change(path)
        return read_layout(head)

    monkeypatch.setattr(_nifti_stream, "read_layout", changed)


def grow(path):
    with path.open("ab") as file:
        file.write(b"more")


def cut(path):
    os.truncate(path, 400)


def replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("change", [grow, cut, replace, remove])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_file_that_changes_while_it_is_read_is_rejected(tmp_path, monkeypatch, name, change):
    path = write_nifti(tmp_path / name, linear_volume())
    changing(monkeypatch, path, change)
    assert reason_of(path) == "changed_while_read"


def test_halves_of_a_pair_are_read_together_when_zipped_too():
    assert {".hdr", ".img", ".hdr.gz", ".img.gz"} <= set(NIFTI.read_together)
