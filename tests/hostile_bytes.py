"""Hostile DICOM files: cut short, lying about their pixels, or made to burst a reader."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, JPEG2000Lossless

from hostile_dicom import MIDDLE
from hostile_outcomes import Case, rejected
from hostile_pixels import compressed, encapsulated
from hostile_series import NUM, SHAPE, Outcome, copy_of, edit, series, set_to, whole


def syntax_named(uid: str) -> Callable[[Path], Outcome]:
    """Return a series that says that it is compressed in a way that nobody here reads."""

    def build(folder: Path) -> Outcome:
        for path in series(folder):
            encapsulated(path, dcmread(path), b"\0\1\2\3" * 20, UID(uid))
        return (rejected("unsupported_transfer_syntax|unreadable", NUM),)

    return build


def deflate_bomb(folder: Path) -> Outcome:
    path = series(folder, (9, 8, 1))[0]
    edit(path, lambda dataset: setattr(dataset.file_meta, "TransferSyntaxUID",
                                       DeflatedExplicitVRLittleEndian))  # fmt: skip
    content = path.read_bytes()
    start = 132 + 12 + int.from_bytes(content[140:144], "little")
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = zlib.decompress(content[start:], -zlib.MAX_WBITS)
    private = b"\x09\x00\x10\x00OB\x00\x00" + (2**30).to_bytes(4, "little")
    packed = [packer.compress(private)]
    packed += [packer.compress(bytes(2**24)) for _ in range(64)]
    path.write_bytes(content[:start] + b"".join([*packed, packer.compress(body), packer.flush()]))
    return (rejected("too_large|unsupported_transfer_syntax|unreadable|out_of_memory"),)


def truncated(position: int) -> Callable[[Path], Outcome]:
    def build(folder: Path) -> Outcome:
        path = series(folder)[position]
        path.write_bytes(path.read_bytes()[:-50])
        if position in (0, -1):
            return (rejected("truncated_pixels"), whole((*SHAPE[:2], NUM - 1)))
        return (rejected("truncated_pixels"), rejected("missing_slice", NUM - 1))

    return build


def truncated_in_compression(folder: Path) -> Outcome:
    (right,) = compressed(JPEG2000Lossless)(folder)
    path = sorted(folder.iterdir())[10]
    path.write_bytes(path.read_bytes()[:-200])
    return (rejected("truncated_pixels|unreadable"), rejected("missing_slice", right.shape[2] - 1))


def lying(reasons: str, **values: Any) -> Callable[[Path], Outcome]:
    """Return a series whose slice in the middle lies about its pixels."""

    def build(folder: Path) -> Outcome:
        edit(series(folder)[MIDDLE], set_to(**values))
        return (rejected(reasons), rejected("missing_slice", NUM - 1))

    return build


def wrong_type(folder: Path) -> Outcome:
    path = series(folder)[2]
    content = path.read_bytes()
    old = b"\x28\x00\x10\x00US\x02\x00"  # Rows
    path.write_bytes(content.replace(old, b"\x28\x00\x10\x00LO\x02\x00"))
    return (rejected("unreadable|truncated_pixels"), rejected("missing_slice", NUM - 1))


def huge_private(folder: Path) -> Outcome:
    block = bytes(range(256)) * 4096

    def change(dataset: Dataset) -> None:
        dataset.private_block(0x0009, "HOSTILE", create=True).add_new(1, "OB", block)

    edit(series(folder), change)
    return (whole(),)


def one_instance_copied(folder: Path) -> Outcome:
    copy_of(series(folder)[2], "zz.dcm", lambda dataset: None)
    return (whole(), rejected("duplicate_file"))


DAMAGE_CASES = (
    Case("deflate bomb of 1 GiB", deflate_bomb),
    Case("MPEG-4 named", syntax_named("1.2.840.10008.1.2.4.102")),
    Case("a private compression", syntax_named("1.2.840.113619.5.99")),
    Case("first slice cut short", truncated(0)),
    Case("middle slice cut short", truncated(2)),
    Case("last slice cut short", truncated(-1)),
    Case("JPEG 2000 slice cut short", truncated_in_compression),
    Case("65535 × 65535 pixels", lying("too_large|truncated_pixels", Rows=65535, Columns=65535)),
    Case(
        "rows without columns", lying("truncated_pixels|unreadable|nonfinite_geometry", Columns=0)
    ),
    Case(
        "a million frames",
        lying(
            "truncated_pixels|too_large|multi_frame_unsupported|unreadable",
            NumberOfFrames=1_000_000,
        ),
    ),
    Case(
        "24 bits allocated",
        lying("unreadable|truncated_pixels|unsupported_transfer_syntax", BitsAllocated=24),
    ),
    Case("no pixel data", lying("truncated_pixels|not_an_image", PixelData=None)),
    Case("rows of the wrong type", wrong_type),
    Case("1 MiB of private data in each", huge_private),
    Case("one slice again under a new UID", one_instance_copied),
)
