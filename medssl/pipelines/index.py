"""Index a folder of scans: `medssl index`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from medssl.executors.local import Config as LocalConfig
from medssl.scans.building import IndexConfig, build_index, plan_index
from medssl.scans.files import Progress
from medssl.scans.flags import meaning_of_flag
from medssl.scans.index import Index
from medssl.scans.patients import PatientsConfig

__all__ = ["Config", "Index", "describe", "index_scans", "plan", "run"]

Config = IndexConfig


def run(config: Config, out: Path, progress: Progress | None = None) -> Index:
    """Build the index, or bring it up to date. See `build_index`."""
    return build_index(config, out, progress)


def plan(config: Config, out: Path | None = None) -> dict[str, int]:
    """Say what `run` would do, and touch nothing.

    Raises:
        DataError: the folder is missing or empty.
    """
    return asdict(plan_index(config, out))


def index_scans(
    folder: Path | str,
    out: Path | str,
    *,
    patients: PatientsConfig | None = None,
    exclude: Sequence[str] = (),
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> Index:
    """Index all DICOM and NIfTI files below a folder.

    Args:
        folder: searched with all its subfolders.
        out: folder of the index; made when absent, brought up to date when present.
        patients: how to tell patients apart where files do not name them.
        exclude: patterns on paths below the folder, for example ``labels/*``.
        num_workers: processes that read headers; None: one a core; 0: this one, unguarded.
        progress: called with stage, done, total.

    Returns:
        The index; ``.accepted`` is the table of usable scans.

    Raises:
        DataError: the folder is missing or empty, or nothing in it is a usable scan.
        MachineError: the disk is full, or ``out`` cannot be written.
    """
    config = IndexConfig(
        folder=Path(folder),
        patients=patients,
        exclude=tuple(exclude),
        executor=LocalConfig(num_workers=num_workers),
    )
    return build_index(config, Path(out), progress)


def describe(index: Index) -> list[str]:
    """Return what an index holds, by modality, reason and flag, in lines for people."""
    summary = index.summary
    formats = ", ".join(f"{count} {name}" for name, count in summary["by_format"].items())
    scans = f"{summary['num_scans']} scans ({formats}) of {summary['num_patients']} patients"
    lines = [f"{scans}, from {summary['num_scan_files']} of {summary['num_files']} files"]
    unknown = summary["num_scans_of_unknown_patients"]
    if unknown:
        lines.append(
            f"warning: {unknown} scans do not name their patient; each is taken for a person of "
            "its own. If some belong together, say so under `patients`, or splits will leak."
        )
    for title, counts in (("modality", "by_modality"), ("kind", "by_dims")):
        found = ", ".join(f"{name} {count}" for name, count in summary[counts].items())
        lines.append(f"by {title}: {found or 'none'}")
    for reason, entry in summary["rejected"].items():
        lines.append(f"rejected {entry['files']} files: {reason}. {entry['remedy']}")
    for flag, count in summary["by_flags"].items():
        lines.append(f"flagged {count} scans: {flag}. {meaning_of_flag(flag)}".rstrip())
    return lines
