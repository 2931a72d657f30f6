import functools
import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from medssl.errors import ConfigError, DataError, MachineError
from medssl.scans.datasets import _download
from medssl.scans.datasets._download import Archive, download, extract
from medssl.scans.datasets._mirror import find_mirror
from medssl.scans.datasets.base import cards, fetch, verify
from medssl.scans.datasets.hippocampus import Hippocampus

TAR = "Task04_Hippocampus.tar"
NUMBERS = (1, 3, 4, 260)


def make_tar(path: Path, extra: dict[str, bytes] | None = None) -> None:
    """Write a small archive laid out like the published one."""
    files = {"Task04_Hippocampus/dataset.json": b"{}"}
    for number in NUMBERS:
        for folder in ("imagesTr", "labelsTr"):
            name = f"hippocampus_{number:03d}.nii.gz"
            files[f"Task04_Hippocampus/{folder}/{name}"] = f"{folder} {number}".encode()
            files[f"Task04_Hippocampus/{folder}/._{name}"] = b"macOS"
    files["Task04_Hippocampus/imagesTs/hippocampus_002.nii.gz"] = b"no mask"
    with tarfile.open(path, "w") as tar:
        for name, content in {**files, **(extra or {})}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror that holds the tar; its checksum is made to be the expected one."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    make_tar(folder / TAR)
    expect(folder / TAR, monkeypatch)
    return folder


def expect(path: Path, monkeypatch: pytest.MonkeyPatch, url: str | None = None) -> Archive:
    (archive,) = Hippocampus.card.archives
    content = path.read_bytes()
    checksum = hashlib.md5(content, usedforsecurity=False).hexdigest()
    new = replace(archive, checksum=checksum, url=url or archive.url, size_bytes=len(content))
    monkeypatch.setattr(Hippocampus, "card", replace(Hippocampus.card, archives=(new,)))
    return new


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A web server on this machine: the folder it serves, and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{web.server_address[1]}"
        web.shutdown()
        thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def test_every_data_set_states_licence_citation_and_checksums() -> None:
    found = {card.name: card for card in cards()}
    assert list(found) == ["hippocampus", "phantom"]
    assert all(card.licence and card.citation and card.title for card in found.values())
    (archive,) = found["hippocampus"].archives
    assert archive.url.endswith(TAR)
    assert archive.checksum == "9d24dba78a72977dbd1d2e110310f31b"
    assert found["phantom"].synthetic
    assert not found["hippocampus"].synthetic


def test_a_misspelt_data_set_is_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'hippocampus'"):
        fetch("hipocampus", Path("nowhere"))


def test_a_tar_in_the_mirror_is_unpacked_with_its_pairs(mirror: Path, tmp_path: Path) -> None:
    fetched = fetch("hippocampus", tmp_path / "data", mirror=mirror, network=False)
    names = [f"hippocampus_{number:03d}.nii.gz" for number in NUMBERS]
    assert sorted(path.name for path in fetched.images.iterdir()) == names
    assert sorted(path.name for path in fetched.masks["hippocampus"].iterdir()) == names
    assert (fetched.images / names[1]).read_bytes() == b"imagesTr 3"
    assert fetched.patients is not None
    assert fetched.patients.read_text().split() == [
        "scan,patient",
        "hippocampus_001,subject_001",
        "hippocampus_003,subject_002",
        "hippocampus_004,subject_002",
        "hippocampus_260,subject_130",
    ]
    facts = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert facts["origin"] == "mirror"
    assert any("2k-1 and 2k" in note for note in facts["notes"])
    assert facts["licence"] == "CC-BY-SA 4.0"


def test_a_folder_in_the_mirror_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "mirror" / "hippocampus"
    for part in ("images", "labels"):
        (source / part).mkdir(parents=True)
        (source / part / "hippocampus_001.nii.gz").write_bytes(part.encode())
    (source / "patients.csv").write_text("scan,patient\nhippocampus_001,subject_001\n")
    fetched = fetch("hippocampus", tmp_path / "data", mirror=tmp_path / "mirror", network=False)
    assert (fetched.images / "hippocampus_001.nii.gz").read_bytes() == b"images"
    assert verify(fetched.folder) == {"missing": [], "changed": [], "added": []}


def test_an_image_without_a_mask_in_the_mirror_is_refused(tmp_path: Path) -> None:
    for part in ("images", "labels"):
        (tmp_path / "mirror" / "hippocampus" / part).mkdir(parents=True)
    (tmp_path / "mirror" / "hippocampus" / "images" / "hippocampus_001.nii.gz").touch()
    with pytest.raises(DataError, match="no labels for one of 1 scans"):
        fetch("hippocampus", tmp_path / "data", mirror=tmp_path / "mirror")
    assert not (tmp_path / "data").exists()


def test_a_tar_of_another_checksum_is_refused(mirror: Path, tmp_path: Path) -> None:
    with (mirror / TAR).open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(DataError, match=r"has md5 \w{32}, \w{32} is wanted"):
        fetch("hippocampus", tmp_path / "data", mirror=mirror)
    assert list(tmp_path.glob(".data-*")) == []


def test_a_path_that_leads_outside_is_not_followed(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tar(mirror / TAR, {"../../imagesTr/hippocampus_005.nii.gz": b"evil"})
    expect(mirror / TAR, monkeypatch)
    with pytest.raises(DataError, match="one mask for each volume"):
        fetch("hippocampus", tmp_path / "data", mirror=mirror)
    assert not list(tmp_path.parent.rglob("hippocampus_005.nii.gz"))


def test_extraction_refuses_members_that_would_land_outside(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", {"../evil.txt": b"evil"})
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="leads outside its folder"):
        extract(tmp_path / "a.tar", tmp_path / "in", lambda name: name)
    assert not (tmp_path / "evil.txt").exists()


def test_links_are_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("link")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    (tmp_path / "in").mkdir()
    assert extract(tmp_path / "a.tar", tmp_path / "in", lambda name: name) == 0


def test_a_file_that_is_no_tar_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match=r"a\.tar is no tar archive, or is cut short"):
        extract(tmp_path / "a.tar", tmp_path, lambda name: name)


def test_a_download_is_checked_and_unpacked(
    server: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = server
    make_tar(folder / TAR)
    expect(folder / TAR, monkeypatch, url=f"{address}/{TAR}")
    (tmp_path / "empty").mkdir()
    told: list[tuple[int, int]] = []
    fetched = fetch(
        "hippocampus",
        tmp_path / "data",
        mirror=tmp_path / "empty",
        progress=lambda done, total: told.append((done, total)),
    )
    assert fetched.origin == "network"
    assert len(list(fetched.images.iterdir())) == len(NUMBERS)
    assert not list(fetched.folder.glob("*.tar"))
    assert told[-1][0] == told[-1][1] == (folder / TAR).stat().st_size


def test_a_download_of_another_checksum_is_refused(
    server: tuple[Path, str], tmp_path: Path
) -> None:
    folder, address = server
    (folder / "a.bin").write_bytes(b"other")
    archive = Archive(f"{address}/a.bin", "sha256", "0" * 64, 5)
    with pytest.raises(DataError, match="a.bin has sha256 .* is wanted"):
        download(archive, tmp_path / "a.bin")


def test_a_download_without_end_is_given_up(server: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = server
    (folder / "a.bin").write_bytes(b"x" * 1000)
    archive = Archive(f"{address}/a.bin", "sha256", "0" * 64, 10)
    with pytest.raises(MachineError, match="more than the 10 bytes expected"):
        download(archive, tmp_path / "a.bin")


def test_an_address_that_does_not_answer_says_what_to_do(
    server: tuple[Path, str], tmp_path: Path
) -> None:
    archive = Archive(f"{server[1]}/absent", "md5", "0" * 32, 10)
    with pytest.raises(MachineError, match=r"reached \(File not found\).*MEDSSL_DATA_MIRROR"):
        download(archive, tmp_path / "a")
    with pytest.raises(MachineError, match="is no web address"):
        download(replace(archive, url="file:///etc/passwd"), tmp_path / "a")


def test_without_mirror_and_network_the_way_out_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MachineError, match=r"not in a mirror.*Task04_Hippocampus\.tar.*MIRROR"):
        fetch("hippocampus", tmp_path / "data", mirror=tmp_path / "empty", network=False)
    assert not (tmp_path / "data").exists()


def test_a_second_fetch_does_nothing(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch("hippocampus", tmp_path / "data", mirror=mirror)
    monkeypatch.setattr(_download, "extract", lambda *_: pytest.fail("unpacked again"))
    (mirror / TAR).unlink()
    assert fetch("hippocampus", tmp_path / "data", mirror=mirror) == first


def test_lost_and_changed_files_are_found(mirror: Path, tmp_path: Path) -> None:
    fetched = fetch("hippocampus", tmp_path / "data", mirror=mirror)
    (fetched.images / "hippocampus_001.nii.gz").unlink()
    (fetched.images / "hippocampus_003.nii.gz").write_bytes(b"other")
    (fetched.images / "new.txt").touch()
    assert verify(fetched.folder) == {
        "missing": ["images/hippocampus_001.nii.gz"],
        "changed": ["images/hippocampus_003.nii.gz"],
        "added": ["images/new.txt"],
    }
    with pytest.raises(DataError, match="has lost 1 of 9 files"):
        fetch("hippocampus", tmp_path / "data", mirror=mirror)


def test_a_foreign_folder_is_left_alone(mirror: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty and was not made by"):
        fetch("hippocampus", tmp_path / "data", mirror=mirror)
    with pytest.raises(DataError, match="holds no fetched data set"):
        verify(tmp_path / "data")


def test_the_mirror_is_named_by_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSSL_DATA_MIRROR", str(tmp_path))
    assert find_mirror() == tmp_path
    monkeypatch.setenv("MEDSSL_DATA_MIRROR", str(tmp_path / "absent"))
    with pytest.raises(MachineError, match="names a folder that does not exist"):
        find_mirror()
    monkeypatch.setenv("MEDSSL_DATA_MIRROR", "")
    assert find_mirror() is None


def test_the_mirror_beside_the_project_is_found_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEDSSL_DATA_MIRROR", raising=False)
    (tmp_path / "project" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "project" / "pyproject.toml").touch()
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert find_mirror(tmp_path / "project" / "deep" / "er") == tmp_path / "shared" / "data"
