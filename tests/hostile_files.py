"""Hostile archives and folders: bombs, names that lead out, links in a circle, pipes."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from hostile_outcomes import Case, rejected
from hostile_series import Outcome, series, whole
from samples import write_nifti


def parts(folder: Path) -> list[tuple[str, bytes]]:
    """Return names and contents of a series that is gone from the folder."""
    found = [(path.name, path.read_bytes()) for path in series(folder / "draft")]
    shutil.rmtree(folder / "draft")
    return found


def pack_zip(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def pack_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def zipped(name: str = "disc.zip", prefix: str = "") -> Callable[[Path], Outcome]:
    def build(folder: Path) -> Outcome:
        pack_zip(folder / name, [(prefix + part, data) for part, data in parts(folder)])
        return (whole(), rejected("archive"))

    return build


def tarred(name: str, mode: str, prefix: str = "") -> Callable[[Path], Outcome]:
    def build(folder: Path) -> Outcome:
        members = [(prefix + part, data) for part, data in parts(folder)]
        pack_tar(folder / name, members, mode)
        return (whole(), rejected("archive"))

    return build


def half_in_an_archive(folder: Path) -> Outcome:
    members = parts(folder)
    pack_zip(folder / "disc.zip", members[::2])
    for name, content in members[1::2]:
        (folder / name).write_bytes(content)
    return (whole(), rejected("archive"))


def zip_bomb(folder: Path) -> Outcome:
    """600 MiB of zeros in as many kilobytes."""
    with zipfile.ZipFile(folder / "disc.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for number in range(6):
            with file.open(f"{number}.dcm", "w") as member:
                for _ in range(100):
                    member.write(bytes(2**20))
    series(folder / "good")
    return (whole(), rejected("archive_unsafe"))


def zip_that_lies(folder: Path) -> Outcome:
    """Members whose stated sizes are a lie."""
    path = pack_zip(folder / "disc.zip", [("a.dcm", bytes(2**20)), ("b.dcm", bytes(2**20))])
    size = (2**20).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (100).to_bytes(4, "little")))
    series(folder / "good")
    return (whole(), rejected("archive"), rejected("unreadable|archive_unsafe", 2))


def nested(folder: Path) -> Outcome:
    inner = pack_zip(folder / "inner.zip", parts(folder))
    content = inner.read_bytes()
    inner.unlink()
    pack_zip(folder / "disc.zip", [*parts(folder), ("inner.zip", content)])
    return (whole(), rejected("archive"), rejected("archive_in_archive"))


def with_links(folder: Path) -> Outcome:
    path = pack_tar(folder / "disc.tar", parts(folder), "w")
    with tarfile.open(path, "a") as archive:
        for name, kind, target in (
            ("link", tarfile.SYMTYPE, "/etc/passwd"),
            ("hard", tarfile.LNKTYPE, "../../../../etc/passwd"),
            ("pipe", tarfile.FIFOTYPE, ""),
            ("device", tarfile.CHRTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return (whole(), rejected("archive"), rejected("not_a_scan", 4))


def encrypted(folder: Path) -> Outcome:
    path = pack_zip(folder / "disc.zip", parts(folder))
    content = bytearray(path.read_bytes())
    for mark, flags_at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(mark)
        while at >= 0:
            content[at + flags_at] |= 1
            at = content.find(mark, at + 4)
    path.write_bytes(content)
    series(folder / "good")
    return (whole(), rejected("archive_unsafe"))


def cut_archive(name: str) -> Callable[[Path], Outcome]:
    def build(folder: Path) -> Outcome:
        members = parts(folder)
        packed = pack_zip if name.endswith("zip") else pack_tar
        path = packed(folder / name, members)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        series(folder / "good")
        return (whole(), rejected("unreadable"))

    return build


def links_in_a_circle(folder: Path) -> Outcome:
    series(folder / "a")
    (folder / "a" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "b").symlink_to(folder / "a", target_is_directory=True)
    (folder / "self").symlink_to(folder / "self")
    (folder / "nowhere").symlink_to(folder / "gone")
    return (whole(), rejected("no_access|unreadable", 2))


def pipe(folder: Path) -> Outcome:
    series(folder)
    os.mkfifo(folder / "pipe.dcm")
    return (whole(), rejected("not_a_scan"))


def closed_folder(folder: Path) -> Outcome:
    if os.geteuid() == 0:
        pytest.skip("root opens every folder; run as another user")
    series(folder / "good")
    closed = write_nifti(folder / "closed" / "volume.nii.gz").parent
    closed.chmod(0)
    return (whole(), rejected("no_access"))


def closed_file(folder: Path) -> Outcome:
    if os.geteuid() == 0:
        pytest.skip("root opens every file; run as another user")
    series(folder)
    write_nifti(folder / "volume.nii.gz").chmod(0)
    return (whole(), rejected("no_access"))


def names_in_latin_1(folder: Path) -> Outcome:
    inside = folder / os.fsdecode(b"Caf\xe9 \xff")
    for number, path in enumerate(series(inside)):
        path.rename(inside / os.fsdecode(f"M\xfcller {number}".encode("latin-1")))
    return (whole(),)


def odd_names(folder: Path) -> Outcome:
    for path, name in zip(
        series(folder),
        ("a\nb", "-rf *", "semi;colon", "100% %s {x}", "." * 3 + "x", "\u202egnp.mcd"),
        strict=True,
    ):
        path.rename(folder / name)
    return (whole(),)


def deep(folder: Path) -> Outcome:
    place = folder.joinpath(*["d"] * 200)
    series(place)
    return (whole(),)


FILE_CASES = (
    Case("zip", zipped()),
    Case("zip without suffix", zipped("disc")),
    Case("tar", tarred("disc.tar", "w")),
    Case("tar.gz", tarred("disc.tar.gz", "w:gz")),
    Case("tar.xz", tarred("disc.tar.xz", "w:xz")),
    Case("half a series in a zip", half_in_an_archive),
    Case("zip bomb of 600 MiB", zip_bomb),
    Case("zip of false sizes", zip_that_lies),
    Case("zip in a zip", nested),
    Case("zip that leads out", zipped(prefix="../../../")),
    Case("zip of absolute names", zipped(prefix="/tmp/medssl-hostile/")),
    Case("tar that leads out", tarred("disc.tar", "w", "../../../")),
    Case("tar of absolute names", tarred("disc.tgz", "w:gz", "/tmp/medssl-hostile/")),
    Case("tar of links, pipes and devices", with_links),
    Case("encrypted zip", encrypted),
    Case("zip cut short", cut_archive("disc.zip")),
    Case("tar.gz cut short", cut_archive("disc.tar.gz")),
    Case("links in a circle", links_in_a_circle),
    Case("a pipe named .dcm", pipe),
    Case("a folder that is closed", closed_folder),
    Case("a file that is closed", closed_file),
    Case("names in Latin-1", names_in_latin_1),
    Case("odd names", odd_names),
    Case("200 folders deep", deep),
)
