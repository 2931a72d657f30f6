from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from medssl.errors import RejectedScan
from medssl.pipelines.index import index_scans
from medssl.scans.archives import is_archive, unpack
from medssl.scans.scan import read_scan
from samples import linear_volume, reasons, rotation_affine, write_dicom_series, write_nifti

PLENTY = 10**9


def write_zip(path: Path, files: dict[str, bytes], **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def refusal(path: Path, max_bytes: int = PLENTY) -> str:
    with pytest.raises(RejectedScan) as caught:
        unpack(path, path.parent / "target", max_bytes)
    return caught.value.reason


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.zip", ""), ("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz")],
)
def test_members_of_an_archive_are_indexed_and_read(tmp_path, name, mode):
    volume, affine = linear_volume(), rotation_affine()
    series = write_dicom_series(volume, affine, tmp_path / "series")
    files = {f"deep/{path.name}": path.read_bytes() for path in series}
    files["notes.txt"] = b"hello"
    (tmp_path / "scans").mkdir()
    if mode:
        write_tar(tmp_path / "scans" / name, files, mode)
    else:
        write_zip(tmp_path / "scans" / name, files)
    index = index_scans(tmp_path / "scans", tmp_path / "index", num_workers=0)
    assert reasons(index) == ["archive", "not_a_scan"]
    assert index.table["num_files"].sum() == len(files) + 1
    scan = read_scan(index, index.accepted["scan_key"][0])
    np.testing.assert_array_equal(np.sort(scan.voxels_CXYZ, None), np.sort(volume, None))


def test_archive_without_its_suffix_is_found_by_its_content(tmp_path):
    path = write_zip(tmp_path / "export", {"a.txt": b"x"})
    assert is_archive(path, path.read_bytes()[:512])
    path = write_tar(tmp_path / "export2", {"a.txt": b"x"})
    assert is_archive(path, path.read_bytes()[:512])


def test_no_member_name_leads_out_of_the_target(tmp_path):
    names = ["../../evil.txt", "/etc/evil", "C:\\evil", "a/../../b", "..", ""]
    path = write_zip(tmp_path / "a.zip", {name or "./": b"x" for name in names[:-1]})
    target = tmp_path / "deep" / "target"
    members = unpack(path, target, PLENTY)
    written = {p for p in tmp_path.rglob("*") if p.is_file()} - {path}
    assert written == {target / member.place for member in members}
    assert [member.name for member in members] == [
        "evil.txt", "etc/evil", "C:/evil", "a/b", "unnamed",
    ]  # fmt: skip


def test_links_and_devices_in_a_tar_are_left_out(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("link", tarfile.SYMTYPE), ("pipe", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert [member.reason for member in unpack(path, tmp_path / "t", PLENTY)] == ["not_a_scan"] * 2
    assert list((tmp_path / "t").iterdir()) == []


def test_bomb_is_refused_before_it_fills_the_disk(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.nii": bytes(2**22)}, compression=zipfile.ZIP_DEFLATED)
    assert refusal(path, 2**20) == "archive_unsafe"
    assert list(tmp_path.iterdir()) == [path]


def test_size_that_lies_is_counted_as_it_is_written(tmp_path):
    content = bytes(2**21)
    path = write_tar(tmp_path / "a.tar.gz", {"a": content, "b": content, "c": content}, "w:gz")
    assert refusal(path, 2**22) == "archive_unsafe"


def test_encrypted_zip_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.nii": b"x"})
    data = bytearray(path.read_bytes())
    data[6] |= 1  # the flag in the local header, then in the central directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert refusal(path) == "archive_unsafe"


@pytest.mark.parametrize("kept", [200, 3000])
def test_damaged_archive_is_unreadable(tmp_path, kept):
    whole = write_tar(tmp_path / "a.tar.gz", {"a.nii": os.urandom(5000)}, "w:gz").read_bytes()
    (tmp_path / "b.tar.gz").write_bytes(whole[:kept])
    assert refusal(tmp_path / "b.tar.gz") == "unreadable"


def test_archive_in_an_archive_gets_a_reason(tmp_path):
    inner = write_zip(tmp_path / "inner.zip", {"a.txt": b"x"})
    (tmp_path / "scans").mkdir()
    write_nifti(tmp_path / "scans" / "a.nii")
    write_zip(tmp_path / "scans" / "a.zip", {"inner.zip": inner.read_bytes()})
    index = index_scans(tmp_path / "scans", tmp_path / "index", num_workers=0)
    assert reasons(index) == ["archive", "archive_in_archive"]


def test_two_members_of_one_name_are_both_kept(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for content in (b"one", b"two"):
            info = tarfile.TarInfo("a.nii")
            info.size = 3
            archive.addfile(info, io.BytesIO(content))
    members = unpack(path, tmp_path / "t", PLENTY)
    assert [(tmp_path / "t" / member.place).read_bytes() for member in members] == [b"one", b"two"]
    assert [member.name for member in members] == ["a.nii", "a.nii#2"]


def test_sidecar_stays_beside_its_image(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"x/a.nii.gz": b"1", "y/a.json": b"2", "x/a.json": b"3"})
    places = {member.name: member.place for member in unpack(path, tmp_path / "t", PLENTY)}
    assert Path(places["x/a.json"]).stem == places["x/a.nii.gz"].split(".")[0]
    assert Path(places["y/a.json"]).stem != Path(places["x/a.json"]).stem


def test_changed_archive_is_unpacked_again_and_a_removed_one_is_forgotten(tmp_path):
    root = tmp_path / "scans"
    write_nifti(root / "kept.nii", seed=1)
    one, two = (write_nifti(tmp_path / f"{n}.nii", seed=n).read_bytes() for n in (2, 3))
    write_zip(root / "a.zip", {"a.nii": one})
    assert len(index_scans(root, tmp_path / "index", num_workers=0).accepted) == 2
    write_zip(root / "a.zip", {"a.nii": one, "b.nii": two})
    assert len(index_scans(root, tmp_path / "index", num_workers=0).accepted) == 3
    (root / "a.zip").unlink()
    assert len(index_scans(root, tmp_path / "index", num_workers=0).accepted) == 1
    assert list((tmp_path / "index" / "private" / "unpacked").iterdir()) == []


def test_tar_that_ends_in_a_zip_is_a_tar(tmp_path):
    inner = write_zip(tmp_path / "inner.zip", {"a.txt": b"x"}).read_bytes()
    path = write_tar(tmp_path / "a.tar", {"b.nii": b"y", "inner.zip": inner})
    assert [m.name for m in unpack(path, tmp_path / "t", PLENTY)] == ["b.nii", "inner.zip"]


def test_damaged_member_of_a_zip_costs_itself(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.nii": b"first" * 9, "b.nii": b"second" * 9})
    path.write_bytes(path.read_bytes().replace(b"first", b"fIrst", 1))
    members = unpack(path, tmp_path / "t", PLENTY)
    assert [(member.name, member.reason) for member in members] == [
        ("a.nii", "unreadable"), ("b.nii", ""),
    ]  # fmt: skip
    assert [file.name for file in (tmp_path / "t").iterdir()] == [members[1].place]


def test_zipped_tar_without_its_suffix_is_found(tmp_path):
    path = write_tar(tmp_path / "export", {"a.txt": b"x" * 900}, "w:gz")
    assert is_archive(path, path.read_bytes()[:512])
