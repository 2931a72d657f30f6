"""Commands about scans: index, audit, inspect, prepare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medssl.cli.options import (
    CONFIG,
    DRY_RUN,
    JSON,
    OVERRIDES,
    PATH,
    WORKING_CODES,
    Command,
    out,
)
from medssl.cli.output import print_facts, show_progress


@click.command(
    cls=Command,
    examples=[
        "medssl index data/hippocampus/images --out data/looked_at",
        "medssl index configs/index/hippocampus.yaml",
        "medssl index configs/index/archive.yaml folder=/archive/export --dry-run",
    ],
    writes=(
        "The index, data/index by default: index.parquet, summary.json, audit.html, "
        "audit.csv, audit.json, and private/ (mode 0700: paths and the salt of the keys)."
    ),
    codes=WORKING_CODES,
)
@click.argument("config", type=PATH)
@OVERRIDES
@out("Folder of the index. Default: data/index.")
@click.option(
    "--audit/--no-audit",
    "wants_audit",
    default=True,
    show_default=True,
    help="Write audit.html with thumbnails, audit.csv and audit.json into the index.",
)
@DRY_RUN
@JSON
def index(
    config: Path, overrides: tuple[str, ...], out: Path | None, wants_audit: bool, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Index a folder of DICOM and NIfTI: a config file, or simply the folder.

    Every file ends in a row of the table: accepted as part of a scan, or rejected with a reason
    and what to do about it. Nothing in the folder is changed. Given again, only new and changed
    files are read.
    """
    from medssl.config import load_config, validate_config
    from medssl.pipelines import index as pipeline
    from medssl.pipelines.facts import keep_dataset_facts
    from medssl.scans.building import IndexConfig

    if config.suffix in (".yaml", ".yml"):
        loaded = load_config(config, IndexConfig, overrides)
    else:
        loaded = validate_config({"folder": str(config)}, IndexConfig, overrides)
    if dry_run:
        print_facts(pipeline.plan(loaded), as_json)
        return
    with show_progress(as_json) as progress:
        built = pipeline.run(loaded, out or Path("data/index"), progress=progress)
        keep_dataset_facts(loaded.folder, built.folder)
        page = _audit(built, progress) if wants_audit else None
    if as_json:
        written = {"audit": str(page)} if page else {}
        print_facts({"index": str(built.folder), **written, **built.summary}, as_json)
        return
    for line in pipeline.describe(built):
        click.echo(line)
    click.echo(f"Index: {built.folder}")
    if page:
        click.echo(f"Audit: {page} (shows pixels of patients: keep it where the scans are)")


def _audit(index: Any, progress: Any) -> Path:
    from medssl.pipelines import audit as pipeline

    return pipeline.run(index, progress=progress)


@click.command(
    cls=Command,
    examples=[
        "medssl audit data/index --max-scans 500",
    ],
    writes=(
        "audit.html, audit.csv and audit.json in the index, or where --out says; "
        "private/rejected.csv in the index."
    ),
    codes=WORKING_CODES,
)
@click.argument("index", type=PATH)
@out("Where to write audit.html, audit.csv and audit.json. Default: the folder of the index.")
@click.option(
    "--max-scans", type=click.IntRange(min=0), default=200, show_default=True,
    help="Thumbnails at most, chosen evenly over modalities and flags.",
)  # fmt: skip
@JSON
def audit(index: Path, out: Path | None, max_scans: int, as_json: bool) -> None:
    """Show what an index accepted and rejected, and why, on one page that needs no network.

    The page shows pixels of patients: keep it where the scans are.
    """
    from medssl.pipelines import audit as pipeline

    with show_progress(as_json) as progress:
        page = pipeline.run(index, out, max_scans=max_scans, progress=progress)
    rejected = index / "private" / "rejected.csv"
    print_facts({"audit": str(page), "rejected_files": str(rejected)}, as_json)


@click.command(
    cls=Command,
    examples=[
        "medssl inspect data/hippocampus/images/hippocampus_001.nii.gz",
        "medssl inspect /archive/export/series_12 --json",
        "medssl inspect 7f3a19c02b44d1e8 --index data/index",
    ],
    codes=(0, 3),
)
@click.argument("path")
@click.option("--index", "index_folder", type=PATH, help="PATH is the key of a scan in this index.")
@JSON
def inspect(path: str, index_folder: Path | None, as_json: bool) -> None:
    """Explain one file, one folder, or one scan of an index: accepted or not, and why.

    A file or folder is indexed on its own, with keys that nobody keeps; the key of a scan is
    looked up in an index and its files are read again.
    """
    from medssl.pipelines import inspect as pipeline

    found = pipeline.run(path, index_folder)
    if as_json:
        print_facts(pipeline.facts_of(found), as_json)
        return
    for line in pipeline.describe(found, path if index_folder else Path(path).name or path):
        click.echo(line)


@click.command(
    cls=Command,
    examples=[
        "medssl prepare my_prepare.yaml --dry-run",
        "medssl prepare my_prepare.yaml",
    ],
    writes="The store of prepared scans that the config names.",
    codes=WORKING_CODES,
)
@CONFIG
@OVERRIDES
@DRY_RUN
@JSON
def prepare(config: Path, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Prepare the scans of an index: orient, resample, crop, scale, store.

    A study and a transfer do this by themselves; apart, it can run beforehand, on a machine with
    many cores. Scans that are already prepared alike are kept. medssl config schema prepare says
    what the config holds.
    """
    from medssl.config import load_config
    from medssl.pipelines import prepare as pipeline

    loaded = load_config(config, pipeline.PrepareConfig, overrides)
    if dry_run:
        print_facts(pipeline.plan(loaded), as_json)
        return
    with show_progress(as_json) as progress:
        store = pipeline.run(loaded, progress=progress)
    print_facts({"store": str(store.folder), "scans": len(store.scan_keys)}, as_json)
