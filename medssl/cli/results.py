"""Commands about what runs have left: compare, report, sync, gallery, features, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medssl.cli import completion
from medssl.cli.options import (
    DRY_RUN,
    JSON,
    PATH,
    RUN,
    WORKING_CODES,
    Command,
    out,
)
from medssl.cli.output import fail_after_answer, print_facts, print_study, show_progress
from medssl.errors import ConfigError, MachineError


@click.command(
    cls=Command,
    examples=[
        "medssl compare runs/ours runs/theirs --out runs/comparison",
        "medssl compare runs/ours --reference random --json",
    ],
    writes=(
        "The folder of --out, runs/comparison by default: results.csv, comparisons.csv, "
        "labels_saved.csv, learning_curves.csv, power.csv, figures/, report.html."
    ),
    codes=(0, 2, 3, 4),
)
@click.argument(
    "runs", metavar="RUN_FOLDER...", nargs=-1, required=True, type=PATH,
    shell_complete=completion.run_folders,
)  # fmt: skip
@out("Where to write tables and report. Default: runs/comparison.")
@click.option(
    "--reference", help="Init to compare with. Default: imagenet, or the first run's reference."
)
@JSON
def compare(runs: tuple[Path, ...], out: Path | None, reference: str | None, as_json: bool) -> None:
    """Compare the inits of several runs, from their predictions alone.

    The runs are those of medssl study or medssl transfer, on the same tasks; nothing is trained.
    """
    from medssl.pipelines import compare as pipeline
    from medssl.pipelines.sections import StatisticsConfig

    folder = out or Path("runs/comparison")
    statistics = StatisticsConfig(reference=reference) if reference else None
    pipeline.run(runs, folder, statistics=statistics)
    print_study(folder, as_json)


@click.command(
    cls=Command,
    examples=[
        "medssl report runs/demo",
        "medssl report runs/demo --out desk",
    ],
    writes="report.html and figures/, in the run folder or the folder of --out.",
    codes=(0, 3, 4),
)
@RUN
@out("Folder to write it and its figures to. Default: the run folder.")
@JSON
def report(run: Path, out: Path | None, as_json: bool) -> None:
    """Write a run folder's report anew.

    From what the folder holds: after an update of medssl, after a run that was cut short, or on
    another machine that the folder was copied to.
    """
    from medssl.reports.html import build_report

    print_facts({"report": str(build_report(run, out))}, as_json)


@click.command(
    cls=Command,
    examples=[
        "medssl sync runs/demo",
        "MLFLOW_TRACKING_URI=https://mlflow.example.org medssl sync runs/demo",
    ],
    writes="To MLflow; in the run folder only what it has delivered.",
    codes=(0, 3, 4),
)
@RUN
@JSON
def sync(run: Path, as_json: bool) -> None:
    """Deliver to MLflow what a run folder's journal holds and MLflow lacks.

    After an outage of the server, or for a run made without one. What was delivered before is not
    delivered twice.
    """
    from medssl.tracking.base import sync as deliver

    outcome = deliver(run)
    print_facts(
        {
            "delivered": outcome.delivered,
            "undelivered": outcome.undelivered,
            "refused": outcome.refused,
            "target": outcome.target,
        },
        as_json,
    )
    if outcome.undelivered:
        fail_after_answer(_UndeliveredError(outcome.problem), as_json)


class _UndeliveredError(MachineError):
    def __init__(self, problem: str) -> None:
        super().__init__(
            f"MLflow did not take everything ({problem}). Nothing is lost: the journal keeps it. "
            "Check the server and run medssl sync again."
        )


@click.command(
    cls=Command,
    examples=[
        "medssl gallery runs/demo",
    ],
    writes=(
        "The folder of --out, gallery/ in the run folder by default: tables, and pictures "
        "where the run's config allows (include_images)."
    ),
    codes=WORKING_CODES,
)
@RUN
@out("Where to write. Default: gallery, inside the run folder.")
@click.option(
    "--k", type=click.IntRange(min=1), default=10, show_default=True,
    help="Neighbours that are counted.",
)  # fmt: skip
@JSON
def gallery(run: Path, out: Path | None, k: int, as_json: bool) -> None:
    """Show which patches of other patients each init finds alike, and count the right ones."""
    from medssl.pipelines import gallery as pipeline

    with show_progress(as_json) as progress:
        found = pipeline.run(run, out, k=k, progress=progress)
    if as_json:
        print_facts({"gallery": str(found.folder), **found.facts}, as_json)
        return
    for line in pipeline.describe(found):
        click.echo(line)
    pictures = found.facts["pictures_of_patients"]
    note = " (shows pixels of patients: keep it where the scans are)" if pictures else ""
    click.echo(f"Gallery: {found.folder}{note}")


@click.command(
    cls=Command,
    examples=[
        "medssl features runs/demo",
    ],
    writes=(
        "The folder of --out, features_of_scans/ in the run folder by default: tables and figures."
    ),
    codes=WORKING_CODES,
)
@RUN
@out("Where to write. Default: features_of_scans, inside the run folder.")
@JSON
def features(run: Path, out: Path | None, as_json: bool) -> None:
    """Show what the frozen features of a study know: classes, scanners, sites, and each other.

    Writes maps of scans (PCA and t-SNE) by label, scanner, site and patient, the likeness of every
    layer of every init (CKA), and how well a linear classifier tells scanners and sites: features
    that tell them may carry them into your results. Test patients are not looked at.
    """
    from medssl.pipelines import features as pipeline

    with show_progress(as_json) as progress:
        found = pipeline.run(run, out, progress=progress)
    if as_json:
        print_facts(
            {
                "features": str(found.folder), "num_scans": found.num_scans,
                "num_patients": found.num_patients,
                "told_apart": found.told.to_dict("records"),
            },
            as_json,
        )  # fmt: skip
        return
    for line in pipeline.describe(found):
        click.echo(line)
    click.echo(f"Features: {found.folder}")


@click.command(
    cls=Command,
    examples=[
        "medssl export runs/ours/checkpoints/inpainting --format onnx --format state_dict",
        "medssl export runs/rotation --format bundle --values arbitrary --out weights/rotation",
    ],
    writes=(
        "The folder of --out, runs/export/<name> by default: the network in each format, "
        "MODEL_CARD.md, export.json."
    ),
    codes=(0, 2, 3, 4),
)
@click.argument("source", metavar="RUN_OR_CHECKPOINT", type=PATH)
@click.option(
    "--format",
    "formats",
    multiple=True,
    required=True,
    metavar="NAME",
    shell_complete=completion.components("exports"),
    help="onnx, program (PyTorch ExportedProgram), state_dict (torchvision, timm, MONAI) or "
    "bundle (MONAI); may be given several times.",
)
@out("Folder to write. Default: runs/export/<name of the checkpoint>.")
@click.option(
    "--values",
    type=click.Choice(["hu", "arbitrary"]),
    help="What the images of a MONAI bundle hold, where intensity is auto: HU (CT), or not.",
)
@click.option(
    "--image-size",
    metavar="N,N[,N]",
    help="Voxels along each axis, to capture the network at this size alone.",
)
@click.option("--licence", help="Licence of the weights, for the documents.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export in that folder.")
@DRY_RUN
@JSON
def export(
    source: Path, formats: tuple[str, ...], out: Path | None, values: Any, image_size: str | None,
    licence: str | None, overwrite: bool, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Export a backbone for software other than medssl, compared with it, with a model card.

    Every file is read back and compared with the backbone before it is kept. medssl list exports
    names the formats.
    """
    from medssl.pipelines import export as pipeline

    options: dict[str, Any] = {
        "values": values,
        "image_size": None if image_size is None else _sizes(image_size),
        "licence": licence,
        "overwrite": overwrite,
    }
    folder = out or Path("runs/export") / source.resolve().name
    if dry_run:
        print_facts(pipeline.plan(source, formats, folder, **options), as_json)
        return
    with show_progress(as_json) as progress:
        exported = pipeline.run(source, formats, folder, **options, progress=progress)
    if as_json:
        print_facts({"out": str(exported.folder), **exported.facts}, as_json)
        return
    for line in pipeline.describe(exported):
        click.echo(line)
    click.echo(f"Export: {exported.folder} (MODEL_CARD.md says how to load it)")


def _sizes(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ConfigError(f"--image-size takes numbers of voxels like 96,96,96, found {text!r}.")
    return tuple(map(int, numbers))
