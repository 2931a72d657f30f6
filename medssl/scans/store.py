"""The store: prepared scans on disk, compressed in small blocks and addressed by content.

``<store>/store.json``         format version and the preprocessing that made the scans
``<store>/entries.parquet``    one row a scan; written last, so its presence means "finished"
``<store>/scans/ab/<address>`` one folder a scan: ``image.b2nd``, ``mask-<name>.b2nd`` and
                               ``entry.json``

A scan's folder is written under a temporary name and renamed, so it is whole or absent. Nothing in
a store names a person or a file: scans and patients appear by key.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import numpy.typing as npt
import pandas as pd

from medssl.atomic import atomic_write, disk_errors
from medssl.errors import DataError
from medssl.scans.entry import FORMAT, Entry, content_address, entry_of_row

__all__ = ["Entry", "Region", "Store", "content_address"]

Region = tuple[slice, ...]

_CHUNKS = {2: (256, 256), 3: (64, 64, 64)}
_BLOCKS = {2: (64, 64), 3: (32, 32, 32)}
"""Voxels per axis: one block is decompressed at a time, so a slice in any plane touches few."""

_KEPT_ENTRIES = 4096
"""Descriptions held in memory, of some 10 kB each; the oldest one makes place."""

_REDO = "Prepare the store again: only what is damaged or missing is made anew."


class Store:
    """Prepared scans on disk. Use `create` to fill one and `open` to read one."""

    def __init__(self, folder: Path, preprocessing: Mapping[str, Any]) -> None:
        self.folder = folder
        self.preprocessing = dict(preprocessing)
        self._loaded: dict[str, Entry] = {}

    @classmethod
    def create(cls, folder: Path, preprocessing: Mapping[str, Any]) -> Store:
        """Begin or continue a store.

        Scans that are already there stay and are found by `has`. A store that was made with other
        preprocessing stops being readable until `commit` has listed its new scans.
        """
        folder = Path(folder)
        description = {"format": FORMAT, "preprocessing": dict(preprocessing)}
        path = folder / "store.json"
        if _read_json(path) != json.loads(json.dumps(description)):
            (folder / "entries.parquet").unlink(missing_ok=True)
            atomic_write(path, json.dumps(description, indent=2))
        return cls(folder, preprocessing)

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Open a finished store for reading.

        Raises:
            DataError: the folder holds no store, an unfinished one, or one of another version.
        """
        folder = Path(folder)
        description = _read_json(folder / "store.json")
        if description is None:
            raise DataError(
                "the folder given holds no store (no readable store.json). "
                "Make one with `medssl prepare`."
            )
        if description.get("format") != FORMAT:
            raise DataError(
                f"the store has format {description.get('format')}, this medssl reads {FORMAT}. "
                "Prepare the scans again."
            )
        if not (folder / "entries.parquet").is_file():
            raise DataError(f"the store was never finished. {_REDO}")
        return cls(folder, description["preprocessing"])

    @cached_property
    def entries(self) -> pd.DataFrame:
        """One row a scan, sorted by scan key.

        Columns: the scalars of `Entry`, ``foreground_fraction``, and as lists ``shape``,
        ``spacing_mm``, ``masks`` and ``affine`` (16 numbers, row by row).
        """
        try:
            return pd.read_parquet(self.folder / "entries.parquet")
        except (OSError, ValueError):
            raise DataError(f"the store's table entries.parquet cannot be read. {_REDO}") from None

    @property
    def scan_keys(self) -> list[str]:
        """Keys of all scans, sorted."""
        return [str(key) for key in self.entries["scan_key"]]

    @cached_property
    def digest(self) -> str:
        """sha256 over all addresses: the same scans, masks and preprocessing, the same digest."""
        text = json.dumps([FORMAT, sorted(str(address) for address in self.entries["address"])])
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def _listed(self) -> dict[str, Entry]:
        columns = [name for name in Entry.__dataclass_fields__ if name in self.entries.columns]
        rows = zip(*(self.entries[name].tolist() for name in columns), strict=True)
        return {
            entry.scan_key: entry
            for entry in (entry_of_row(dict(zip(columns, row, strict=True))) for row in rows)
        }

    def listed(self, scan_key: str) -> Entry:
        """Return what the table of all scans says of one: no file of the scan is opened.

        Its ``foreground_counts`` are empty and its ``files`` are None; `entry` has them.

        Raises:
            DataError: the scan is not in the store.
        """
        if scan_key not in self._listed:
            raise DataError(
                f"scan {scan_key} is not in the store of {len(self._listed)} scans. "
                "Prepare the store from the index that lists it."
            )
        return self._listed[scan_key]

    def entry(self, scan_key: str) -> Entry:
        """Return all that is known of one scan, from its own description.

        Raises:
            DataError: the scan is not in the store, or its description is damaged.
        """
        if scan_key not in self._loaded:
            address = self.listed(scan_key).address
            try:
                text = (self._scan_folder(address) / "entry.json").read_text(encoding="utf-8")
                entry = Entry.from_json(text)
            except (OSError, ValueError, TypeError, KeyError):
                raise _damaged(scan_key, "its description cannot be read") from None
            if len(self._loaded) >= _KEPT_ENTRIES:
                del self._loaded[next(iter(self._loaded))]
            self._loaded[scan_key] = entry
        return self._loaded[scan_key]

    def has(self, address: str) -> bool:
        """Return whether a scan's folder is there with files of the sizes that were written."""
        folder = self._scan_folder(address)
        try:
            entry = Entry.from_json((folder / "entry.json").read_text(encoding="utf-8"))
            return all(
                (folder / name).stat().st_size == size
                for name, (size, _) in (entry.files or {}).items()
            )
        except (OSError, ValueError, TypeError, KeyError):
            return False

    def put(
        self,
        entry: Entry,
        image_CS: npt.NDArray[np.float16],
        masks: Mapping[str, npt.NDArray[np.uint8]] | None = None,
    ) -> Entry:
        """Write one scan; whole or not at all, and safe from several processes at once.

        Args:
            entry: what is known; counts, masks and files are filled in here.
            image_CS: (C, X, Y) or (C, X, Y, Z), values in [0, 1].
            masks: by name, each of the image's spatial shape.

        Returns:
            The completed entry.

        Raises:
            DataError: a mask's shape differs from the image's.
            MachineError: the disk is full or not writable.
        """
        masks = dict(masks or {})
        for name, mask in masks.items():
            if mask.shape != image_CS.shape[1:]:
                raise DataError(
                    f"scan {entry.scan_key}: mask {name!r} has shape {mask.shape}, "
                    f"the image {image_CS.shape[1:]}. They must be equal."
                )
        target = self._scan_folder(entry.address)
        with disk_errors(self.folder / "scans"):
            target.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=".part-", dir=target.parent))
            try:
                _write_array(draft / "image.b2nd", image_CS, channels=True)
                for name, mask in masks.items():
                    _write_array(draft / f"mask-{name}.b2nd", mask, channels=False)
                complete = replace(
                    entry,
                    shape=tuple(image_CS.shape[1:]),
                    channels=image_CS.shape[0],
                    foreground_counts=_foreground_counts(image_CS, entry.foreground_threshold),
                    masks=tuple(sorted(masks)),
                    files={
                        path.name: (path.stat().st_size, _sha256(path))
                        for path in sorted(draft.glob("*.b2nd"))
                    },
                )
                atomic_write(draft / "entry.json", complete.to_json())
                draft.chmod(0o755)
                if target.exists():
                    shutil.rmtree(target)
                draft.replace(target)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        return complete

    def commit(self, addresses: Iterable[str]) -> None:
        """List the scans that belong to the store, and so finish it.

        Raises:
            DataError: an address is not there, or two addresses hold the same scan.
        """
        rows = []
        for address in addresses:
            path = self._scan_folder(address) / "entry.json"
            try:
                entry = Entry.from_json(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, TypeError, KeyError):
                raise DataError(f"a prepared scan is missing from the store. {_REDO}") from None
            row = asdict(entry)
            for name in ("foreground_counts", "files"):
                del row[name]
            row["affine"] = [number for line in entry.affine for number in line]
            row["foreground_fraction"] = entry.foreground_fraction
            rows.append({name: list(v) if isinstance(v, tuple) else v for name, v in row.items()})
        columns = [*Entry.__dataclass_fields__, "foreground_fraction"]
        columns = [name for name in columns if name not in ("foreground_counts", "files")]
        table = pd.DataFrame(rows, columns=columns).sort_values("scan_key", ignore_index=True)
        if table["scan_key"].duplicated().any():
            raise DataError("a scan was prepared twice for one store. Prepare it again.")
        atomic_write(self.folder / "entries.parquet", table.to_parquet)
        self._forget()

    def read(self, scan_key: str, region: Sequence[slice] | None = None) -> npt.NDArray[np.float16]:
        """Return an image or a region of it, decompressing only the blocks it touches.

        A whole read checks the file against its sha256; a region against its length alone.

        Args:
            scan_key: which scan.
            region: one slice for each spatial axis, steps of one; None for the whole scan.

        Returns:
            (C, X, Y[, Z]) float16 in [0, 1].

        Raises:
            DataError: the scan is not there or its file is damaged; the message names its key.
        """
        array: npt.NDArray[np.float16] = self._read(scan_key, "image.b2nd", region, channels=True)
        return array

    def read_mask(
        self, scan_key: str, name: str, region: Sequence[slice] | None = None
    ) -> npt.NDArray[np.uint8]:
        """Return a mask or a region of it, (X, Y[, Z]) uint8. See `read`."""
        known = self.entry(scan_key).masks
        if name not in known:
            raise DataError(
                f"scan {scan_key} has no mask {name!r} in the store (it has: "
                f"{', '.join(known) or 'none'}). Prepare the store with that mask folder."
            )
        array: npt.NDArray[np.uint8] = self._read(
            scan_key, f"mask-{name}.b2nd", region, channels=False
        )
        return array

    def verify(self) -> list[str]:
        """Return the keys of scans whose files differ from what was written."""
        damaged = []
        for scan_key in self.scan_keys:
            try:
                entry = self.entry(scan_key)
                folder = self._scan_folder(entry.address)
                intact = all(
                    _sha256(folder / name) == digest
                    for name, (_, digest) in (entry.files or {}).items()
                )
            except (OSError, DataError):
                intact = False
            if not intact:
                damaged.append(scan_key)
        return damaged

    def _read(
        self, scan_key: str, name: str, region: Sequence[slice] | None, *, channels: bool
    ) -> npt.NDArray[Any]:
        entry = self.entry(scan_key)
        path = self._scan_folder(entry.address) / name
        written, digest = (entry.files or {}).get(name, (-1, ""))
        try:
            found = path.stat().st_size
        except OSError:
            found = 0
        if found != written:  # before blosc2 sees it: it trusts the lengths inside the file
            raise _damaged(scan_key, f"{name} has {found} bytes, {written} were written")
        if region is None and _sha256(path) != digest:  # a whole read can afford to look at it all
            raise _damaged(scan_key, f"{name} differs from what was written")
        where: tuple[slice, ...] = tuple(region or (slice(None),) * len(entry.shape))
        try:
            # One thread: sampling runs in worker processes, and blosc2's threads do not fork.
            array = blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1))
            return np.asarray(array[(slice(None), *where) if channels else where])
        except (RuntimeError, ValueError, OSError):
            raise _damaged(scan_key, f"{name} cannot be decompressed") from None

    def _scan_folder(self, address: str) -> Path:
        return self.folder / "scans" / address[:2] / address

    def _forget(self) -> None:
        self._loaded.clear()
        for name in ("entries", "digest", "_listed"):
            self.__dict__.pop(name, None)


def _damaged(scan_key: str, what: str) -> DataError:
    return DataError(f"scan {scan_key} is damaged in the store: {what}. {_REDO}")


def _foreground_counts(
    image_CS: npt.NDArray[np.float16], threshold: float
) -> tuple[tuple[int, ...], ...]:
    foreground_S = (image_CS > np.float16(threshold)).any(axis=0)
    axes = range(foreground_S.ndim)
    return tuple(
        tuple(int(n) for n in foreground_S.sum(axis=tuple(a for a in axes if a != axis)))
        for axis in axes
    )


def _write_array(path: Path, array: npt.NDArray[Any], *, channels: bool) -> None:
    lead = (1,) if channels else ()
    spatial = array.ndim - len(lead)
    # blosc2 refuses a block larger than its chunk, and a chunk larger than the array is waste.
    chunks = tuple(min(c, n) for c, n in zip((*lead, *_CHUNKS[spatial]), array.shape, strict=True))
    blocks = tuple(min(b, c) for b, c in zip((*lead, *_BLOCKS[spatial]), chunks, strict=True))
    # Compressed in memory and then written: blosc2 itself does not say that a disk is full.
    frame = blosc2.asarray(
        np.ascontiguousarray(array),
        chunks=chunks,
        blocks=blocks,
        contiguous=True,
        cparams=blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=3, nthreads=1),
    ).to_cframe()
    with path.open("wb") as stream:
        stream.write(frame)
        stream.flush()
        os.fsync(stream.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
