"""The audit of an index: one offline page, a table and a summary, beside the index."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from medssl import __version__
from medssl.atomic import atomic_write
from medssl.reports.appearance import style
from medssl.reports.audit_tables import (
    Row,
    num_channels,
    rows_of,
    shape_text,
    spacing_text,
    summarize_index,
    write_csv,
)
from medssl.reports.page import data_uri, environment
from medssl.scans.flags import SHOWS_IDENTITY
from medssl.scans.index import Index

AUDIT_NAME = "audit.html"
_MEDIAN = 2  # place of the median among the quantiles


@dataclass(frozen=True)
class Tile:
    """One scan on the page.

    Attributes:
        image: JPEG, or nothing when ``problem`` says why it is not pictured.
    """

    scan_key: str
    modality: str
    dims: str
    shape: str
    spacing_mm: str
    channels: int
    flags: tuple[str, ...]
    image: bytes = b""
    problem: str = ""

    @property
    def source(self) -> str:
        """The picture as an address that needs no other file."""
        return data_uri(self.image, "jpeg")

    @property
    def alt(self) -> str:
        """What the picture shows, in words."""
        shown = {
            "3D": "its middle axial, coronal and sagittal slices",
            "2D+t": "its middle frame, and its first and last beside it",
        }.get(self.dims, "the whole image")
        return f"{self.modality} scan {self.scan_key}, {self.dims}: {shown}."


def tile_of(row: Row, image: bytes = b"", problem: str = "") -> Tile:
    """Return the tile of one accepted row; scans that may show who they are keep no picture."""
    hidden = sorted(SHOWS_IDENTITY & set(row["flags"]))
    return Tile(
        scan_key=row["scan_key"],
        modality=row["modality"] or "unknown",
        dims=row["dims"],
        shape=shape_text(row),
        spacing_mm=spacing_text(row),
        channels=num_channels(row),
        flags=tuple(row["flags"]),
        image=b"" if hidden else image,
        problem=f"Not pictured: {', '.join(hidden)}" if hidden else problem,
    )


def choose_scans(index: Index, max_scans: int, generator: np.random.Generator) -> list[Row]:
    """Choose accepted scans evenly: every modality in turn, and in it every combination of flags.

    Returns:
        At most ``max_scans`` rows, sorted by modality, kind, flags and key.
    """
    strata: dict[str, dict[tuple[str, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows_of(index):
        if row["status"] == "accepted":
            strata[row["modality"]][row["dims"], *row["flags"]].append(row["scan_key"])
    turns = []
    for modality in sorted(strata):
        combinations = [strata[modality][flags] for flags in sorted(strata[modality])]
        shuffled = [_shuffled(keys, generator) for keys in combinations]
        turns.append(_in_turn(_shuffled(shuffled, generator)))
    chosen = set(_in_turn(turns)[:max_scans])
    return sorted((row for row in rows_of(index) if row["scan_key"] in chosen), key=_place)


def write_audit(
    index: Index, tiles: Iterable[Tile], num_tiles: int, *, seed: int, out: Path | None = None
) -> Path:
    """Write ``audit.html`` (mode 0600: it shows patients), ``audit.csv`` and ``audit.json``.

    Args:
        index: what is audited.
        tiles: read while the page is written, so that no more than one is in memory; sorted by
            modality.
        num_tiles: how many there will be.
        seed: of the choice of scans, named on the page.
        out: folder; absent: that of the index.

    Returns:
        Path of ``audit.html``.

    Raises:
        MachineError: the folder cannot be written.
    """
    folder = out or index.folder
    summary = summarize_index(index)
    atomic_write(folder / "audit.csv", lambda part: write_csv(index, part))
    atomic_write(folder / "audit.json", json.dumps(summary, indent=1) + "\n")
    page = environment().get_template("audit.html.j2")
    words = {**_words(summary), "seed": seed, "num_tiles": num_tiles, "sections": _sections(tiles)}

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(page.generate(words))

    atomic_write(folder / AUDIT_NAME, write, mode=0o600)
    return folder / AUDIT_NAME


def verdict(summary: Mapping[str, Any]) -> str:
    """Return the outcome of an index run in one sentence."""
    rejected = sum(entry["files"] for entry in summary["rejected"].values())
    return (
        f"{_count(summary['num_scans'], 'scan')} of {_count(summary['num_patients'], 'patient')} "
        f"from {_count(summary['num_scan_files'], 'file')}; {_count(rejected, 'file')} rejected."
    )


def _accounted(summary: Mapping[str, Any]) -> str:
    total, used = summary["num_files"], summary["num_scan_files"]
    rejected = sum(entry["files"] for entry in summary["rejected"].values())
    text = f"Every file is accounted for: {total:,} = {used:,} in scans + {rejected:,} rejected."
    if used + rejected > total:  # a multi-frame file may hold several scans
        text = (
            f"Every file is accounted for: of {total:,}, {used:,} are in scans and {rejected:,} "
            "rejected; a file that holds several scans can be in both."
        )
    return text


def _words(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything of the page that is not a picture."""
    return {
        "style": style("report.css", "audit.css"),
        "verdict": verdict(summary),
        "accounted": _accounted(summary),
        "unknown_patients": summary["num_scans_of_unknown_patients"],
        "num_scans": summary["num_scans"],
        "modalities": [_modality_row(*item) for item in summary["by_modality"].items()],
        "reasons": [
            {"reason": reason, **entry}
            for reason, entry in sorted(
                summary["rejected"].items(), key=lambda item: (-item[1]["files"], item[0])
            )
        ],
        "flags": [{"flag": flag, **entry} for flag, entry in summary["by_flag"].items()],
        "facts": [
            ("kinds", _listed(summary["by_dims"])),
            ("formats", _listed(summary["by_format"])),
            ("channels", _listed(summary["by_channels"])),
            ("index digest", summary["index_digest"][:16]),
            ("medssl", __version__),
        ],
    }


def _modality_row(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        **{key: entry[key] for key in ("scans", "patients", "files")},
        "kinds": [
            {
                "dims": dims,
                "scans": count,
                "shape": _ranges(entry["shape"][dims], "{:.0f}"),
                "spacing": _ranges(entry["spacing_mm"].get(dims, {}), "{:.3g}"),
            }
            for dims, count in entry["by_dims"].items()
        ],
    }


def _ranges(axes: Mapping[str, Sequence[float]], form: str) -> str:
    """Return medians, each with least and greatest where they differ."""
    texts = []
    for values in axes.values():
        low, middle, high = (form.format(values[place]) for place in (0, _MEDIAN, -1))
        texts.append(middle if low == high else f"{middle} ({low}–{high})")
    return " × ".join(texts) or "unknown"


def _sections(tiles: Iterable[Tile]) -> Iterator[tuple[str, Iterator[Tile]]]:
    yield from groupby(tiles, key=lambda tile: tile.modality)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items()) or "none"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _place(row: Row) -> tuple[str, str, tuple[str, ...], str]:
    return row["modality"] or "unknown", row["dims"], tuple(row["flags"]), row["scan_key"]


def _shuffled(items: list[Any], generator: np.random.Generator) -> list[Any]:
    return [items[number] for number in generator.permutation(len(items))]


def _in_turn(lists: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the first of every list, then the second of every list, and so on."""
    longest = max(map(len, lists), default=0)
    return [items[number] for number in range(longest) for items in lists if number < len(items)]
