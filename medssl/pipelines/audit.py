"""Audit an index: a page with thumbnails, a table and a summary: `medssl audit`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from medssl.errors import DataError
from medssl.executors.base import Guard, Loss
from medssl.executors.local import Config as LocalConfig
from medssl.executors.local import LocalExecutor, available_cores
from medssl.pipelines.progress import Progress, silent
from medssl.randomness import numpy_generator
from medssl.reports.audit import Tile, choose_scans, tile_of, write_audit
from medssl.reports.audit_tables import Row
from medssl.reports.montage import draw_scan
from medssl.scans.files import LOSS_REASONS
from medssl.scans.flags import SHOWS_IDENTITY
from medssl.scans.formats.base import REASONS
from medssl.scans.index import Index
from medssl.scans.inspection import write_rejected

DEFAULT_MAX_SCANS = 200
_GUARD = Guard(seconds=60, megabytes=4096)
_MAX_WORKERS = 4  # each may hold a whole scan


def run(
    index: Index | Path,
    out: Path | None = None,
    *,
    max_scans: int = DEFAULT_MAX_SCANS,
    seed: int = 0,
    progress: Progress = silent,
) -> Path:
    """Write ``audit.html``, ``audit.csv``, ``audit.json`` and ``private/rejected.csv``.

    Args:
        index: an index, or its folder.
        out: folder of the first three; absent: that of the index.
        max_scans: thumbnails at most; chosen evenly over modalities, kinds and flags.
        seed: of that choice.
        progress: told about thumbnails as they are drawn.

    Returns:
        Path of ``audit.html``.

    Raises:
        DataError: there is no index, or it has no private part.
        MachineError: the disk is full or the folder cannot be written.
    """
    opened = index if isinstance(index, Index) else Index.open(index)
    write_rejected(opened)
    chosen = choose_scans(opened, max_scans, numpy_generator(seed, "audit"))
    tiles = _tiles(opened.folder, chosen, progress)
    return write_audit(opened, tiles, len(chosen), seed=seed, out=out)


def _tiles(folder: Path, rows: Sequence[Row], progress: Progress) -> Iterator[Tile]:
    """Yield the tile of every row, in order; voxels are read in guarded workers."""
    workers = min(_MAX_WORKERS, available_cores(), len(rows))
    executor = LocalExecutor(LocalConfig(num_workers=workers))
    function = functools.partial(draw_tile, str(folder.resolve()))
    drawn = executor.map(function, rows, lost=_lost, guard=_GUARD)
    for done, tile in enumerate(drawn, start=1):
        progress("drawing the audit", done, len(rows))
        yield tile


def draw_tile(folder: str, row: Row) -> Tile:
    """Read one scan and draw it; a scan that cannot be read any more gets a tile saying so."""
    if SHOWS_IDENTITY & set(row["flags"]):
        return tile_of(row)
    try:
        volume = _opened(folder).read_volume(row["scan_key"])
    except DataError as error:
        return tile_of(row, problem=_without_key(str(error), row["scan_key"]))
    image = draw_scan(
        volume.voxels_CXYZ,
        volume.affine,
        dims=row["dims"],
        colour="colour" in row["flags"],
        hounsfield=row["intensity"] == "HU",
        as_stored=not row["orientation"],
    )
    return tile_of(row, image)


@functools.cache
def _opened(folder: str) -> Index:
    """Open an index once in every worker."""
    return Index.open(folder)


def _without_key(text: str, key: str) -> str:
    """Leave out what the caption says already."""
    short = text.removeprefix(f"scan {key}: ").removeprefix(f"scan {key} ")
    return short[:1].upper() + short[1:]


def _lost(row: Row, loss: Loss) -> Tile:
    return tile_of(row, problem=f"It could not be drawn. {REASONS[LOSS_REASONS[loss]]}")
